"""Loss of the tiny V3 in FP8 and in BF16, from the same weights on the same data, step by step.

Run it with `python benchmarks/fp8_loss.py` from the repository's root (some minutes on one core).
It prints the difference of the smoothed curves and draws both to docs/fp8_loss.svg. Weights are
bfloat16 in both; the optimizer changes float32 copies of them, as in the report (section 3.3.1).
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends.build import build
from dsl.load import load

ROOT = Path(__file__).parent.parent
SPEC = ROOT / "specs" / "deepseek_v3_tiny.yaml"
DATA = ROOT / "data" / "tinyshakespeare.txt"
PICTURE = ROOT / "docs" / "fp8_loss.svg"
BATCH, SEQ, STEPS = 8, 64, 300
LR, WARM_UP = 5e-4, 30
SMOOTHING = 0.9
GOAL = 0.25  # percent


def model(policy: str) -> Any:
    """A model whose weights follow from the seed and their names, and not from the policy."""
    folder = Path(tempfile.mkdtemp())
    build(load(SPEC, sets=[f"precision.policy={policy}"]), folder / f"tiny_{policy}")
    sys.path.insert(0, str(folder))
    return importlib.import_module(f"tiny_{policy}").Model(dtype=torch.bfloat16, seed=0)


def batches() -> list[Tensor]:
    """Bytes as tokens: [STEPS][BATCH, SEQ + 1]."""
    text = torch.frombuffer(bytearray(DATA.read_bytes()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(text) - SEQ - 1, (STEPS, BATCH), generator=generator)
    return [torch.stack([text[s : s + SEQ + 1] for s in step.tolist()]) for step in starts]


def train(policy: str, data: list[Tensor]) -> list[float]:
    """The main loss of each step, of the batch before the weights see it."""
    net = model(policy)
    weights = list(net.parameters())
    masters = [w.detach().float() for w in weights]
    optimizer = torch.optim.AdamW(masters, lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step, tokens in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARM_UP)
        net.zero_grad()
        loss = net.loss(tokens[:, :-1], tokens[:, 1:])
        loss.total.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
        losses.append(loss.main.item())
    return losses


def smoothed(losses: list[float]) -> list[float]:
    found = [losses[0]]
    for loss in losses[1:]:
        found.append(SMOOTHING * found[-1] + (1 - SMOOTHING) * loss)
    return found


def main() -> None:
    data = batches()
    curves = {}
    for policy in ("bf16", "fp8_blockwise"):
        start = time.perf_counter()
        curves[policy] = smoothed(train(policy, data))
        seconds = time.perf_counter() - start
        print(f"{policy}: {curves[policy][-1]:.4f} after {STEPS} steps, {seconds:.0f} s")
    pairs = zip(curves["bf16"], curves["fp8_blockwise"], strict=True)
    differences = [100 * (fp8 / bf16 - 1) for bf16, fp8 in pairs]
    largest = max(differences, key=abs)
    print(f"FP8 against BF16: {largest:+.3f} % at most, {differences[-1]:+.3f} % at the end")
    print(f"goal: within {GOAL} %: {'reached' if abs(largest) < GOAL else 'missed'}")
    PICTURE.write_text(picture(curves, differences, largest), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")


# ---- the picture ----------------------------------------------------------------------------

WIDTH, LEFT, RIGHT = 720, 60, 20
COLOURS = {"bf16": "#1f5fa8", "fp8_blockwise": "#c2571a"}


def picture(curves: dict[str, list[float]], differences: list[float], largest: float) -> str:
    """Both curves, and below them their difference in percent."""
    low, high = 0.5 * int(2 * min(map(min, curves.values()))), max(map(max, curves.values()))
    losses = [line(values, low, high, 30, 280, COLOURS[name]) for name, values in curves.items()]
    marks = [low + 0.5 * i for i in range(int((high - low) / 0.5) + 1)]
    scale = 1.2 * max(GOAL, abs(largest))
    goals = [line([y, y], -scale, scale, 330, 450, "#999", "4 4") for y in (GOAL, -GOAL)]
    labels = [
        text(LEFT, 20, "main loss, nats a byte, smoothed (EMA 0.9): BF16 blue, FP8 orange"),
        text(LEFT, 320, f"FP8 / BF16 - 1, percent; dashed: {GOAL} %"),
        text(LEFT, 472, "step 0"),
        text(WIDTH - RIGHT, 472, f"step {STEPS}", "end"),
        *(text(LEFT - 8, height(m, low, high, 30, 280), f"{m:.1f}", "end") for m in marks),
        *(text(LEFT - 8, height(m, -scale, scale, 330, 450), f"{m:+.2f}", "end")
          for m in (-GOAL, 0.0, GOAL)),
    ]  # fmt: skip
    difference = line(differences, -scale, scale, 330, 450, "#333")
    zero = line([0.0, 0.0], -scale, scale, 330, 450, "#ccc")
    parts = "\n".join([*labels, *losses, zero, *goals, difference])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 480" font-size="12"'
    return (
        f'{head} font-family="sans-serif">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        f"{parts}\n</svg>\n"
    )


def height(value: float, low: float, high: float, top: int, bottom: int) -> float:
    return round(bottom - (value - low) / (high - low) * (bottom - top), 1)


def line(
    values: list[float], low: float, high: float, top: int, bottom: int, colour: str, dash: str = ""
) -> str:
    step = (WIDTH - LEFT - RIGHT) / (len(values) - 1)
    points = " ".join(
        f"{LEFT + i * step:.1f},{height(v, low, high, top, bottom)}" for i, v in enumerate(values)
    )
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{points}" fill="none" stroke="{colour}"{dashes}/>'


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'


if __name__ == "__main__":
    main()
