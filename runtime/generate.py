"""Generation: prefill of the prompt, then decoding of one token at a time from the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from .cache import Cache
from .config import Config, end_tokens


class Decoder(Protocol):
    """What generation needs of a model."""

    @property
    def config(self) -> Config: ...
    @property
    def device(self) -> torch.device: ...
    def prefill(self, tokens: Tensor, position: Tensor, cache: Cache) -> Tensor: ...
    def decode(self, tokens: Tensor, position: Tensor, cache: Cache) -> Tensor: ...


@torch.inference_mode()
def generate(
    model: Decoder,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | Literal["config"] | None = "config",
) -> Tensor:
    """The int64 prompts [batch, seq] with up to `max_new_tokens` more: [batch, seq + new].

    `temperature` 0 is greedy (of equals the lowest id); above, tokens are sampled from the
    smallest set of tokens that holds `top_p` of the probability, the same each time for the same
    `seed`. A sequence that reached `eos_token_id`, or one of several, is padded with it (the
    first) until all have ended; None never ends, "config" is that of the spec. Prompts have equal
    lengths: there is no padding.

    Raises ValueError for invalid tokens or settings, FloatingPointError for logits that are NaN or
    infinite.
    """
    _check(model, tokens, max_new_tokens, temperature, top_p)
    if eos_token_id == "config":
        eos_token_id = end_tokens(model.config)
    ends = [eos_token_id] if isinstance(eos_token_id, int) else [*(eos_token_id or ())]
    eos = torch.tensor(ends, dtype=torch.int64, device=tokens.device)
    batch, start = tokens.shape
    cache = Cache(batch, start + max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    ended = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
    text, new = tokens, tokens
    while text.shape[1] < start + max_new_tokens and not ended.all():
        first = text.shape[1] - new.shape[1]
        position = torch.arange(first, text.shape[1], device=tokens.device).expand(batch, -1)
        step = model.decode if new.shape[1] == 1 else model.prefill
        logits = step(new, position, cache)
        if not logits.isfinite().all():
            raise FloatingPointError(f"the logits are NaN or infinite at token {text.shape[1]}")
        chosen = (
            _sample(logits, temperature, top_p, generator) if temperature else logits.argmax(-1)
        )
        if ends:
            chosen = chosen.masked_fill(ended, ends[0])
            ended |= torch.isin(chosen, eos)
        new = chosen.unsqueeze(-1)
        text = torch.cat((text, new), dim=1)
    return text.clone()


def _sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token id for each row of logits [batch, vocab].

    By inverting the cumulative distribution at a number drawn on the CPU, so that a seed means
    the same on every device.
    """
    score = logits.double()
    score = (score - score.amax(-1, keepdim=True)) / temperature
    probability, order = score.softmax(-1).sort(dim=-1, descending=True, stable=True)
    total = probability.cumsum(-1)
    kept = (total - probability < top_p).sum(-1, keepdim=True).clamp(min=1)
    mass = total.gather(-1, kept - 1)
    drawn = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    rank = torch.searchsorted(total, drawn.to(logits.device) * mass)
    return order.gather(-1, rank.clamp(max=kept - 1)).squeeze(-1)


def _check(
    model: Decoder, tokens: Tensor, max_new_tokens: int, temperature: float, top_p: float
) -> None:
    is_tensor = isinstance(tokens, Tensor)
    if not is_tensor or tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.numel() == 0:
        found = (
            f"{tokens.dtype} {list(tokens.shape)}" if is_tensor else f"a {type(tokens).__name__}"
        )
        raise ValueError(f"tokens must be int64 [batch, seq] with at least one token, got {found}")
    if model.device.type == "meta":
        raise ValueError("the model has no weights yet (device='meta'): load some first")
    vocab, low, high = model.config.params.vocab_size, int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise ValueError(f"token ids must be from 0 to {vocab - 1}, got {low} to {high}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
    longest, length = model.config.sequence.max_position_embeddings, tokens.shape[1]
    if length + max_new_tokens > longest:
        raise ValueError(
            f"{length} tokens and {max_new_tokens} new ones exceed max_position_embeddings "
            f"({longest}): max_new_tokens can be {max(longest - length, 0)} at most"
        )
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
