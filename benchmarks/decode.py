"""Tokens a second of greedy decoding with a cache on the CPU, against transformers in one run.

Run it with `python benchmarks/decode.py` from the repository's root; `--help` lists how to run
less. Ratios carry over to other machines, rates do not. Transformers decodes in three ways: by its
own `generate`, by a bare loop around the model, and by that loop around the compiled model with a
cache of fixed size, which keeps shapes equal from step to step. Of ours there are `generate`, and a
loop around the step in C++ (`--target cpu`), beside the time that reading its weights takes; with
`--weights int8`, the same loop with weights in int8.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peer import Peer, matches, options, profile, race, report
from torch import Tensor
from transformers import DynamicCache, StaticCache

PROMPT, NEW = 64, 64


def main() -> None:
    about = "Greedy decoding on the CPU: tokens a second against transformers."
    asked = options(about, quantized=True)
    for match in matches(asked):
        batch = asked.batch
        print(f"{match.title}, {NEW} tokens after {PROMPT}, batch {batch}", flush=True)
        vocab = match.ours.config.params.vocab_size
        prompt = torch.randint(vocab, (batch, PROMPT), generator=torch.manual_seed(0))
        ours = partial(match.ours.generate, prompt, NEW, eos_token_id=None)
        if asked.profile:
            profile(ours)
            continue
        runs: dict[str, Callable[[], object]] = {"dslc": ours}
        ours_by_name = {"dslc C++": match.ours}
        for form in asked.weights:
            held = type(match.ours)(device="meta", dtype=match.dtype, weights=form)
            held.load(match.weights)
            ours_by_name[f"dslc C++ {form}"] = held
        for name, model in ours_by_name.items():
            steps, parts = compiled_steps(model)
            runs[name] = partial(paged, steps, parts, prompt)
        for peer in match.peers:
            if not peer.compiled:
                runs[f"{peer.name} generate"] = partial(generate, peer.model, prompt)
            runs[f"{peer.name} loop"] = partial(loop, peer, step_of(peer), prompt)
        times = race(runs, asked)
        report(times, batch * NEW)
        if batch == 1:
            for name, model in ours_by_name.items():
                read, seconds = floor(model)
                token = times[name] / NEW
                print(f"  a token by {name}, with its share of the prompt: {token * 1e3:.2f} ms")
                print(f"  reading {read / 1e6:.1f} MB, its weights: {seconds * 1e3:.2f} ms")


def compiled_steps(model: Any) -> tuple[Any, Any]:
    """The compiled programs of a model, and the module `pages` of its package."""
    runtime = f"{type(model).__module__.partition('.')[0]}.runtime"
    steps = importlib.import_module(f"{runtime}.compiled").served(model)
    if steps is model:
        raise SystemExit("the step was not compiled")
    return steps, importlib.import_module(f"{runtime}.pages")


@torch.inference_mode()
def paged(steps: Any, pages: Any, prompt: Tensor, page: int = 64) -> Tensor:
    """The prompts in one step, and a token of each in every further one."""
    batch, each = len(prompt), -(-(PROMPT + NEW) // page)
    cache = pages.Pages(batch * each + 1, page)
    blocks = [list(range(1 + i * each, 1 + (i + 1) * each)) for i in range(batch)]
    text, new = prompt, prompt
    while text.shape[1] < PROMPT + NEW:
        first, rows = text.shape[1] - new.shape[1], new.shape[1]
        ends = [(i + 1) * rows - 1 for i in range(batch)]
        step, position = pages.make_rows([(b, first, rows) for b in blocks], ends, page)
        cache.begin(step)
        new = steps.decode(new.reshape(1, -1), position, cache).argmax(-1, keepdim=True)
        text = torch.cat((text, new), 1)
    return text


def floor(model: Any, turns: int = 50) -> tuple[float, float]:
    """Bytes of weights that one row reads, and the least seconds in which torch reads as many."""
    params, read = model.config.params, 0.0
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        share = params.num_experts_per_tok / params.n_routed_experts if weight.dim() == 3 else 1
        read += 0 if "embed_tokens" in name else share * weight.nbytes
    size = int(read)
    # Ones, for zeros are pages that were never written and all lie in the same place.
    like, times = torch.ones(size // 4), []
    for _ in range(turns):
        start = time.perf_counter()
        like.sum()
        times.append(time.perf_counter() - start)
    return size, min(times)


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
