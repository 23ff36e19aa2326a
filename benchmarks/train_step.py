"""Tokens a second of forward, loss and backward on the CPU, against transformers in one run.

Run it with `python benchmarks/train_step.py` from the repository's root. Ratios carry over to other
machines, rates do not. The peer's loss has no balance term; ours computes it and the experts' load.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peer import pair, seconds
from torch.nn.functional import cross_entropy

BATCH, SEQ = 8, 256


def main() -> None:
    tokens = torch.randint(4096, (BATCH, SEQ + 1), generator=torch.manual_seed(0))
    x, y = tokens[:, :-1], tokens[:, 1:]
    for dtype in (torch.float32, torch.bfloat16):
        model, peers = pair(dtype)

        def ours(model: Any = model) -> None:
            model.zero_grad()
            model.loss(x, y).total.backward()

        def theirs(peer: Any) -> None:
            peer.zero_grad()
            logits = peer(x, use_cache=False).logits
            cross_entropy(logits.float().flatten(0, 1), y.flatten()).backward()

        rate = BATCH * SEQ / seconds(ours)
        rates = {name: BATCH * SEQ / seconds(partial(theirs, peer)) for name, peer in peers.items()}
        best = max(rates, key=lambda name: rates[name])
        words = ", ".join(f"{name} {value:,.0f}" for name, value in rates.items())
        print(f"{dtype}: dslc {rate:,.0f} tokens/s; transformers {words}")
        print(f"{dtype}: {rate / rates[best]:.2f} x the best of transformers ({best})")


if __name__ == "__main__":
    main()
