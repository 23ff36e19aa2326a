"""What data, metrics and checkpoints cost `dslc train`: its rate against that of bare steps.

Run it with `python benchmarks/train_overhead.py` from the repository's root, on a quiet machine. A
bare step is forward, loss, backward and AdamW on a batch that is there already. The run writes
metrics at every step and a checkpoint every `--save-every` steps. Both take turns.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backends.build import build
from dsl.load import load

ROOT = Path(__file__).parent.parent
SPEC = ROOT / "specs" / "deepseek_v3_mini.yaml"
DATA = ROOT / "data" / "tinyshakespeare.txt"
NAME = "mini_overhead"
GOAL = 0.95
Seconds = tuple[float, float]
"""Of the clock, and of CPU time: the latter means something on a busy machine, too."""


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of everything around a training step.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(load(SPEC, sets=[f"train.steps={asked.steps}", *asked.set]), folder / NAME)
        sys.path.insert(0, name)
        package = importlib.import_module(NAME)
        times: dict[str, list[Seconds]] = {"bare": [], "run": []}
        for round in range(asked.rounds):
            times["bare"].append(bare(package, asked.steps))
            times["run"].append(whole(package, folder / f"run{round}", asked.save_every))
    tokens = (
        asked.steps * package.config.train.batch.value_at(0) * package.config.train.sequence_length
    )
    for kind, found in times.items():
        rates = (tokens / statistics.median(part) for part in zip(*found, strict=True))
        wall, cpu = rates
        print(f"{kind:5} {wall:9,.0f} tokens a second, {cpu:9,.0f} a second of CPU time")
    for i, clock in enumerate(("second", "second of CPU time")):
        bare_time, run_time = (statistics.median(t[i] for t in times[k]) for k in ("bare", "run"))
        share = bare_time / run_time
        verdict = "reached" if share >= GOAL else "missed"
        print(f"in a {clock} the run does {share:.1%} of it; goal {GOAL:.0%}: {verdict}")


def timed(work: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def bare(package: Any, steps: int) -> Seconds:
    """Steps on one batch."""
    train = importlib.import_module(f"{NAME}.runtime.train.command")
    settings = train.Settings.of(package.config)
    model = package.Model()
    optimizer = importlib.import_module(f"{NAME}.runtime.train.optimizer").AdamW(
        model, settings.optimizer
    )
    torch = sys.modules["torch"]
    shape = (settings.batch_at(0, 0), settings.sequence_length + 1)
    tokens = torch.randint(package.config.params.vocab_size, shape)

    def steps_on_it() -> None:
        for step in range(1, steps + 1):
            model.loss(tokens[:, :-1], tokens[:, 1:]).total.backward()
            optimizer.collect()
            optimizer.step(step, 1e-4, optimizer.squares())

    return timed(steps_on_it)


def whole(package: Any, out: Path, save_every: int) -> Seconds:
    """What `dslc train` takes for its steps, without evaluation."""
    run = importlib.import_module(f"{NAME}.runtime.train.run")
    options = run.Options(out, (DATA,), held_out=0.0, save_every=save_every)
    one = run.Run(package.Model, options)
    return timed(one.train)


if __name__ == "__main__":
    main()
