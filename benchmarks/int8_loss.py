"""Held-out loss of the small V3 with weights in int8, against those in float32, by compiled steps.

Run it with `python benchmarks/int8_loss.py FOLDER` from the repository's root. It trains
`deepseek_v3_mini` on a part of its tokens (`--tokens`), which takes a few minutes on two cores, or
takes the run that is in FOLDER. Every number is computed as a server does it, text by text.
"""

from __future__ import annotations

import argparse
import importlib
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as torch_f
from torch import Tensor

from backends.build import build
from dsl.load import load

ROOT = Path(__file__).parent.parent
SPEC = ROOT / "specs" / "deepseek_v3_mini.yaml"
DATA = ROOT / "data" / "tinyshakespeare.txt"
PACKAGE, PAGE = "int8_loss_mini", 64
LENGTH = 256
"""Tokens of a text, as in training."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out loss of int8 weights.")
    parser.add_argument("run", type=Path, help="the run; trained if it is not there")
    parser.add_argument("--tokens", default="1M", help="tokens of the training [1M]")
    parser.add_argument("--texts", type=int, default=64, help="held-out texts of 256 tokens [64]")
    asked = parser.parse_args()
    if not asked.run.exists():
        words = ["train", "deepseek_v3_mini", "--data", str(DATA), "--out", str(asked.run)]
        words += ["--set", f"train.tokens={asked.tokens}"]
        subprocess.run([sys.executable, "-m", "dslc", *words], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as folder:
        build(load(SPEC, sets=[f"model={PACKAGE}"]), Path(folder) / PACKAGE, cpu=True)
        sys.path.insert(0, folder)
        model = importlib.import_module(PACKAGE).Model
        command = importlib.import_module(f"{PACKAGE}.runtime.train.command")
        record, _, checkpoint = command.open_run(asked.run)
        text = DATA.read_bytes()
        held_out = torch.tensor(list(text[-int(len(text) * record["held_out"]) :]))
        texts = held_out.unfold(0, LENGTH + 1, LENGTH)[: asked.texts]
        found = {}
        for form in (None, "int8"):
            served = model(device="meta", dtype=torch.float32, weights=form)
            served.load(command.weights_in(checkpoint, average=False))
            found[form] = loss_of(served, texts)
            size = sum(x.nbytes for x in (*served.parameters(), *served.buffers()))
            print(
                f"{form or 'float32':8} {found[form]:.5f} nats per byte, perplexity "
                f"{math.exp(found[form]):.4f}, {size / 1e6:.1f} MB"
            )
    print(f"perplexity {100 * (math.exp(found['int8'] - found[None]) - 1):+.3f} %")


@torch.inference_mode()
def loss_of(model: Any, texts: Tensor) -> float:
    """The mean loss of all tokens but the first of each text, in nats."""
    runtime = f"{PACKAGE}.runtime"
    steps = importlib.import_module(f"{runtime}.compiled").served(model)
    if steps is model:
        raise SystemExit("the step was not compiled")
    pages = importlib.import_module(f"{runtime}.pages")
    blocks = [*range(1, 1 + -(-LENGTH // PAGE))]
    total = 0.0
    for text in texts:
        cache = pages.Pages(1 + len(blocks), PAGE)
        rows, position = pages.make_rows([(blocks, 0, LENGTH)], range(LENGTH), PAGE)
        cache.begin(rows)
        logits = steps.decode(text[None, :-1], position, cache)
        total += float(torch_f.cross_entropy(logits, text[1:], reduction="sum"))
    return total / texts[:, 1:].numel()


if __name__ == "__main__":
    main()
