"""Generation from Python: the engine of `serve/`, for prompts that are there all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .config import end_tokens
from .serve.engine import Decoder, Engine
from .serve.options import Options
from .serve.request import Sampling, Token

Show = Callable[[int, Token], None]
Prompts = Sequence[Sequence[int]]
Ends = int | Sequence[int] | Literal["config"] | None


def generate(
    model: Decoder,
    tokens: Tensor | Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    eos_token_id: Ends = "config",
    show: Show | None = None,
    speculate: int = 0,
    **settings: Any,
) -> Tensor | list[list[int]]:
    """The prompts with up to `max_new_tokens` more.

    Prompts are int64 [batch, seq], then so is the result [batch, seq + new], or lists of token ids
    of any lengths, then so are the results. `temperature` 0 is greedy (of equals the lowest id);
    above, tokens are sampled from the smallest set of tokens that holds `top_p` of the probability;
    `settings` are further fields of `Sampling`, as top_k, min_p, repetition_penalty. `seed` is one
    for each prompt, or the first of numbers that count up; a prompt's tokens depend on its own seed
    and on no other prompt. A text ends at `eos_token_id`, or one of several; None never ends,
    "config" is that of the spec. In a tensor ended rows are padded with it (the first) until all
    have ended. `show` gets the number of a prompt and each of its tokens as they come. `speculate`
    tokens are drafted by MTP modules.

    Raises ValueError for invalid tokens or settings, FloatingPointError for logits that are NaN or
    infinite.
    """
    prompts = _prompts(tokens)
    if eos_token_id == "config":
        eos_token_id = end_tokens(model.config)
    ends = [eos_token_id] if isinstance(eos_token_id, int) else [*(eos_token_id or ())]
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else [*seed]
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    given = {"temperature": temperature, "top_p": top_p, "end_tokens": frozenset(ends), **settings}
    try:
        samplings = [Sampling(max_new_tokens, seed=s, **given) for s in seeds]
    except TypeError as error:
        raise ValueError(f"generate(): {error}") from None
    longest = max(map(len, prompts))
    limit = model.config.sequence.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"{longest} tokens and {max_new_tokens} new ones exceed max_position_embeddings "
            f"({limit}): max_new_tokens can be {max(limit - longest, 0)} at most"
        )
    options = Options(
        max_model_len=longest + max_new_tokens,
        max_requests=min(len(prompts), Options.max_requests),
        prefix_cache=False,
        speculate=speculate,
    )
    engine = Engine(model, options)
    answers = engine.generate(list(zip(prompts, samplings, strict=True)), show)
    texts = [
        [*prompt, *(token.id for token in answer)]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    if not isinstance(tokens, Tensor):
        return texts
    most = max(map(len, texts))
    padded = [[*text, *ends[:1] * (most - len(text))] for text in texts]
    return torch.tensor(padded, device=tokens.device)


def _prompts(tokens: Tensor | Prompts) -> list[list[int]]:
    """Raises ValueError for what are no prompts."""
    if isinstance(tokens, Tensor):
        if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.numel() == 0:
            found = f"{tokens.dtype} {list(tokens.shape)}"
            raise ValueError(
                f"tokens must be int64 [batch, seq] with at least one token, got {found}"
            )
        rows: list[list[int]] = tokens.tolist()
        return rows
    prompts = [list(prompt) for prompt in tokens if not isinstance(prompt, int)]
    if not tokens or len(prompts) < len(tokens):
        raise ValueError("tokens must be prompts, each a list of token ids, or a tensor of them")
    for prompt in prompts:
        if any(type(id) is not int for id in prompt):
            raise ValueError("token ids must be ints")
    return prompts
