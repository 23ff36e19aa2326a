"""A run that is killed (SIGKILL) at 50 random moments ends with the weights of one that is not.

Run it with `python benchmarks/killed.py` from the repository's root; `--kills` makes it shorter. A
small model saves at every step, so that many kills hit a checkpoint that is being written.
Exits with 1 if a single bit differs.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

from backends.build import build
from dsl.load import load

ROOT = Path(__file__).parent.parent
SPEC = ROOT / "specs" / "deepseek_v3_tiny.yaml"
DATA = ROOT / "data" / "tinyshakespeare.txt"
NAME = "tiny_killed"
STEPS_A_KILL = 4
SETS = [
    "params.hidden_size=32",
    "architecture.layers.1.repeat=1",
    "train.learning_rate=[{until_step: 20, start: 0, value: 3e-3}, {value: 3e-3}]",
    "train.sequence_length=32",
    "train.batch=[{until: 4K, start: 2, value: 8}, {value: 8}]",
    "train.micro_batch=4",
    "train.ema=0.9",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills a run at random moments.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = STEPS_A_KILL * asked.kills + 2
        build(load(SPEC, sets=[*SETS, f"train.steps={steps}"]), folder / NAME)
        whole, killed = folder / "whole", folder / "killed"
        finish(folder, whole)
        chance = random.Random(asked.seed)
        writing = sum(kill(folder, killed, chance) for _ in range(asked.kills))
        finish(folder, killed)
        differing = compare(whole, killed, steps)
    print(f"{asked.kills} kills in {steps} steps, {writing} while a checkpoint was being written")
    print(f"tensors that differ from those of the undisturbed run: {len(differing)}")
    sys.exit(1 if differing else 0)


def start(folder: Path, run: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"{NAME}.train", "--data", str(DATA), "--out", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    quiet = subprocess.DEVNULL
    return subprocess.Popen([*command, "--save-every", "1"], env=environment, stderr=quiet)


def finish(folder: Path, run: Path) -> None:
    if start(folder, run).wait():
        sys.exit("a run failed: see its message with PYTHONPATH and -m as above")


def kill(folder: Path, run: Path, chance: random.Random) -> bool:
    """Kills the run some time after it has made a step; whether it was writing then."""
    before = saved(run)
    process = start(folder, run)
    while saved(run) <= before and process.poll() is None:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.2))
    process.kill()
    process.wait()
    return any(run.glob("checkpoints/.step-*"))


def saved(run: Path) -> int:
    """The newest step that was saved."""
    return max((int(p.name[5:]) for p in run.glob("checkpoints/step-*")), default=0)


def compare(a: Path, b: Path, step: int) -> list[str]:
    """Names of the tensors of the last checkpoint whose bytes differ."""
    place = Path("checkpoints") / f"step-{step:08d}"
    differing = []
    for file in sorted((a / place).rglob("*.safetensors")):
        other = load_file(b / file.relative_to(a))
        for name, tensor in load_file(file).items():
            if tensor.numpy().tobytes() != other[name].numpy().tobytes():
                differing.append(f"{file.parent.name}/{name}")
    return differing


if __name__ == "__main__":
    main()
