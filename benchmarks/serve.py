"""Tokens a second of many requests on the CPU: the engine against transformers in one run.

Run it with `python benchmarks/serve.py` from the repository's root; `--help` lists how to run less.
Requests of different lengths are there at once. The engine computes them together, with the bits
that each has alone; transformers has two ways: one request after the other, and all in one batch,
padded on the left. Ratios carry over to other machines, rates do not.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peer import Match, matches, options, profile, race, report

REQUESTS, LENGTHS, NEW = 48, (64, 256), 64


def main() -> None:
    asked = options("Many requests on the CPU: tokens a second against transformers.")
    for match in matches(asked):
        first, last = LENGTHS
        print(
            f"{match.title}: {REQUESTS} requests of {first} to {last} tokens, {NEW} new ones each",
            flush=True,
        )
        rng, vocab = random.Random(0), match.ours.config.params.vocab_size
        prompts = [
            [rng.randrange(2, vocab) for _ in range(rng.randint(*LENGTHS))] for _ in range(REQUESTS)
        ]
        ours = partial(serve, match, prompts)
        if asked.profile:
            profile(ours)
            continue
        runs: dict[str, Callable[[], object]] = {"dslc": ours}
        runs["dslc, one at a time"] = partial(serve, match, prompts, max_requests=1)
        for peer in match.peers:
            if not peer.compiled:
                runs[f"{peer.name} in turn"] = partial(in_turn, peer.model, prompts)
                runs[f"{peer.name} padded"] = partial(padded, peer.model, prompts)
        report(race(runs, asked), REQUESTS * NEW)


def serve(match: Match, prompts: list[list[int]], max_requests: int = 64) -> None:
    """By the engine of the built package."""
    serving = f"{type(match.ours).__module__.partition('.')[0]}.runtime.serve"
    engine_of = importlib.import_module(f"{serving}.engine").Engine
    settings = importlib.import_module(f"{serving}.options").Options(
        max_requests=max_requests, max_model_len=LENGTHS[1] + NEW, prefix_cache=False
    )
    sampling = importlib.import_module(f"{serving}.request").Sampling(max_tokens=NEW)
    engine_of(match.ours, settings).generate([(prompt, sampling) for prompt in prompts])


def in_turn(model: Any, prompts: list[list[int]]) -> None:
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        generate(model, tokens, torch.ones_like(tokens))


def padded(model: Any, prompts: list[list[int]]) -> None:
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for i, prompt in enumerate(prompts):
        tokens[i, -len(prompt) :], mask[i, -len(prompt) :] = torch.tensor(prompt), 1
    generate(model, tokens, mask)


def generate(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )


if __name__ == "__main__":
    main()
