"""How good a model is on text that it was not trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import LanguageModel
from .sequences import HeldOut
from .tokenizer import Tokenizer
from .trainer import losses_of


@dataclass(frozen=True)
class Evaluation:
    """Means over `tokens` predicted tokens."""

    loss: float
    """Nats a token, of the next token."""
    mtp: tuple[float, ...]
    """The same of each depth of multi-token prediction."""
    bits_per_byte: float
    """Comparable between tokenizers."""
    acceptance: tuple[float, ...]
    """Of each depth: how often its best token is the main model's, given the same text."""
    tokens: int


@torch.no_grad()
def evaluate(
    model: LanguageModel, text: HeldOut, tokenizer: Tokenizer, batch: int, limit: int | None = None
) -> Evaluation:
    """Losses on all sequences, or on `limit` of them that lie evenly in the text."""
    count = min(text.count, limit or text.count)
    chosen = [i * text.count // count for i in range(count)]
    sums = torch.zeros(3)
    agreed: list[Tensor] = []
    labels: list[int] = []
    for first in range(0, count, batch):
        tokens = torch.stack([text[i] for i in chosen[first : first + batch]]).to(model.device)
        values = losses_of(model.loss(tokens[:, :-1], tokens[:, 1:])) * len(tokens) / count
        sums = values if first == 0 else sums + values
        labels += tokens[:, 1:].flatten().tolist()
        if model.config.architecture.mtp.depth:
            agreed.append(_agreement(model, tokens[:, :-1]) * len(tokens) / count)
    _, loss, _, *mtp = sums.tolist()
    size = len(tokenizer.decode(labels).encode())
    return Evaluation(
        loss=loss,
        mtp=tuple(mtp),
        bits_per_byte=loss * len(labels) / math.log(2) / max(size, 1),
        acceptance=tuple(torch.stack(agreed).sum(0).tolist()) if agreed else (),
        tokens=len(labels),
    )


def _agreement(model: LanguageModel, tokens: Tensor) -> Tensor:
    """[depths]: depth k at position i and the main model at i + k predict the same token."""
    output = model(tokens)
    best = output.logits.argmax(-1)
    return torch.stack(
        [
            (later.argmax(-1) == best[:, k:]).double().mean()
            for k, later in enumerate(output.mtp_logits, 1)
        ]
    )
