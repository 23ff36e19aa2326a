"""A built model and transformers' model of the same numbers and weights, for fair comparisons.

What `train_step.py` and `decode.py` share: their options, the models, and a race in which all take
turns, so that whatever else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3ForCausalLM
from transformers.utils import logging

from backends.build import build
from dsl.load import Description, load

FOLDER = Path(__file__).parent
SIZES = {"10M": FOLDER / "v3_10m.yaml", "100M": FOLDER / "v3_100m.yaml"}
FOR_VLLM = {"serve": FOLDER / "v3_serve.yaml"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# How transformers may compute experts; the fastest counts. Its batched_mm copies the weights for
# every token: a fortieth of the speed in training, and never the best in decoding.
EXPERTS = ("grouped_mm", "eager")


@dataclass(frozen=True)
class Peer:
    """Transformers' model with one way to compute experts; `compiled` by torch.compile or not."""

    name: str
    model: Any
    compiled: bool


@dataclass(frozen=True)
class Match:
    """One comparison: a size and a precision, our model, and the peers with the same weights."""

    size: str
    dtype: torch.dtype
    description: Description
    ours: Any
    peers: list[Peer]
    weights: Path

    @property
    def title(self) -> str:
        return f"{self.size} {str(self.dtype).removeprefix('torch.')}"


def options(about: str, vllm: bool = False, quantized: bool = False) -> argparse.Namespace:
    """What the command line asks for; without any flag, everything. `vllm` may take part, and
    models of ours with quantized weights."""
    parser = argparse.ArgumentParser(description=about)
    sizes = SIZES | (FOR_VLLM if vllm else {})
    parser.add_argument("--size", nargs="+", choices=sizes, default=list(SIZES))
    if vllm:
        parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of a vLLM for CPUs")
    if quantized:
        parser.add_argument(
            "--weights", nargs="+", choices=["int8"], default=[], help="quantized weights, too"
        )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=list(EXPERTS))
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each of them takes")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, for a machine busy with other work"
    )
    parser.add_argument(
        "--least", action="store_true", help="the least time of all turns instead of the median"
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences that are decoded at once")
    parser.add_argument("--profile", action="store_true", help="where our time goes, by operator")
    return parser.parse_args()


def matches(asked: argparse.Namespace) -> Iterator[Match]:
    """A match for each size and precision that was asked for."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for size in asked.size:
        for dtype in asked.dtype:
            yield _match(size, DTYPES[dtype], asked)


def _match(size: str, dtype: torch.dtype, asked: argparse.Namespace) -> Match:
    folder = Path(tempfile.mkdtemp())
    package = f"v3_{size.lower()}_{str(dtype).rpartition('.')[2]}"
    description = load((SIZES | FOR_VLLM)[size], sets=["precision.policy=bf16", f"model={package}"])
    build(description, folder / package, cpu=True)
    sys.path.insert(0, str(folder))
    ours = importlib.import_module(package).Model(dtype=dtype, seed=0)
    ours.save(folder / "weights")
    peers = []
    for name in asked.experts:
        model = DeepseekV3ForCausalLM.from_pretrained(
            folder / "weights", dtype=dtype, experts_implementation=name
        )
        peers.append(Peer(name, model, compiled=False))
        if not asked.no_compile:
            peers.append(Peer(f"{name} compiled", model, compiled=True))
    return Match(size, dtype, description, ours, peers, folder / "weights")


def race(runs: Mapping[str, Callable[[], object]], asked: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each call, or the least. All take turns, after two that do not count.

    Who fails in the first turn is left out, and the reason printed.
    """
    clock = time.process_time if asked.cpu_time else time.perf_counter
    left = {name: run for name, run in runs.items() if _works(name, run)}
    times: dict[str, list[float]] = {name: [] for name in left}
    for turn in range(asked.rounds + 1):
        for name, run in left.items():
            start = clock()
            run()
            if turn:
                times[name].append(clock() - start)
    middle = min if asked.least else statistics.median
    return {name: middle(seconds) for name, seconds in times.items()}


def _works(name: str, run: Callable[[], object]) -> bool:
    start = time.perf_counter()
    try:
        run()
    except Exception as error:
        print(f"  {name} does not work: {type(error).__name__}: {str(error).splitlines()[0]}")
        return False
    if name.endswith("compiled"):
        print(f"  {name}: {time.perf_counter() - start:.0f} s to compile", flush=True)
    return True


def report(seconds: Mapping[str, float], tokens: int) -> float:
    """Prints each one's tokens a second; gives our ratio to the best peer, the first of ours."""
    rates = {name: tokens / value for name, value in seconds.items()}
    ours = [name for name in rates if name.startswith("dslc")]
    best = max((name for name in rates if name not in ours), key=lambda name: rates[name])
    for name, rate in rates.items():
        print(f"  {name:24} {rate:10,.0f} tokens/s" + (", the best peer" if name == best else ""))
    for name in ours:
        print(f"  {name} to the best peer {rates[name] / rates[best]:10.2f}")
    return rates[ours[0]] / rates[best]


def profile(run: Callable[[], object]) -> None:
    """Prints where the time of a call goes, by torch's operators."""
    run()
    with torch.profiler.profile() as record:
        run()
    print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
