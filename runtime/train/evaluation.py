"""Evaluation on held-out text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

from ..model import LanguageModel
from .parallel import MeshTrainer
from .sequences import ValidationSet, count_labels, inputs_and_labels, positions
from .tokenizer import Tokenizer
from .trainer import loss_of, losses_of


@dataclass(frozen=True)
class Evaluation:
    """Means over `tokens` predicted tokens."""

    loss: float
    """Nats per token, for the next token."""
    mtp: tuple[float, ...]
    """The same for each depth of multi-token prediction."""
    bits_per_byte: float
    """Comparable between tokenizers."""
    acceptance: tuple[float, ...]
    """For each depth, the fraction of tokens whose best prediction is that of the main model."""
    tokens: int


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    text: ValidationSet,
    tokenizer: Tokenizer,
    batch: int,
    limit: int | None = None,
    group: ProcessGroup | None = None,
    pipeline: MeshTrainer | None = None,
) -> Evaluation:
    """Losses on all sequences, or on `limit` of them at even distances.

    They are dealt out to the ranks of `group`, all of which get the result. With `pipeline` its
    data ranks evaluate, and there is no acceptance: no rank has the logits of the whole model.
    """
    rank, ranks = (group.rank(), group.size()) if group else (0, 1)
    if pipeline is not None:
        rank, ranks = pipeline.rank, pipeline.ranks
    count = min(text.count, limit or text.count)
    chosen = [i * text.count // count for i in range(count)]
    depth = model.config.architecture.mtp.depth
    both = 1 if pipeline is not None else 2
    labels = max(1, sum(count_labels(text[i][None]) for i in chosen))
    sums = torch.zeros(3 + both * depth, dtype=torch.float64, device=model.device)
    for start in range(0, count, ranks * batch):
        first = start + rank * batch
        part = chosen[first : first + batch]
        if not part and pipeline is None:
            break
        # Ranks that exchange tokens compute equally often; what is beyond the text counts nothing.
        tokens = torch.stack([text[i] for i in part or chosen[:1]]).to(model.device)
        if pipeline is not None:
            values = pipeline.losses(tokens)
        else:
            values = losses_of(loss_of(model, tokens))
        if depth and pipeline is None:
            values = torch.cat([values, _agreement(model, inputs_and_labels(tokens)[0])])
        sums += values * (count_labels(tokens) if part else 0) / labels
    if group is not None:
        all_reduce(sums, group=group)
    _, loss, _, *depths = sums.tolist()
    predicted = [token for i in chosen for token in text[i][1:].tolist() if token >= 0]
    size = len(tokenizer.decode(predicted).encode())
    return Evaluation(
        loss=loss,
        mtp=tuple(depths[:depth]),
        bits_per_byte=loss * len(predicted) / math.log(2) / max(size, 1),
        acceptance=tuple(depths[depth:]),
        tokens=len(predicted),
    )


def _agreement(model: LanguageModel, tokens: Tensor) -> Tensor:
    """[depths]: depth k at position i and the main model at i + k predict the same token."""
    output = model(tokens, positions(tokens, model.config))
    best = output.logits.argmax(-1)
    return torch.stack(
        [
            (later.argmax(-1) == best[:, k:]).double().mean()
            for k, later in enumerate(output.mtp_logits, 1)
        ]
    )
