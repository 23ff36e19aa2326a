"""Decoding from FP8 weights on the CPU, which simulates FP8 to the bit, against BF16 in one run.

The same model is built in BF16 and in FP8; the FP8 one holds its weights in FP8 only. Prints the
time of a token, the memory of the weights, and how often a weight was quantized while decoding,
which must be never. Run it with `python benchmarks/fp8_decode.py` from the repository's root.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from backends.build import build
from dsl.load import load

ROOT = Path(__file__).parent.parent
SPECS = {"tiny": ROOT / "specs/deepseek_v3_tiny.yaml", "100M": ROOT / "benchmarks/v3_100m.yaml"}
POLICIES = ("bf16", "fp8_blockwise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of a run")
    parser.add_argument("--rounds", type=int, default=5, help="runs, of which the median counts")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, for a machine busy with other work"
    )
    asked = parser.parse_args()
    print(f"{'model':6} {'weights':14} {'ms a token':>10} {'MB':>8}  quantized while decoding")
    for size, spec in SPECS.items():
        with tempfile.TemporaryDirectory() as folder:
            usual, held = models(spec, Path(folder))
            rows = [measured(model, asked) for model in (usual, held)]
        for name, (milliseconds, megabytes, made) in zip(POLICIES, rows, strict=True):
            print(f"{size:6} {name:14} {milliseconds:10.2f} {megabytes:8.1f}  {made}")
        (a, more, _), (b, less, _) = rows
        print(f"{size:6} {'ratio':14} {b / a:10.2f} {less / more:8.2f}", flush=True)


def models(spec: Path, folder: Path) -> tuple[Any, Any]:
    """The same weights in a BF16 build, and in FP8 only in an FP8 build."""
    sys.path.insert(0, str(folder))
    packages = []
    for policy in POLICIES:
        name = f"decode_{spec.stem}_{policy}"
        build(load(spec, sets=[f"precision.policy={policy}", f"model={name}"]), folder / name)
        packages.append(importlib.import_module(name))
    usual = packages[0].Model(seed=0)
    usual.save(folder / "weights")
    return usual, packages[1].load(folder / "weights", weights="fp8")


def measured(model: Any, asked: argparse.Namespace) -> tuple[float, float, int]:
    """Milliseconds of a token, megabytes of weights, and casts of weights while decoding."""
    made = 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal made
        made += 1
        raise AssertionError("a weight is quantized")

    for module in model.modules():
        if hasattr(module, "quantize_weight"):
            module.quantize_weight = counted
    vocab = model.config.params.vocab_size
    prompt = torch.randint(vocab, (1, 8), generator=torch.Generator().manual_seed(0))

    clock = time.process_time if asked.cpu_time else time.perf_counter

    def run(tokens: int) -> float:
        begin = clock()
        model.generate(prompt, tokens, eos_token_id=None)
        return clock() - begin

    run(2)
    # The difference of two lengths is decoding alone, without the prompt.
    times = [run(asked.tokens + 1) - run(1) for _ in range(asked.rounds)]
    memory = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return statistics.median(times) / asked.tokens * 1e3, memory / 1e6, made


if __name__ == "__main__":
    main()
