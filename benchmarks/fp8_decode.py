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
PROMPT, PAGE = 8, 64

Run = Callable[[int], object]
"""Decodes so many tokens after a prompt."""


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
        with tempfile.TemporaryDirectory() as folder:
            built = dict(zip(POLICIES, models(spec, Path(folder)), strict=True))
            made: list[str] = []
            for model in built.values():
                count_casts(model, made)
            runs: dict[tuple[str, str], Run] = {}
            for policy, model in built.items():
                runs["torch", policy] = by_torch(model)
                runs["C++", policy] = by_compiled_step(model)
            times = race(runs, asked.tokens, asked.rounds, clock)
        for step in ("torch", "C++"):
            usual, held = (times[step, policy] for policy in POLICIES)
            for policy in POLICIES:
                row = f"{times[step, policy] * 1e3:10.2f} {megabytes(built[policy]):8.1f}"
                print(f"{size:6} {step:6} {policy:14} {row}")
            less = megabytes(built[POLICIES[1]]) / megabytes(built[POLICIES[0]])
            print(f"{size:6} {step:6} {'ratio':14} {held / usual:10.2f} {less:8.2f}", flush=True)
        print(f"{size:6} weights quantized while decoding: {len(made)}", flush=True)


def models(spec: Path, folder: Path) -> tuple[Any, Any]:
    """The same weights in a BF16 build, and in FP8 only in an FP8 build."""
    sys.path.insert(0, str(folder))
    packages = []
    for policy in POLICIES:
        name = f"decode_{spec.stem}_{policy}"
        description = load(spec, sets=[f"precision.policy={policy}", f"model={name}"])
        build(description, folder / name, cpu=True)
        packages.append(importlib.import_module(name))
    usual = packages[0].Model(seed=0)
    usual.save(folder / "weights")
    return usual, packages[1].load(folder / "weights", weights="fp8")


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


def prompt_of(model: Any) -> Tensor:
    vocab = model.config.params.vocab_size
    return torch.randint(vocab, (1, PROMPT), generator=torch.Generator().manual_seed(0))


def by_torch(model: Any) -> Run:
    """Decodes with the programs of the model."""
    prompt = prompt_of(model)
    return lambda tokens: model.generate(prompt, tokens, eos_token_id=None)


def by_compiled_step(model: Any) -> Run:
    """Decodes with the step in C++, on pages."""
    runtime = f"{type(model).__module__.partition('.')[0]}.runtime"
    steps = importlib.import_module(f"{runtime}.compiled").served(model)
    pages = importlib.import_module(f"{runtime}.pages")
    if steps is model:
        raise SystemExit("the step was not compiled")
    prompt = prompt_of(model)

    @torch.inference_mode()
    def run(tokens: int) -> None:
        cache = pages.Pages(2 + (PROMPT + tokens) // PAGE, PAGE)
        blocks = list(range(1, cache.blocks))
        new, first = prompt, 0
        for _ in range(tokens):
            rows = new.shape[1]
            step, position = pages.make_rows([(blocks, first, rows)], [rows - 1], PAGE)
            cache.begin(step)
            first += rows
            new = steps.decode(new, position, cache).argmax(-1, keepdim=True)

    return run


def race(
    runs: Mapping[Any, Run], tokens: int, rounds: int, clock: Callable[[], float]
) -> dict[Any, float]:
    """Seconds of a token by each: the difference of two lengths is decoding alone."""
    short, long = ({name: float("inf") for name in runs} for _ in range(2))
    for run in runs.values():
        run(2)
    for _ in range(rounds):
        for length, best in ((1, short), (tokens + 1, long)):
            for name, run in runs.items():
                begin = clock()
                run(length)
                best[name] = min(best[name], clock() - begin)
    return {name: (long[name] - short[name]) / tokens for name in runs}


if __name__ == "__main__":
    main()
