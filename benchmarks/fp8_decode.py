"""Decoding from FP8 weights on the CPU, which simulates FP8 to the bit, against BF16 in one run.

The same model is built in BF16 and in FP8; the FP8 one holds its weights in FP8 only. Each decodes
by torch and by the compiled step (`--target cpu`), in turn, and the fastest run of each counts.
Prints the time of a token, the memory of the weights, and how often a weight was quantized while
decoding, which must be never. Run it with `python benchmarks/fp8_decode.py` from the repository's
root.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends.build import build
from dsl.load import load

ROOT = Path(__file__).parent.parent
SPECS = {"tiny": ROOT / "specs/deepseek_v3_tiny.yaml", "100M": ROOT / "benchmarks/v3_100m.yaml"}
POLICIES = ("bf16", "fp8_blockwise")
STEPS = ("torch", "C++")

Key = tuple[str, str]
"""What computes the steps, and the policy of the build."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of a run")
    parser.add_argument("--rounds", type=int, default=7, help="runs, of which the fastest counts")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, for a machine busy with other work"
    )
    asked = parser.parse_args()
    clock = time.process_time if asked.cpu_time else time.perf_counter
    print(f"{'model':6} {'step':6} {'weights':14} {'ms a token':>10} {'MB':>8}")
    for size, spec in SPECS.items():
        made: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            built = models(spec, Path(folder))
            for model in built.values():
                count_casts(model, made)
            times = race(built, asked.tokens, asked.rounds, clock)
        for step in STEPS:
            (usual, more), (held, less) = (
                (times[step, policy], megabytes(built[step, policy])) for policy in POLICIES
            )
            print(f"{size:6} {step:6} {POLICIES[0]:14} {usual * 1e3:10.2f} {more:8.1f}")
            print(f"{size:6} {step:6} {POLICIES[1]:14} {held * 1e3:10.2f} {less:8.1f}")
            print(f"{size:6} {step:6} {'ratio':14} {held / usual:10.2f} {less / more:8.2f}")
        print(f"{size:6} weights quantized while decoding: {len(made)}", flush=True)


def models(spec: Path, folder: Path) -> dict[Key, Any]:
    """The same weights in BF16 builds, and in FP8 only in FP8 builds."""
    sys.path.insert(0, str(folder))
    found: dict[Key, Any] = {}
    for step in STEPS:
        for policy in POLICIES:
            name = f"decode_{spec.stem}_{policy}_{step.replace('+', 'p').lower()}"
            description = load(spec, sets=[f"precision.policy={policy}", f"model={name}"])
            build(description, folder / name, cpu=step == "C++")
            package = importlib.import_module(name)
            if not found:
                package.Model(seed=0).save(folder / "weights")
            form = "fp8" if policy != "bf16" else None
            found[step, policy] = package.load(folder / "weights", weights=form)
    return found


def count_casts(model: Any, made: list[str]) -> None:
    """Lets every module of a model add its name to `made` when it quantizes a weight."""
    for name, module in model.named_modules():
        if hasattr(module, "quantize_weight"):
            module.quantize_weight = partial(_counted, module.quantize_weight, made, name)


def _counted(
    quantize: Callable[..., Any], made: list[str], name: str, *given: Any, **named: Any
) -> Any:
    made.append(name)
    return quantize(*given, **named)


def megabytes(model: Any) -> float:
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors) / 1e6


def race(
    models: Mapping[Key, Any], tokens: int, rounds: int, clock: Callable[[], float]
) -> dict[Key, float]:
    """Seconds of a token by each: the difference of two lengths is decoding alone."""
    short, long = ({key: float("inf") for key in models} for _ in range(2))
    for turn in range(rounds + 1):  # the first compiles steps, and does not count
        for length, best in ((1, short), (tokens + 1, long)):
            for key, model in models.items():
                vocab = model.config.params.vocab_size
                prompt = torch.randint(vocab, (1, 8), generator=torch.manual_seed(0))
                begin = clock()
                model.generate(prompt, length, eos_token_id=None)
                if turn:
                    best[key] = min(best[key], clock() - begin)
    return {key: (long[key] - short[key]) / tokens for key in models}


if __name__ == "__main__":
    main()
