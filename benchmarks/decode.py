"""Tokens a second of greedy decoding with a cache on the CPU, against transformers in one run.

Run it with `python benchmarks/decode.py` from the repository's root. Ratios carry over to other
machines, rates do not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peer import pair, seconds

PROMPT, NEW = 64, 64


def main() -> None:
    prompt = torch.randint(4096, (1, PROMPT), generator=torch.manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        model, peers = pair(dtype)

        def theirs(peer: Any) -> None:
            peer.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None)

        rate = NEW / seconds(partial(model.generate, prompt, NEW, eos_token_id=None), repeats=3)
        rates = {
            name: NEW / seconds(partial(theirs, peer), repeats=3) for name, peer in peers.items()
        }
        best = max(rates, key=lambda name: rates[name])
        words = ", ".join(f"{name} {value:,.0f}" for name, value in rates.items())
        print(f"{dtype}: dslc {rate:,.0f} tokens/s; transformers {words}")
        print(f"{dtype}: {rate / rates[best]:.2f} x the best of transformers ({best})")


if __name__ == "__main__":
    main()
