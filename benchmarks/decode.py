"""Tokens a second of greedy decoding with a cache on the CPU, against transformers in one run.

Run it with `python benchmarks/decode.py` from the repository's root; `--help` lists how to run
less. Ratios carry over to other machines, rates do not. Transformers decodes in three ways: by its
own `generate`, by a bare loop around the model, and by that loop around the compiled model with a
cache of fixed size, which keeps shapes equal from step to step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peer import Peer, matches, options, profile, race, report
from torch import Tensor
from transformers import DynamicCache, StaticCache

BATCH, PROMPT, NEW = 1, 64, 64


def main() -> None:
    asked = options("Greedy decoding on the CPU: tokens a second against transformers.")
    for match in matches(asked):
        print(f"{match.title}, {NEW} tokens after {PROMPT}, batch {BATCH}", flush=True)
        vocab = match.ours.config.params.vocab_size
        prompt = torch.randint(vocab, (BATCH, PROMPT), generator=torch.manual_seed(0))
        ours = partial(match.ours.generate, prompt, NEW, eos_token_id=None)
        if asked.profile:
            profile(ours)
            continue
        runs: dict[str, Callable[[], object]] = {"dslc": ours}
        for peer in match.peers:
            if not peer.compiled:
                runs[f"{peer.name} generate"] = partial(generate, peer.model, prompt)
            runs[f"{peer.name} loop"] = partial(loop, peer, step_of(peer), prompt)
        report(race(runs, asked), BATCH * NEW)


def generate(model: Any, prompt: Tensor) -> Tensor:
    text: Tensor = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return text


def step_of(peer: Peer) -> Any:
    return torch.compile(peer.model, dynamic=False) if peer.compiled else peer.model


@torch.inference_mode()
def loop(peer: Peer, step: Any, prompt: Tensor) -> Tensor:
    """The prompt in one step, always eager, and each further token in one more."""
    config = peer.model.config
    cache = DynamicCache(config=config)
    if peer.compiled:
        cache = StaticCache(config=config, max_cache_len=PROMPT + NEW)
    text, new, model = prompt, prompt, peer.model
    while text.shape[1] < PROMPT + NEW:
        position = torch.arange(text.shape[1] - new.shape[1], text.shape[1]).unsqueeze(0)
        logits = model(new, past_key_values=cache, position_ids=position).logits
        new = logits[:, -1:].argmax(-1)
        text, model = torch.cat((text, new), 1), step
    return text


if __name__ == "__main__":
    main()
