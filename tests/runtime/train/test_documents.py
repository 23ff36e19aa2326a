"""A mask between documents: where positions begin, and that all of training goes by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from runtime.config import Config
from runtime.train.prepare import end_of_document
from runtime.train.sequences import positions
from tests.support.trained import EOS, MASK, built, part, trainer

MASKED = Config({"train": {"document_mask": True}, "sequence": {"eos_token_id": EOS}})


@given(st.lists(st.lists(st.sampled_from([EOS, 1, 2]), min_size=9, max_size=9), min_size=1))
def test_positions_begin_anew_behind_each_end(rows: list[list[int]]) -> None:
    found = positions(torch.tensor(rows), MASKED)
    assert found is not None
    for row, counted in zip(rows, found.tolist(), strict=True):
        expected = 0
        for i, token in enumerate(row):
            assert counted[i] == expected
            expected = 0 if token == EOS else expected + 1


def test_of_several_ends_the_first_is_that_of_documents() -> None:
    config = Config({"train": {"document_mask": True}, "sequence": {"eos_token_id": (EOS, 2)}})
    tokens = torch.tensor([[1, 2, 1, EOS, 1]])
    assert torch.equal(positions(tokens, config), torch.tensor([[0, 1, 2, 3, 0]]))
    assert end_of_document(config) == EOS
    assert end_of_document(Config({"sequence": {"eos_token_id": None}})) is None


def test_without_a_mask_a_model_counts_by_itself() -> None:
    config = Config({"train": {"document_mask": False}, "sequence": {"eos_token_id": EOS}})
    assert positions(torch.tensor([[1, EOS, 2]]), config) is None


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return built(tmp_path_factory.mktemp("masked"), "tiny_masked", **MASK)


def text(one: Any, count: int) -> Tensor:
    """The first sequences of training, in which documents end."""
    tokens = torch.stack([one.sequences[i] for i in range(count)])
    assert (tokens == EOS).any()
    return tokens


def test_a_step_is_that_of_the_masked_loss(masked: Any) -> None:
    one, model = trainer(masked, seed=1), masked.Model(seed=1)
    tokens = text(one, 6)
    position = positions(tokens[:, :-1], MASKED)
    losses = [model.loss(tokens[:, :-1], tokens[:, 1:], p) for p in (position, None)]
    losses[0].total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    did = one.step()
    assert did.total == pytest.approx(losses[0].total.item(), rel=1e-6)
    assert did.mtp == pytest.approx([t.item() for t in losses[0].mtp], rel=1e-6)
    assert did.gradient_norm == pytest.approx(float(norm), rel=1e-4)
    assert did.main != pytest.approx(losses[1].main.item(), rel=1e-6)  # as without the mask


def test_an_evaluation_masks_too(masked: Any) -> None:
    one = trainer(masked)
    tokens = text(one, 3)
    module = part(masked, "evaluation")
    held_out = part(masked, "sequences").ValidationSet(list(tokens), 16)
    tokenizer = part(masked, "tokenizer").Bytes()
    found = module.evaluate(one.model, held_out, tokenizer, 2)
    position = positions(tokens[:, :-1], MASKED)
    with torch.no_grad():
        expected = one.model.loss(tokens[:, :-1], tokens[:, 1:], position)
        output = one.model(tokens[:, :-1], position)
    assert found.loss == pytest.approx(expected.main.item(), rel=1e-6)
    (later,) = output.mtp_logits
    agreed = later.argmax(-1) == output.logits.argmax(-1)[:, 1:]
    assert found.acceptance == pytest.approx([float(agreed.double().mean())])


def test_what_is_not_finite_is_looked_for_with_the_mask(masked: Any) -> None:
    """A second look at the batch sees what the first one did."""
    one, seen = trainer(masked), []
    loss = one.model.loss

    def watched(tokens: Tensor, labels: Tensor, position: Tensor | None, tokens_seen: int) -> Any:
        seen.append(position)
        return loss(tokens, labels, position, tokens_seen)

    one.model.loss = watched
    with torch.no_grad():
        one.model.lm_head.weight.fill_(torch.finfo(torch.float32).max)
    with pytest.raises(part(masked, "trainer").NotFinite):
        one.step()
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) == 3 and all(map(torch.equal, first, second))
    assert all(
        (p == positions(text(one, 6)[2 * i : 2 * i + 2, :-1], MASKED)).all()
        for i, p in enumerate(first)
    )
