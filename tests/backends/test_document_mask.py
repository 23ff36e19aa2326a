"""Packed documents with a mask between them are computed as each of them alone.

Documents alone are rows of a batch for the same model without a mask, padded behind their end with
tokens that nothing before them sees.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backends.build import build
from dsl.load import load
from tests.support.places import TINY

DEPTH = 2
VOCAB = 512
COMMON = f"vocab_size: {VOCAB}, hidden_size: 32, num_attention_heads: 4, intermediate_size: 48"
EXPERTS = "n_routed_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 16"
SIZES = {
    "MLA": "q_lora_rank: 16, kv_lora_rank: 12, qk_nope_head_dim: 8, qk_rope_head_dim: 4, "
    "v_head_dim: 8",
    "MHA": "head_dim: 8",
    "GQA": "head_dim: 8, num_key_value_heads: 2",
}


def sets(attention: str, feed_forward: str = "DeepSeekMoE") -> tuple[str, ...]:
    """Changes of the tiny spec: a dense layer and one like the two MTP modules'."""
    experts = f", {EXPERTS}" if feed_forward == "DeepSeekMoE" else ""
    layers = [f"attention: {attention}, feed_forward: {one}" for one in ("SwiGLU", feed_forward)]
    return (
        "blocks=[causal_lm, decoder, mla, mha, gqa, swiglu, deepseek_moe, mtp]",
        f"params={{{COMMON}, {SIZES[attention]}{experts}}}",
        f"architecture.layers=[{', '.join(f'{{repeat: 1, {layer}}}' for layer in layers)}]",
        f"architecture.mtp={{depth: {DEPTH}, {layers[1]}}}",
        # Over all tokens of a sequence, whatever their document.
        "train.loss.balance_alpha=0",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


@cache
def model(
    folder: Path,
    mask: bool,
    changes: tuple[str, ...],
    skip: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
) -> Any:
    """A model whose experts are not alike."""
    name = f"documents_{len(list(folder.iterdir()))}"
    changes = (f"train.document_mask={str(mask).lower()}", *changes)
    build(load(TINY, sets=changes), folder / name, skip=skip)
    sys.path.insert(0, str(folder))
    one = importlib.import_module(name).Model(dtype=dtype, seed=3)
    sys.path.remove(str(folder))
    with torch.no_grad():
        for parameter in one.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return one


class Packed:
    """Documents of random tokens, one behind another: [1, sum of lengths]; and each alone."""

    def __init__(self, lengths: Sequence[int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        total, longest = sum(lengths), max(lengths) + DEPTH
        self.starts = [0, *accumulate(lengths)][:-1]
        self.lengths = lengths
        self.tokens = torch.randint(VOCAB, (1, total), generator=generator)
        self.labels = torch.randint(VOCAB, (1, total), generator=generator)
        self.position = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
        # What would be the labels of positions that know of two documents.
        for start in self.starts:
            self.labels[:, start : start + DEPTH] = -100
        self.alone = torch.randint(VOCAB, (len(lengths), longest), generator=generator)
        self.alone_labels = torch.full_like(self.alone, -100)
        for row, (start, n) in enumerate(zip(self.starts, lengths, strict=True)):
            self.alone[row, :n] = self.tokens[0, start : start + n]
            self.alone_labels[row, :n] = self.labels[0, start : start + n]


def loss_and_gradients(model: Any, *inputs: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model.loss(*inputs)
    loss.total.backward()
    parts = [loss.total, loss.main, *loss.mtp]
    return [t.detach() for t in parts] + [p.grad.clone() for p in model.parameters()]


LOSSES = 2 + DEPTH


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


def close_gradients(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Each on its own scale. What is nothing beside the others is rounding: the gradient of a query
    that sees one key, whose probability is 1 whatever the score."""
    least = 1e-4 * max(float(t.norm()) for t in expected)
    pairs = zip(found, expected, strict=True)
    return all((a - b).norm() <= EXACT * max(float(b.norm()), least) for a, b in pairs)


# In float64, where only tables of rotary embedding are float32: those of MTP modules count from
# another token.
EXACT = 1e-6
LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=6)
SKIPS: list[tuple[str, ...]] = [(), ("recompute",), ("differentiate",)]


@pytest.mark.slow
@pytest.mark.parametrize("attention", SIZES)
def test_scores_are_those_of_each_document_alone(folder: Path, attention: str) -> None:
    masked, plain = (model(folder, mask, sets(attention)) for mask in (True, False))

    @given(LENGTHS, st.integers(0, 1000))
    @settings(max_examples=25)
    def one(lengths: list[int], seed: int) -> None:
        text = Packed(lengths, seed)
        with torch.no_grad():
            found, expected = masked(text.tokens, text.position), plain(text.alone)
        for row, (start, n) in enumerate(zip(text.starts, lengths, strict=True)):
            assert close(found.logits[0, start : start + n], expected.logits[row, :n])
            for depth, (mine, other) in enumerate(
                zip(found.mtp_logits, expected.mtp_logits, strict=True), 1
            ):
                within = max(0, n - depth)  # the others see the next document's tokens
                assert close(mine[0, start : start + within], other[row, :within])

    one()


@pytest.mark.slow
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("attention", SIZES)
def test_losses_and_gradients_are_those_of_each_document_alone(
    folder: Path, attention: str, skip: tuple[str, ...]
) -> None:
    """By the derived backward pass, with and without recomputation, and by torch's autograd."""
    masked = model(folder, True, sets(attention), skip, torch.float64)
    plain = model(folder, False, sets(attention), (), torch.float64)

    @given(LENGTHS.filter(lambda lengths: max(lengths) > DEPTH), st.integers(0, 1000))
    @settings(max_examples=15)
    def one(lengths: list[int], seed: int) -> None:
        text = Packed(lengths, seed)
        found = loss_and_gradients(masked, text.tokens, text.labels, text.position)
        expected = loss_and_gradients(plain, text.alone, text.alone_labels)
        assert torch.allclose(torch.stack(found[:LOSSES]), torch.stack(expected[:LOSSES]), EXACT)
        assert close_gradients(found[LOSSES:], expected[LOSSES:])

    one()


@pytest.mark.slow
@pytest.mark.parametrize("attention", SIZES)
def test_nothing_of_a_document_reaches_another(folder: Path, attention: str) -> None:
    """Not a bit, in scores and in gradients: of a dense model. Where there are experts, the number
    of tokens that each is given changes the order in which a product of its tokens sums."""
    masked = model(folder, True, sets(attention, "SwiGLU"))
    text = Packed((5, 9, 6))
    others = text.tokens.clone()
    others[:, :5] = (others[:, :5] + 1) % VOCAB
    others[:, 14:] = (others[:, 14:] + 1) % VOCAB
    labels = torch.full_like(text.labels, -100)
    labels[:, 5 + DEPTH : 14] = text.labels[:, 5 + DEPTH : 14]
    results = []
    for tokens in (text.tokens, others):
        with torch.no_grad():
            scores = masked(tokens, text.position)
        kept = [scores.logits[:, 5:14]]
        kept += [later[:, 5 : 14 - k] for k, later in enumerate(scores.mtp_logits, 1)]
        results.append([*kept, *loss_and_gradients(masked, tokens, labels, text.position)])
    assert all(map(torch.equal, *results))
    # The test sees what there is to see: without the mask all of it changes.
    plain = model(folder, False, sets(attention, "SwiGLU"))
    with torch.no_grad():
        before, after = (plain(t, text.position).logits[:, 5:14] for t in (text.tokens, others))
    assert not close(after, before, 1e-2)


@pytest.mark.slow
def test_a_sequence_without_an_end_is_computed_as_without_a_mask(folder: Path) -> None:
    """Positions are then 0, 1, 2, .., as when none are given; a document may also be cut later."""
    masked, plain = (model(folder, mask, sets("MLA")) for mask in (True, False))
    text = Packed((19,))
    with torch.no_grad():
        expected = plain(text.tokens)
        for found in (masked(text.tokens), masked(text.tokens, text.position + 7)):
            assert close(found.logits, expected.logits)
            assert all(map(close, found.mtp_logits, expected.mtp_logits))


def test_a_decoder_continues_one_document(folder: Path) -> None:
    masked = model(folder, True, sets("MLA"))
    plain = model(folder, False, sets("MLA"))
    prompt = Packed((9,)).tokens
    assert torch.equal(masked.generate(prompt, 12), plain.generate(prompt, 12))


FP8 = (
    "precision.policy=fp8_blockwise",
    "train.document_mask=true",
    "params.hidden_size=128",
    "params.intermediate_size=128",
)


@pytest.mark.slow
def test_in_fp8_nothing_of_a_document_reaches_another(folder: Path) -> None:
    """Scores of a dense model, whose casts go by token; and a step has finite gradients."""
    masked = model(folder, True, (*sets("MLA", "SwiGLU"), *FP8))
    text = Packed((5, 9, 6))
    others = text.tokens.clone()
    others[:, :5] = (others[:, :5] + 1) % VOCAB
    with torch.no_grad():
        a, b = (masked(t, text.position).logits[:, 5:] for t in (text.tokens, others))
    assert torch.equal(a, b)
    found = loss_and_gradients(masked, text.tokens, text.labels, text.position)
    assert all(t.isfinite().all() for t in found)
