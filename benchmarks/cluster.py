"""What of training on several ranks takes too long for CI: quality and speed of the small model.

Run it with `python benchmarks/cluster.py` from the repository's root, on a quiet machine with two
cores; it takes an hour or so. `--quick` only shows that it works, in a minute.

1. Quality: `deepseek_v3_mini` on four processes (2 pipeline x 2 expert ranks), one of which is
   killed halfway; it goes on as 4 expert ranks. Its loss on the held-out text has to be as near to
   that of one process as a second seed is.
2. Speed: tokens a second of two processes of one thread each, against one of two threads.

Exits with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.build import build
from dsl.load import load

ROOT = Path(__file__).parent.parent
SPEC = ROOT / "specs" / "deepseek_v3_mini.yaml"
DATA = ROOT / "data" / "tinyshakespeare.txt"
NAME = "mini_cluster"
GOAL = 0.9
QUICK = [
    "params.hidden_size=64", "params.vocab_size=256", "architecture.layers.1.repeat=1",
    "train.sequence_length=32", "precision.policy=fp32",
]  # fmt: skip
PATIENCE = 120.0
"""Seconds in which ranks end once one of them is killed."""


@dataclass(frozen=True)
class Layout:
    """Processes, what they share, and how many threads each has."""

    name: str
    processes: int = 1
    section: str = ""
    threads: int = 1


ONE = Layout("1 process, 2 threads", threads=2)
ALONE = Layout("1 process")
FOUR = Layout("2 pipeline x 2 expert", 4, "pipeline: 2, expert: 2")
OTHER = Layout("4 expert", 4, "pipeline: 1, expert: 4")
PAIRS = (
    Layout("2 data ranks", 2, "pipeline: 1, expert: 1"),
    Layout("2 expert", 2, "pipeline: 1, expert: 2"),
    Layout("2 pipeline", 2, "pipeline: 2, expert: 1"),
)


class Bench:
    """Builds packages for layouts, and trains them in a folder."""

    def __init__(self, folder: Path, changes: Sequence[str], length: int, batch: int) -> None:
        self.folder, self.changes, self.length, self.batch = folder, changes, length, batch

    def package(self, layout: Layout, steps: int) -> Path:
        """The folder of a package that trains so; built once."""
        place = self.folder / layout.name.replace(" ", "_").replace(",", "") / str(steps)
        if place.exists():
            return place
        sets = [*self.changes, f"model={NAME}", f"train.steps={steps}", "train.micro_batch=3"]
        if layout.section:
            cluster = self.folder / f"cluster_{layout.processes}.yaml"
            text = f"cluster: c\nnodes: 1\ngpus_per_node: {layout.processes}\n"
            cluster.write_text(text, encoding="utf-8")
            sets.append(
                f"parallel={{cluster: {cluster}, {layout.section}, batch: {self.batch}, "
                f"micro_batch: 3, sequence_length: {self.length}}}"
            )
        build(load(SPEC, sets=sets), place / NAME)
        return place

    def start(self, layout: Layout, steps: int, run: Path, *more: str) -> subprocess.Popen[bytes]:
        module = ["-m", f"{NAME}.train", "--data", str(DATA), "--out", str(run), *more]
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        launch = [*ranks, str(layout.processes)] if layout.processes > 1 else []
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.package(layout, steps)),
            "OMP_NUM_THREADS": str(layout.threads),
            # As dslc sets them: threads that wait leave the cores to others, but not at once.
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": "1000",
        }
        with (run.parent / f"{run.name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *launch, *module], env=environment, stdout=log, stderr=log
            )

    def train(self, layout: Layout, steps: int, run: Path, *more: str) -> Path:
        """A run to its end; ends the program if it fails."""
        return self.finish(layout, self.start(layout, steps, run, *more), run)

    def finish(self, layout: Layout, process: subprocess.Popen[bytes], run: Path) -> Path:
        if process.wait():
            log = (run.parent / f"{run.name}.log").read_text(encoding="utf-8")
            sys.exit(f"{layout.name} failed:\n{log[-3000:]}")
        return run

    def kill_one(self, layout: Layout, steps: int, run: Path, after: int, *more: str) -> int:
        """Kills a rank once `after` steps are made; the step of the newest checkpoint."""
        process = self.start(layout, steps, run, *more)
        while len(losses(run)) < after:
            if process.poll() is not None:
                sys.exit(f"{layout.name} ended before it was killed, see {run}.log")
            time.sleep(0.05)
        # The newest rank; pages of /proc are Linux.
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), 9)
        try:
            status = process.wait(PATIENCE)
        finally:
            process.kill()
        if not status:
            sys.exit(f"{layout.name} ended well although a rank was killed")
        saved = sorted(int(one.name.split("-")[1]) for one in run.glob("checkpoints/step-*"))
        if not saved:
            sys.exit(f"{layout.name} was killed before its first checkpoint")
        return saved[-1]


def losses(run: Path) -> list[Mapping[str, Any]]:
    """The records of its steps so far."""
    return [one for one in records(run) if "main" in one]


def records(run: Path) -> Iterator[Mapping[str, Any]]:
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        if line.endswith("}"):
            yield json.loads(line)


def held_out(run: Path) -> float:
    """Nats a token on all of the held-out text, at the end."""
    found: list[float] = [one["held_out"]["loss"] for one in records(run) if "held_out" in one]
    return found[-1]


def quality(bench: Bench, folder: Path, steps: int, save: int, share: float) -> bool:
    """Losses of one process with two seeds, and of four that are killed and go on otherwise."""
    often = ["--save-every", str(save), "--eval-every", str(steps), "--held-out", str(share)]
    runs = [folder / f"seed{seed}" for seed in (0, 1)]
    processes = [  # both at once: a thread each
        bench.start(ALONE, steps, run, "--seed", str(seed), *often) for seed, run in enumerate(runs)
    ]
    first, second = (
        held_out(bench.finish(ALONE, process, run))
        for process, run in zip(processes, runs, strict=True)
    )
    run = folder / "four"
    newest = bench.kill_one(FOUR, steps, run, steps // 2, "--seed", "0", *often)
    bench.train(OTHER, steps, run, *often)
    made = [one["step"] for one in losses(run)]
    four, spread = held_out(run), abs(first - second)
    apart = abs(four - first)
    print(f"\n{'loss on held-out text':58}{'nats':>8}{'from seed 0':>13}")
    for name, value in (
        ("1 process, seed 0", first),
        ("1 process, seed 1", second),
        (f"{FOUR.name}, killed, from step {newest} as {OTHER.name}", four),
    ):
        print(f"{name:58}{value:8.4f}{value - first:+13.4f}")
    ratio = apart / spread if spread else float("inf")
    whole = made == list(range(1, steps + 1))
    well = apart <= spread and whole
    print(f"difference over that of two seeds: {ratio:.2f}; goal 1: {verdict(well)}")
    return well


def speed(bench: Bench, folder: Path, steps: int, rounds: int) -> bool:
    """Tokens a second of two processes against one, in turns."""
    rates: dict[str, list[float]] = {}
    for turn in range(rounds):
        for layout in (ONE, *PAIRS):
            run = folder / f"speed_{layout.processes}_{layout.name.replace(' ', '_')}_{turn}"
            often = ["--save-every", str(steps), "--eval-every", str(steps)]
            bench.train(layout, steps, run, "--held-out", "0", *often)
            # The first steps make kernels and buffers.
            seconds = statistics.median(one["seconds"] for one in losses(run)[2:])
            rates.setdefault(layout.name, []).append(bench.batch * bench.length / seconds)
    one = statistics.median(rates[ONE.name])
    print(f"\n{'layout':58}{'tokens/s':>10}{'of one':>8}")
    best = 0.0
    for name, found in rates.items():
        rate = statistics.median(found)
        best = max(best, rate / one) if name != ONE.name else best
        print(f"{name:58}{rate:10,.0f}{rate / one:8.2f}")
    print(f"the fastest two processes: {best:.2f}; goal {GOAL}: {verdict(best >= GOAL)}")
    return best >= GOAL


def verdict(well: bool) -> str:
    return "reached" if well else "missed"


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality and speed of training on ranks.")
    parser.add_argument("--steps", type=int, default=1432, help="of each run [1432: 4.4M tokens]")
    parser.add_argument("--speed-steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison of speeds")
    parser.add_argument("--quick", action="store_true", help="a smoke test with a smaller model")
    parser.add_argument("--only", choices=["quality", "speed"])
    asked = parser.parse_args()
    print("training ..", flush=True)
    changes, length = ([], 256) if not asked.quick else (QUICK, 32)
    steps, short, rounds = asked.steps, asked.speed_steps, asked.rounds
    if asked.quick:
        steps, short, rounds = 12, 4, 1
    well = True
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), changes, length, batch=12)
        if asked.only != "speed":
            share = 0.002 if asked.quick else 0.1  # of the text is held out
            well &= quality(bench, Path(name), steps, max(1, steps // 12), share)
        if asked.only != "quality":
            well &= speed(bench, Path(name), short, rounds)
    sys.exit(0 if well or asked.quick else 1)


if __name__ == "__main__":
    main()
