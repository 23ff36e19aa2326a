"""A mask between documents, against transformers' model that is given the same mask."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from backends.build import build
from dsl.load import load
from tests.support.oracle import GRADIENTS, LOGITS, Pair, import_package, relative_rms

LENGTHS = ((9, 1, 22), (3, 17, 12))


def documents() -> tuple[Tensor, Tensor]:
    """Positions [batch, seq], and what transformers adds to scores [batch, 1, seq, seq]."""
    position = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    masks = [torch.block_diag(*(torch.ones(n, n).tril() for n in row)) for row in LENGTHS]
    added = torch.zeros(len(LENGTHS), 1, *masks[0].shape)
    return position, added.masked_fill(torch.stack(masks).unsqueeze(1) == 0, -torch.inf)


def test_scores_and_gradients_within_documents(pair: Pair, tmp_path: Path) -> None:
    name = f"{pair.package.__name__}_masked"
    spec = pair.checkpoint / f"{pair.package.__name__}.yaml"
    sets = ["train.document_mask=true", "sequence.eos_token_id=0"]
    build(load(spec, sets=sets), tmp_path / name)
    model = import_package(tmp_path / name, name).Model(dtype=torch.float32)
    model.load(pair.checkpoint)
    position, added = documents()
    theirs = pair.reference.model(pair.tokens, attention_mask=added, position_ids=position).logits
    with torch.no_grad():
        assert relative_rms(model(pair.tokens, position).logits, theirs) <= LOGITS
        assert relative_rms(pair.model(pair.tokens, position).logits, theirs) > 100 * LOGITS

    for _, module in pair.reference.modules():
        module.zero_grad()
    wanted = pair.labels != -100
    score = theirs.log_softmax(-1).gather(-1, pair.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    (-score[wanted].mean()).backward()
    expected = {n: g for n, g in pair.reference.published(grad=True).items() if g.numel()}
    model.loss(pair.tokens, pair.labels, position).main.backward()
    published = sys.modules[f"{name}.runtime.weights"].published
    found = {part.name: part.grad for part in published(model)}
    for weight, gradient in expected.items():
        assert relative_rms(found[weight], gradient) <= GRADIENTS, weight
