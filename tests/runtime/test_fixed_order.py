"""Nothing that a model computes on a GPU depends on the order of threads: the same bits twice."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime import exchange
from runtime import functional as F
from runtime import gradients as G
from tests.support.fixed_order import FixedOrder, NoOrder
from tests.support.trained import MASK, built, trainer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(seed))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, twice: x.index_add(0, twice, x),
        lambda x, twice: x.index_copy(0, twice, x),
        lambda x, twice: x.scatter_add(0, twice.unsqueeze(1), x),
        lambda x, twice: x.scatter(0, twice.unsqueeze(1), x),
        lambda x, twice: x.index_put((twice,), x),
        lambda x, twice: x.index_put_((twice,), x),
        lambda x, twice: x.cumsum(0),
        lambda x, twice: twice.bincount(x[:, 0]),
        lambda x, twice: x.median(0),
    ],
)
def test_what_is_found(call: Callable[[Tensor, Tensor], Any]) -> None:
    with FixedOrder(), pytest.raises(NoOrder, match="on a GPU its result has no fixed order"):
        call(random(3, 2), torch.tensor([0, 2, 0]))


def test_what_is_harmless() -> None:
    x, once, twice = random(3, 2), torch.tensor([2, 0, 1]), torch.tensor([0, 2, 0])
    with FixedOrder():
        x.index_add(0, once, x).scatter_add(0, once.unsqueeze(1), x).index_put((once,), x)
        x.index_put((twice,), x, accumulate=True).scatter(0, twice.unsqueeze(1), 1.0)
        once.scatter_add(0, twice, once).cumsum(0).bincount()


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, gradients: Any) -> None:
    """Attention without the kernels that torch has for the CPU alone."""
    monkeypatch.setattr(gradients, "_has_flash", lambda q: False)


KINDS: list[dict[str, Any]] = [
    {},
    {"window": 4},
    {"mask": lambda q, k: (q - k) % 3 != 1},
    {"softcap": 2.0},
    {"sinks": random(4)},
    {"selected": torch.tensor([[max(0, i - 2), i, -1] for i in range(9)]).expand(2, -1, -1)},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "".join(kind) or "causal")
def test_gradients_of_attention(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without a kernel, two heads at a time: those of the CPU."""
    q, k, v, d = random(2, 9, 4, 8), random(2, 9, 2, 8), random(2, 9, 2, 6), random(2, 9, 4, 6)
    position = torch.arange(9).sub(torch.tensor([[0], [4]])).remainder(9)
    saved = G.attention_saving(q, k, v, 0.3, **kind)
    expected = G.attention_grad(d, q, k, v, *saved, 0.3, **kind)
    packed = G.document_attention_saving(q, k, v, position, 0.3, **kind)
    expected += G.document_attention_grad(d, q, k, v, position, *packed, 0.3, **kind)
    as_on_a_gpu(monkeypatch, G)
    monkeypatch.setattr(G, "SCORES", 2 * 81)
    with FixedOrder():
        saved = G.attention_saving(q, k, v, 0.3, **kind)
        found = G.attention_grad(d, q, k, v, *saved, 0.3, **kind)
        packed = G.document_attention_saving(q, k, v, position, 0.3, **kind)
        found += G.document_attention_grad(d, q, k, v, position, *packed, 0.3, **kind)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_gradients_of_packed_sequences() -> None:
    """Tokens after the last sequence have none."""
    q, k, v, d = random(9, 4, 8), random(9, 2, 8), random(9, 2, 6), random(9, 4, 6)
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    with FixedOrder():
        o, lse = G.attention_varlen_saving(q, k, v, starts, starts, 4, 0.3)
        found = G.attention_varlen_grad(d, q, k, v, o, lse, starts, starts, 4, 0.3)
    for start, end in ((0, 3), (3, 7)):
        parts = [t[None, start:end] for t in (d, q, k, v, o, lse)]
        for one, other in zip(found, G.attention_grad(*parts, 0.3), strict=True):
            assert torch.allclose(one[start:end], other[0], atol=1e-6)
    assert not any(one[7:].any() for one in found)


def test_gradients_of_no_tokens() -> None:
    none, starts = random(0, 4, 8), torch.zeros(2, dtype=torch.int32)
    o, lse = G.attention_varlen_saving(none, none, none, starts, starts, 4, 0.3)
    found = G.attention_varlen_grad(o, none, none, none, o, lse, starts, starts, 4, 0.3)
    assert all(one.shape == none.shape for one in found)


def test_other_gradients() -> None:
    d, tokens = random(3, 5, 8).bfloat16(), torch.tensor([[1, 1, 0, 3, 1]]).expand(3, -1)
    index = random(6, 8).topk(2).indices
    rows, offs, order = F.permute(random(6, 4), index, 8)
    parts = random(2, 5, 3, 4), random(2, 5, 3, 4), random(2, 5, 2, 4), random(2, 5, 4)
    selected = torch.tensor([[0, i] if i else [0, -1] for i in range(5)]).expand(2, -1, -1)
    with FixedOrder():
        table = G.embedding_grad(d, tokens, 6)
        G.grouped_parameter_grad(rows, offs)
        G.permute_grad(rows, order, index)
        G.unpermute_grad(random(6, 4), rows, order, random(6, 2))
        G.cross_entropy_grad(torch.ones(()), random(5, 7), torch.tensor([0, 3, -100, 3, 1]))
        G.indexer_loss_grad(torch.ones(()), *parts, random(2, 5, 2), selected, 0.5)
    expected = torch.zeros(6, 8).index_add_(0, tokens.flatten(), d.flatten(0, 1).float())
    assert torch.equal(table, expected.bfloat16())


def test_rows_of_several_ranks_are_added_rank_by_rank() -> None:
    tokens, rows = torch.tensor([0, 2, 1, 2, 0, 2]), random(6, 4).bfloat16()
    handle = exchange.Handle(tokens, [2, 0, 2, 2], [], torch.Size([1, 3]))
    with FixedOrder():
        found = exchange.Exchange._summed(None, rows, handle)  # type: ignore[arg-type]
    two = rows[1] + rows[3] + rows[5]
    assert torch.equal(found[0], torch.stack([rows[0] + rows[4], rows[2], two]))


@pytest.mark.parametrize("policy", ["fp8_blockwise", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_model(policy: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of training, a prompt, and answers of the engine."""
    name = f"ordered_{policy}"
    package = built(tmp_path, name, precision__policy=policy, **MASK)
    runtime = sys.modules
    as_on_a_gpu(monkeypatch, runtime[f"{name}.runtime.gradients"])
    one = trainer(package)
    with FixedOrder():
        one.step()
        model, position = one.model, torch.arange(7).expand(2, -1)
        cache = runtime[f"{name}.runtime.cache"].Cache(2, 8)
        with torch.no_grad():
            model.prefill(position, position, cache)
            model.decode(position[:, :1], position[:, 6:] + 1, cache)
        model.generate([[1, 5, 9], [2]], max_new_tokens=4)
