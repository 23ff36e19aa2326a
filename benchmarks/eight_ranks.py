"""8 ranks, 2 pipeline x 2 replicas x 2 experts, train what one process does.

    python benchmarks/eight_ranks.py [--schedule dualpipe] [--steps 3]

Builds a small DeepSeek-V3 for a cluster of 4 nodes of 2 processes, trains it by torchrun and once
more in one process, and compares losses, norms of gradients, loads of experts and all tensors of
the checkpoints. Exit status 1 where they differ by more than rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CLUSTER = "cluster: eight\nabout: 4 nodes of 2 processes\nnodes: 4\ngpus_per_node: 2\n"
MODEL = {
    "architecture.layers.1.repeat": "3",
    "params.hidden_size": "64",
    "params.n_routed_experts": "8",
    "params.num_experts_per_tok": "2",
    "params.n_group": "2",
    "params.topk_group": "1",
    "train.sequence_length": "32",
    "train.batch": "16",
    "train.micro_batch": "1",
    "train.learning_rate": "1e-3",
    "train.optimizer.eps": "1e-3",
}
METRICS = {"total": 1e-5, "main": 1e-5, "balance": 1e-5, "gradient_norm": 1e-5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedule", default="dualpipe")
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "eight.yaml").write_text(CLUSTER, encoding="utf-8")
        layout = (
            f"{{cluster: {folder / 'eight.yaml'}, pipeline: 2, expert: 2, batch: 16, "
            f"schedule: {given.schedule}, sequence_length: 32, micro_batch: 1}}"
        )
        steps = {"train.steps": str(given.steps)}
        ours = trained(folder / "eight", 8, {**MODEL, **steps, "parallel": layout})
        theirs = trained(folder / "one", 1, {**MODEL, **steps})
        wrong = [*metrics(ours, theirs), *tensors(ours, theirs, given.steps)]
    for line in wrong:
        print(line)
    print(
        f"{given.schedule}: "
        + (f"{len(wrong)} values differ" if wrong else "all as in one process")
    )
    return 1 if wrong else 0


def trained(out: Path, ranks: int, values: dict[str, str]) -> Path:
    """A run to its end."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    data = str(ROOT / "data" / "tinyshakespeare.txt")
    command = ["-m", "dslc", "train", "deepseek_v3_tiny", "--data", data, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *(launcher if ranks > 1 else []), *command, "--eval-sequences", "16"]
    subprocess.run([*words, *sets, "--held-out", "0"], check=True, env=environment, cwd=ROOT)
    return out


def metrics(ours: Path, theirs: Path) -> list[str]:
    """What differs in the metrics of each step."""

    def lines(out: Path) -> list[dict[str, Any]]:
        text = (out / "metrics.jsonl").read_text(encoding="utf-8")
        return [line for line in map(json.loads, text.splitlines()) if "total" in line]

    found = []
    for mine, other in zip(lines(ours), lines(theirs), strict=True):
        for name, most in METRICS.items():
            if abs(mine[name] - other[name]) > most * abs(other[name]):
                found.append(f"step {mine['step']}: {name} {mine[name]}, alone {other[name]}")
        if mine["experts"] != other["experts"]:
            found.append(f"step {mine['step']}: loads of experts")
    return found


def tensors(ours: Path, theirs: Path, step: int) -> list[str]:
    """Which tensors of the last checkpoint differ: weights and both moments."""
    from safetensors.torch import load_file

    def read(out: Path) -> dict[str, Any]:
        folder = out / "checkpoints" / f"step-{step:08d}"
        return {
            f"{file.parent.name}/{name}": tensor
            for file in folder.rglob("*.safetensors")
            for name, tensor in load_file(file).items()
        }

    mine, other = read(ours), read(theirs)
    found = [f"{name} is in one of them" for name in mine.keys() ^ other.keys()]
    for name in mine.keys() & other.keys():
        if not mine[name].allclose(other[name], rtol=1e-4, atol=2e-6):
            found.append(f"{name}: off by {(mine[name] - other[name]).abs().max():.2e}")
    return found


if __name__ == "__main__":
    sys.exit(main())
