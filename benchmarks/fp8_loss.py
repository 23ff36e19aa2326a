"""Loss of the small V3 in FP8 and in BF16 over 2,000 steps, from the same weights on the same data.

Run it with `python benchmarks/fp8_loss.py` from the repository's root: an hour and a half on two
cores, most of it FP8, which a CPU only simulates. Interrupted, it goes on where it stopped. A third
run is in BF16 with two micro-batches a step: the same sums in another order, so that what differs
there is chance, which any other order of sums would give as well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from dslc.trained import using_run

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data" / "tinyshakespeare.txt"
PICTURE = ROOT / "docs" / "fp8_loss.png"
STEPS = 2000
TOKENS = STEPS * 12 * 256  # batch and sequence_length of the spec
SMOOTHING = 0.9  # of the report's figure 10
GOAL = 0.25  # percent, the report's section 3.3
RUNS = {
    "bf16": [],
    "bf16_micro": ["--set", "train.micro_batch=6"],
    "fp8": ["--set", "precision.policy=fp8_blockwise"],
}


def train(folder: Path, options: Sequence[str]) -> list[float]:
    """The main loss of each step of a run, which is made, or made to its end, if it is not there.

    Raises SystemExit if it fails.
    """
    words = ["train", "deepseek_v3_mini", "--data", str(DATA), "--out", str(folder)]
    words += ["--set", f"train.tokens={TOKENS}", "--save-every", "100", *options]
    if subprocess.run([sys.executable, "-m", "dslc", *words], cwd=ROOT, check=False).returncode:
        raise SystemExit(f"{folder} was not trained")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["main"] for record in map(json.loads, lines) if "main" in record]


def held_out(run: Path, computed_by: Path) -> float:
    """The loss of a run's weights on all of the held-out text, by the model of another run."""
    with using_run(computed_by) as (command, model):
        return float(command.evaluate(model, run, average=False).loss)


def smoothed(losses: Sequence[float]) -> list[float]:
    return list(accumulate(losses, lambda mean, x: SMOOTHING * mean + (1 - SMOOTHING) * x))


def percent(losses: Sequence[float], peer: Sequence[float]) -> list[float]:
    return [100 * (ours / theirs - 1) for ours, theirs in zip(losses, peer, strict=True)]


def tell(name: str, differences: Sequence[float]) -> None:
    """The figures of a curve of differences, over all steps and over the second half of them."""
    for what, part in (("all steps", differences), ("second half", differences[STEPS // 2 :])):
        within = sum(abs(d) < GOAL for d in part) / len(part)
        mean = sum(part) / len(part)
        print(
            f"{name:22} {what:12} mean {mean:+.3f} %, largest {max(part, key=abs):+.3f} %, "
            f"within {GOAL} % in {within:.1%} of the steps"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains in FP8 and in BF16, and compares.")
    parser.add_argument("--runs", type=Path, default=ROOT / "build" / "fp8_loss", metavar="FOLDER")
    folder = parser.parse_args().runs
    curves = {name: smoothed(train(folder / name, words)) for name, words in RUNS.items()}
    fp8 = percent(curves["fp8"], curves["bf16"])
    chance = percent(curves["bf16_micro"], curves["bf16"])
    tell("FP8 against BF16", fp8)
    tell("BF16 in another order", chance)
    tell("FP8 against that", percent(curves["fp8"], curves["bf16_micro"]))
    ours = held_out(folder / "bf16", computed_by=folder / "fp8")
    theirs = held_out(folder / "bf16", computed_by=folder / "bf16")
    print(
        f"weights trained in BF16, held-out loss computed in FP8: {ours:.4f}, in BF16: {theirs:.4f}"
        f" ({100 * (ours / theirs - 1):+.3f} %)"
    )
    draw(curves, fp8, chance)
    print(f"wrote {PICTURE.relative_to(ROOT)}")


def draw(
    curves: dict[str, list[float]], differences: Sequence[float], chance: Sequence[float]
) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    above: Any
    below: Any
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 5.5))
    above.plot(curves["bf16"], label="BF16", color="#1f5fa8", linewidth=1)
    above.plot(curves["fp8"], label="FP8", color="#c2571a", linewidth=1)
    above.set(ylabel=f"main loss, nats a byte\n(EMA {SMOOTHING})", ylim=(1.2, 3.2))
    below.plot(chance, label="BF16 in another order of sums", color="#999999", linewidth=1)
    below.plot(differences, label="FP8", color="#c2571a", linewidth=1)
    below.set(xlabel="step", ylabel="against BF16, percent", ylim=(-1, 2.4))
    for goal in (-GOAL, GOAL):
        below.axhline(goal, color="#333333", linestyle="--", linewidth=0.8)
    above.legend(loc="upper right", frameon=False)
    below.legend(loc="lower right", frameon=False)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()
