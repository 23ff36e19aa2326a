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
from pathlib import Path
from typing import Any

from backends.build import build
from dsl.load import load

ROOT = Path(__file__).parent.parent
SPEC = ROOT / "specs" / "deepseek_v3_mini.yaml"
DATA = ROOT / "data" / "tinyshakespeare.txt"
NAME = "mini_overhead"
GOAL = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of everything around a training step.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save-every", type=int, default=20)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(load(SPEC, sets=[f"train.steps={asked.steps}"]), folder / NAME)
        sys.path.insert(0, name)
        package = importlib.import_module(NAME)
        rates: dict[str, list[float]] = {"bare": [], "run": []}
        for round in range(asked.rounds):
            rates["bare"].append(asked.steps / bare(package, asked.steps))
            out = folder / f"run{round}"
            rates["run"].append(asked.steps / whole(package, out, asked.save_every))
    medians = {kind: statistics.median(found) for kind, found in rates.items()}
    for kind, found in rates.items():
        shown = ", ".join(f"{rate:.3f}" for rate in found)
        print(f"{kind:5} {medians[kind]:.3f} steps a second ({shown})")
    share = medians["run"] / medians["bare"]
    verdict = "reached" if share >= GOAL else "missed"
    print(f"the run is {share:.1%} as fast; goal {GOAL:.0%}: {verdict}")


def bare(package: Any, steps: int) -> float:
    """Seconds of steps on one batch."""
    train = importlib.import_module(f"{NAME}.runtime.train.command")
    settings = train.Settings.of(package.config)
    model = package.Model()
    optimizer = importlib.import_module(f"{NAME}.runtime.train.optimizer").AdamW(
        model, settings.optimizer
    )
    torch = sys.modules["torch"]
    shape = (settings.batch_at(0, 0), settings.sequence_length + 1)
    tokens = torch.randint(package.config.params.vocab_size, shape)
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        model.loss(tokens[:, :-1], tokens[:, 1:]).total.backward()
        optimizer.collect()
        optimizer.step(step, 1e-4, optimizer.squares())
    return time.perf_counter() - begin


def whole(package: Any, out: Path, save_every: int) -> float:
    """Seconds that `dslc train` takes for its steps, without evaluation."""
    run = importlib.import_module(f"{NAME}.runtime.train.run")
    options = run.Options(out, (DATA,), held_out=0.0, save_every=save_every)
    one = run.Run(package.Model, options)
    begin = time.perf_counter()
    one.train()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
