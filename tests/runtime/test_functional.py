"""The operators against the equations of the technical report, written out plainly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from runtime import functional as F
from runtime import gradients as G
from runtime import matmul

# Shapes and settings of DeepSeek-V3's gate.
V3_GATE = {"n_group": 8, "topk_group": 4, "k": 8, "group_score": "top2_sum"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def route(
    score: list[float], bias: list[float] | None, groups: int, keep: int, k: int, by: str
) -> tuple[list[int], list[float]]:
    """Numerics of the gate for one token, in Python."""
    t = [s + b for s, b in zip(score, bias or [0.0] * len(score), strict=True)]
    size = len(t) // groups

    def rank(g: int) -> float:
        best = sorted(t[g * size : (g + 1) * size], reverse=True)
        return sum(best[:2]) if by == "top2_sum" else best[0]

    kept = sorted(range(groups), key=lambda g: (-rank(g), g))[:keep]
    allowed = [i for i in range(len(t)) if i // size in kept]
    chosen = sorted(allowed, key=lambda i: (-t[i], i))[:k]
    return chosen, [score[i] for i in chosen]


def test_rms_norm_is_computed_in_float32_and_weighted_before_the_cast() -> None:
    x, weight = random(3, 512).bfloat16(), random(512, seed=1).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    result = F.rms_norm(x, weight, eps=1e-6)
    assert result.dtype == torch.bfloat16
    # One rounding only: the cast at the end.
    assert torch.equal(result, (weight.double() * exact).bfloat16())


def test_rms_norm_of_zeros_is_zero() -> None:
    assert torch.equal(F.rms_norm(torch.zeros(2, 4), torch.ones(4), eps=1e-6), torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_results_keep_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x, position = random(2, 3, 8).to(dtype), torch.arange(3).expand(2, -1)
    heads = random(2, 3, 2, 8).to(dtype)
    results = [
        F.silu(x),
        F.sigmoid(x),
        F.softmax(x),
        F.rms_norm(x, torch.ones(8, dtype=dtype), eps=1e-6),
        F.linear(x, random(4, 8).to(dtype)),
        F.rotate(x, *F.rope_table(position, dim=8, theta=1e4)),
        F.attention(heads, heads, heads, scale=1.0),
    ]
    assert {result.dtype for result in results} == {dtype}


def test_float64_is_not_rounded_to_float32() -> None:
    x = random(2, 64).double()
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    weight = torch.ones(64, dtype=torch.float64)
    assert (F.rms_norm(x, weight, eps=1e-6) - exact).abs().max() < 1e-14
    assert (F.softmax(x).sum(-1) - 1).abs().max() < 1e-15


def test_softmax_of_bfloat16_rounds_once() -> None:
    x = random(4, 256).bfloat16()
    assert torch.equal(F.softmax(x), torch.softmax(x.double(), -1).bfloat16())


def test_yarn_frequencies_are_those_of_v3() -> None:
    yarn = {
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
    }
    cos, sin = F.rope_table(torch.ones(1, 1), dim=64, theta=10000.0, **yarn)
    angle = torch.atan2(sin, cos)[0, 0]
    plain = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    assert torch.allclose(angle[:11], plain[:11], rtol=1e-6)
    assert torch.allclose(angle[23:], plain[23:] / 40, rtol=1e-5)
    known = {11: 0.03900693, 16: 0.0055, 22: 1.778279e-4}
    for i, expected in known.items():
        assert angle[i].item() == pytest.approx(expected, rel=1e-5)


def test_factor_1_is_plain_rope_and_tables_are_float32() -> None:
    position = torch.tensor([[0, 1, 5], [7, 2, 0]])
    cos, sin = F.rope_table(position, dim=8, theta=100.0)
    angle = position.unsqueeze(-1).double() * 100.0 ** (-torch.arange(0, 8, 2).double() / 8)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.allclose(cos.double(), angle.cos(), atol=1e-6)
    assert torch.allclose(sin.double(), angle.sin(), atol=1e-6)


def test_attention_factor_scales_the_tables() -> None:
    position = torch.arange(4).unsqueeze(0)
    plain = F.rope_table(position, dim=8, theta=100.0)
    loud = F.rope_table(position, dim=8, theta=100.0, attention_factor=1.5)
    assert all(torch.equal(a * 1.5, b) for a, b in zip(plain, loud, strict=True))


def test_rotate_multiplies_adjacent_pairs_as_complex_numbers() -> None:
    x = random(2, 5, 3, 8)
    table = F.rope_table(torch.arange(5).expand(2, -1), dim=8, theta=10000.0)
    turn = torch.complex(*table).unsqueeze(2)
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn).flatten(-2)
    assert torch.allclose(F.rotate(x, *table), expected, atol=1e-6)
    # Not bit for bit: torch fuses a product and a sum in some places of a row and not in others.
    assert torch.allclose(F.rotate(x[:, :, 1], *table), F.rotate(x, *table)[:, :, 1], atol=1e-6)


def test_rotated_products_depend_on_the_distance_only() -> None:
    q, k = random(1, 1, 64), random(1, 1, 64, seed=1)

    def product(i: int, j: int) -> float:
        tables = [F.rope_table(torch.tensor([[p]]), dim=64, theta=1e4) for p in (i, j)]
        return float((F.rotate(q, *tables[0]) * F.rotate(k, *tables[1])).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-3)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-2)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Equation 10, query by query, in float64."""
    queries, keys, share = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for i in range(queries):
            seen = keys - queries + i + 1
            for h in range(q.shape[2]):
                score = scale * (k[b, :seen, h // share].double() @ q[b, i, h].double())
                out[b, i, h] = score.softmax(0) @ v[b, :seen, h // share].double()
    return out


@pytest.mark.parametrize("v_dim", [4, 8, 12])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (6, 6), (1, 6), (3, 6)])
def test_attention_is_equation_10(queries: int, keys: int, kv_heads: int, v_dim: int) -> None:
    q, k = random(2, queries, 4, 8), random(2, keys, kv_heads, 8, seed=1)
    v = random(2, keys, kv_heads, v_dim, seed=2)
    result = F.attention(q, k, v, scale=0.7)
    assert result.shape == (2, queries, 4, v_dim)
    assert torch.allclose(result.double(), plain_attention(q, k, v, 0.7), atol=1e-5)


SCORES: list[dict[str, Any]] = [
    {"window": 1},
    {"window": 4},
    {"mask": lambda q, k: (q // 3 == k // 3) | (k < 1), "window": 5},
    {"softcap": 0.5},
]


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (1, 7), (3, 7)])
def test_a_query_sees_what_window_and_mask_say(
    queries: int, keys: int, scores: dict[str, Any]
) -> None:
    """One key after the other; positions count from the first key, whatever was cut away."""
    q, k = random(2, queries, 4, 8).double(), random(2, keys, 2, 8, seed=1).double()
    v = random(2, keys, 2, 6, seed=2).double()
    found = F.attention(q, k, v, 0.7, **scores)
    for i in range(queries):
        at = torch.tensor(keys - queries + i)
        mask = scores.get("mask", lambda q, k: torch.tensor(True))
        inside = range(max(0, int(at) - scores.get("window", keys) + 1), int(at) + 1)
        seen = [j for j in inside if mask(at, torch.tensor(j))]
        for h in range(4):
            score = 0.7 * torch.einsum("bd,bkd->bk", q[:, i, h], k[:, seen, h // 2])
            if cap := scores.get("softcap"):
                score = cap * torch.tanh(score / cap)
            expected = torch.einsum("bk,bke->be", score.softmax(-1), v[:, seen, h // 2])
            assert torch.allclose(found[:, i, h], expected, atol=1e-12)


def test_attention_refuses_queries_that_no_key_precedes() -> None:
    x = random(1, 3, 1, 4)
    with pytest.raises(ValueError, match="3 queries but only 2 keys"):
        F.attention(x, x[:, :2], x[:, :2], scale=1.0)


def test_attention_of_bfloat16_sums_in_float32() -> None:
    # 512 equal weights of 1/512: summed in bfloat16 they would stop growing at 1/2.
    v = torch.ones(1, 512, 1, 8, dtype=torch.bfloat16)
    result = F.attention(torch.zeros_like(v), torch.zeros_like(v), v, scale=1.0)
    assert torch.equal(result, v)


@pytest.mark.parametrize("by", ["top2_sum", "max"])
@pytest.mark.parametrize("bias", [None, random(256, seed=3) * 0.3])
def test_topk_groups_is_the_gate_of_v3(by: str, bias: Tensor | None) -> None:
    score = torch.sigmoid(random(50, 256))
    settings = V3_GATE | {"group_score": by, "normalize": True, "scale": 2.5}
    index, weight = F.topk_groups(score, bias, **settings)
    assert index.dtype == torch.int64 and index.shape == weight.shape == (50, 8)
    for token in range(50):
        listed = None if bias is None else bias.tolist()
        chosen, scores = route(score[token].tolist(), listed, 8, 4, 8, by)
        assert index[token].tolist() == chosen
        expected = [2.5 * s / sum(scores) for s in scores]
        assert weight[token].tolist() == pytest.approx(expected, rel=1e-6)


def test_the_two_group_scores_choose_differently() -> None:
    score = torch.tensor([[0.9, 0.0, 0.6, 0.6]])
    settings = {"n_group": 2, "topk_group": 1, "k": 1, "normalize": False, "scale": 1.0}
    assert F.topk_groups(score, None, group_score="max", **settings)[0].tolist() == [[0]]
    assert F.topk_groups(score, None, group_score="top2_sum", **settings)[0].tolist() == [[2]]


@pytest.mark.slow
@given(st.lists(st.sampled_from([0.25, 0.5, 0.75]), min_size=12, max_size=12), st.integers(1, 6))
def test_of_equal_scores_the_lowest_index_wins(score: list[float], k: int) -> None:
    for by in ("top2_sum", "max"):
        index, _ = F.topk_groups(
            torch.tensor([score]),
            None,
            n_group=4,
            topk_group=2,
            k=k,
            group_score=by,
            normalize=False,
            scale=1.0,
        )
        assert index[0].tolist() == route(score, None, 4, 2, k, by)[0]


def test_a_negative_bias_lets_no_expert_of_a_dropped_group_in() -> None:
    # All biased scores are below 0, where a mask of zero instead of -inf would win.
    score, bias = torch.sigmoid(random(100, 256)), torch.full((256,), -3.0)
    index, _ = F.topk_groups(score, bias, **V3_GATE, normalize=True, scale=1.0)
    for row, chosen in zip(score.tolist(), index.tolist(), strict=True):
        assert chosen == route(row, bias.tolist(), 8, 4, 8, "top2_sum")[0]


def test_weights_come_from_the_unbiased_score_and_keep_its_gradient() -> None:
    score = torch.tensor([[0.2, 0.4, 0.6, 0.8]], requires_grad=True)
    bias = torch.tensor([1.0, 1.0, 0.0, 0.0])
    index, weight = F.topk_groups(
        score,
        bias,
        n_group=1,
        topk_group=1,
        k=2,
        group_score="top2_sum",
        normalize=False,
        scale=2.0,
    )
    assert index.tolist() == [[1, 0]]
    assert weight.tolist() == [[pytest.approx(0.8), pytest.approx(0.4)]]
    weight.sum().backward()
    assert score.grad is not None and score.grad.tolist() == [[2.0, 2.0, 0.0, 0.0]]


def test_leading_dimensions_and_groups_of_one_expert_are_free() -> None:
    score = torch.sigmoid(random(2, 3, 4))
    settings = {"n_group": 4, "topk_group": 2, "k": 2, "normalize": False, "scale": 1.0}
    index, weight = F.topk_groups(score, None, group_score="top2_sum", **settings)
    assert index.shape == (2, 3, 2)
    assert torch.equal(weight, score.topk(2).values)


@pytest.mark.parametrize(("groups", "keep", "k"), [(3, 1, 1), (4, 2, 5)])
def test_experts_that_do_not_fit_are_refused(groups: int, keep: int, k: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        F.topk_groups(
            torch.ones(1, 8),
            None,
            n_group=groups,
            topk_group=keep,
            k=k,
            group_score="max",
            normalize=False,
            scale=1.0,
        )


def test_sequence_balance_loss_is_equations_17_to_20() -> None:
    score = torch.sigmoid(random(3, 20, 16)).requires_grad_()
    losses = []
    for sequence in score.double():
        chosen = sequence.topk(4).indices
        loss = torch.tensor(0.0, dtype=torch.float64)
        for i in range(16):
            f = 16 / (4 * 20) * (chosen == i).sum()
            p = (sequence[:, i] / sequence.sum(-1)).mean()
            loss = loss + f * p
        losses.append(loss)
    expected = torch.stack(losses).mean()
    result = F.sequence_balance_loss(score, k=4)
    assert result.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(result, score)
    (expected_gradient,) = torch.autograd.grad(expected, score)
    assert torch.allclose(gradient, expected_gradient, atol=1e-7)


def test_balance_loss_is_one_when_balanced_and_larger_when_not() -> None:
    balanced = torch.full((1, 8, 8), 0.1) + 0.4 * torch.eye(8)
    assert F.sequence_balance_loss(balanced, k=1).item() == pytest.approx(1.0)
    collapsed = torch.full((1, 8, 8), 0.1)
    collapsed[..., 0] = 0.5
    assert F.sequence_balance_loss(collapsed, k=1).item() == pytest.approx(8 * 0.5 / 1.2)


def test_a_module_without_a_token_has_no_balance_loss() -> None:
    score = torch.rand(3, 0, 16, requires_grad=True)
    loss = F.sequence_balance_loss(score, k=4)
    assert loss.item() == 0.0
    (gradient,) = torch.autograd.grad(loss, score)
    assert (
        gradient.shape
        == G.sequence_balance_loss_grad(torch.tensor(1.0), score, 4).shape
        == score.shape
    )


def test_expert_load_counts_choices() -> None:
    load = F.expert_load(torch.tensor([[[0, 3], [3, 1]], [[3, 0], [1, 0]]]), 5)
    assert load.dtype == torch.int64
    assert load.tolist() == [3, 2, 0, 3, 0]


@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_experts_get_their_tokens_and_give_them_back(shape: tuple[int, ...]) -> None:
    """Equation 12, for experts that multiply by their number; nobody chooses the last one."""
    x, weight = random(*shape, 6), random(*shape, 2, seed=1)
    index = random(*shape, 4, seed=2).topk(2).indices
    y, dispatched = torch.zeros_like(x), F.dispatch(index, 5)
    for expert, chosen in enumerate(dispatched):
        tokens = F.gather_tokens(x, chosen)
        assert torch.equal(tokens, x[(index == expert).any(-1)])
        F.add_tokens(y, chosen, tokens * expert, weight)
    assert len(dispatched) == 5 and len(F.gather_tokens(x, dispatched[4])) == 0
    assert torch.allclose(y, x * (index * weight).sum(-1, keepdim=True), atol=1e-5)


def test_gradients_flow_through_dispatch() -> None:
    x = random(2, 3, 4).double().requires_grad_()
    weight = random(2, 3, 2, seed=1).double().requires_grad_()
    index = random(2, 3, 5, seed=2).topk(2).indices

    def experts(x: Tensor, weight: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert, chosen in enumerate(F.dispatch(index, 5)):
            F.add_tokens(y, chosen, F.gather_tokens(x, chosen).sin() * (expert + 1), weight)
        return y

    assert torch.autograd.gradcheck(experts, (x, weight))


def test_positions_count_from_zero_in_every_sequence() -> None:
    assert F.positions(torch.full((2, 3), 9)).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_cross_entropy_sums_over_the_labels_that_count() -> None:
    logits = random(2, 3, 7).bfloat16()
    labels = torch.tensor([[1, -100, 6], [-100, 0, 2]])
    log_p = logits.double().log_softmax(-1)
    expected = -sum(
        log_p[b, i, labels[b, i]].item() for b in range(2) for i in range(3) if labels[b, i] >= 0
    )
    result = F.cross_entropy(logits, labels)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(expected, rel=1e-5)
    assert F.count_labels(labels).item() == 4
    assert F.count_labels(torch.full((2, 3), -100)).item() == 1
    assert F.cross_entropy(logits, torch.full((2, 3), -100)).item() == 0.0


def test_embedding_takes_rows() -> None:
    weight = random(5, 3)
    assert torch.equal(F.embedding(torch.tensor([[4, 0]]), weight), weight[[4, 0]].unsqueeze(0))


def test_sigmoid_of_large_numbers_is_finite() -> None:
    assert F.sigmoid(torch.tensor([-200.0, 0.0, 200.0])).tolist() == [0.0, 0.5, 1.0]
    assert math.isfinite(F.sequence_balance_loss(torch.zeros(1, 2, 4), k=1).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_of_each_number_are_what_they_are_called(dtype: torch.dtype) -> None:
    numbers = [-60.0, -3.0, -0.5, 0.0, 0.5, 3.0, 39.0, 60.0]
    cube = [math.sqrt(2 / math.pi) * (n + 0.044715 * n**3) for n in numbers]
    expected = {
        F.gelu: [n / 2 * math.erfc(-n / math.sqrt(2)) for n in numbers],
        F.gelu_tanh: [n / 2 * (1 + math.tanh(c)) for n, c in zip(numbers, cube, strict=True)],
        F.relu: [max(n, 0) for n in numbers],
        F.relu_squared: [max(n, 0) ** 2 for n in numbers],
        F.tanh: list(map(math.tanh, numbers)),
        F.softplus: [max(n, 0) + math.log1p(math.exp(-abs(n))) for n in numbers],
        F.exp: list(map(math.exp, numbers)),
    }
    for function, values in expected.items():
        exact = torch.tensor(values, dtype=dtype)
        result = function(torch.tensor(numbers, dtype=dtype))
        # gelu multiplies a number by a probability, whose error near 0 is that of numbers near 1.
        scale = torch.tensor([max(abs(n), 1) for n in numbers], dtype=dtype)
        most = 4 * torch.finfo(dtype).eps * (exact.abs() + scale)
        assert ((result - exact).abs() <= most).all(), function.__name__
        with torch.inference_mode(), matmul.batch_invariant():
            alone = [function(torch.tensor([n], dtype=dtype)) for n in numbers]
            together = function(torch.tensor(numbers * 5, dtype=dtype))
        assert ((together[: len(numbers)] - exact).abs() <= most).all(), function.__name__
        assert torch.equal(together, torch.cat(alone * 5)), function.__name__


@given(st.integers(0, 5), st.integers(1, 3), st.integers(3, 6))
def test_grouped_experts_are_the_loop_over_experts(tokens: int, k: int, experts: int) -> None:
    x = random(tokens, 8)
    index = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)] or [torch.zeros(k)])
    index = index[:tokens].long()
    weight, share = random(experts, 4, 8, seed=1), random(tokens, k, seed=2)
    rows, ends, order = F.permute(x, index, experts)
    assert rows.shape == (tokens * k, 8) and ends.tolist()[-1] == tokens * k
    grouped = F.unpermute(F.grouped_linear(rows, ends, weight), order, share)
    expected = torch.zeros(tokens, 4)
    for t in range(tokens):
        for choice in range(k):
            expected[t] += share[t, choice] * (weight[index[t, choice]] @ x[t])
    assert torch.allclose(grouped, expected, atol=1e-5)


def test_permute_keeps_the_order_of_the_tokens_of_an_expert() -> None:
    index = torch.tensor([[[2], [0], [2]], [[0], [2], [2]]])
    rows, ends, order = F.permute(torch.arange(6.0).view(2, 3, 1), index, 3)
    assert rows.flatten().tolist() == [1, 3, 0, 2, 4, 5]
    assert ends.tolist() == [2, 2, 6] and order.tolist() == [1, 3, 0, 2, 4, 5]


@pytest.mark.parametrize("rows", [1, 7, 8, 64])
def test_products_without_gradient_take_other_kernels_for_the_same_result(rows: int) -> None:
    """float32 goes by oneDNN where no gradient is asked for; strided weights are those of
    backward passes."""
    x, weight = random(2, rows, 24), random(10, 24, seed=1)
    exact = (x.double() @ weight.double().t()).float()
    with torch.no_grad():
        for matrix in (weight, weight.t().contiguous().t()):
            assert torch.allclose(F.linear(x, matrix), exact, atol=1e-5)
    assert torch.allclose(F.linear(x, weight), exact, atol=1e-5)


def test_grouped_products_without_gradient_are_the_same() -> None:
    x, weight = random(40, 24), random(4, 10, 24, seed=1)
    ends = torch.tensor([3, 3, 31, 40], dtype=torch.int32)  # few, none, many, nine
    expected = torch.cat([x[:3] @ weight[0].t(), x[3:31] @ weight[2].t(), x[31:] @ weight[3].t()])
    with torch.no_grad():
        assert torch.allclose(F.grouped_linear(x, ends, weight), expected, atol=1e-5)
    assert torch.allclose(F.grouped_linear(x, ends, weight), expected, atol=1e-5)


@pytest.mark.parametrize("counts", [(0, 5, 0, 3), (40, 0, 1, 23), (31, 33, 70, 9)])
def test_other_rows_never_reach_an_expert(counts: tuple[int, ...]) -> None:
    """Rows are rounded up to a number that a kernel exists for; those too many count nowhere."""
    x, weight, dy = random(sum(counts), 6), random(4, 5, 6, seed=1), random(sum(counts), 5, seed=2)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    rows, gradients = x.split(counts), dy.split(counts)
    with torch.no_grad():
        y = F.grouped_linear(x, ends, weight).split(counts)
        outer = matmul.grouped_outer(dy, x, ends)
    for e in range(4):
        assert torch.allclose(y[e], rows[e] @ weight[e].t(), atol=1e-5)
        assert torch.allclose(outer[e], gradients[e].t() @ rows[e], atol=1e-4)


def test_gradients_of_grouped_experts_are_those_of_the_loop() -> None:
    x, weight = random(7, 8).requires_grad_(), random(4, 6, 8, seed=1).requires_grad_()
    index = torch.tensor([[0, 3], [3, 0], [0, 2], [2, 3], [3, 2], [0, 2], [2, 0]])  # none chose 1
    share = random(7, 2, seed=2).requires_grad_()
    rows, ends, order = F.permute(x, index, 4)
    y = F.unpermute(F.grouped_linear(rows, ends, weight), order, share)
    expected = torch.einsum("tk,tkoi,ti->to", share, weight[index], x)
    ours = torch.autograd.grad(y.square().sum(), [x, weight, share])
    theirs = torch.autograd.grad(expected.square().sum(), [x, weight, share])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert not ours[1][1].any()


@pytest.mark.parametrize("scores", [{}, *SCORES])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (4, 9), (9, 9)])
def test_attention_to_latents_is_attention_to_what_is_made_of_them(
    queries: int, keys: int, scores: dict[str, Any]
) -> None:
    heads, nope, rope, value, latent = 3, 6, 4, 5, 8
    weight = random(heads * (nope + value), latent, seed=1).double()
    c_kv, k_rope = random(2, keys, latent, seed=2).double(), random(2, keys, rope, seed=3).double()
    q_nope = random(2, queries, heads, nope, seed=4).double()
    q_rope = random(2, queries, heads, rope, seed=5).double()
    kv = (c_kv @ weight.T).unflatten(-1, (heads, nope + value))
    k = torch.cat([kv[..., :nope], k_rope.unsqueeze(2).expand(-1, -1, heads, -1)], -1)
    expected = F.attention(torch.cat([q_nope, q_rope], -1), k, kv[..., nope:], 0.3, **scores)
    q_latent = F.head_linear(q_nope, weight, (0, nope), transposed=True)
    o_latent = F.latent_attention(q_latent, q_rope, c_kv, k_rope, 0.3, **scores)
    o = F.head_linear(o_latent, weight, (nope, nope + value), transposed=False)
    assert torch.allclose(o, expected, atol=1e-12)


def test_one_query_reads_the_keys_that_it_selected_each_once() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    selected = torch.tensor([[[3, 3, -1, 8, 0]], [[8, 2, 2, 2, -1]]])
    seen, sinks = F.attention_mask(1, 9, selected.device, None, None, selected), random(4)
    assert seen is not None and seen.sum().item() == 5
    q, k, v = random(2, 1, 4, 7), random(2, 9, 2, 7), random(2, 9, 2, 5)
    found = F.attention(q, k, v, 0.3, selected=selected, sinks=sinks)
    torch.testing.assert_close(found, F.attend(q, k, v, seen, 0.3, sinks=sinks))
    c, rope = random(2, 9, 5), random(2, 9, 2)
    found = F.latent_attention(*q.split([5, 2], -1), c, rope, 0.3, selected=selected, sinks=sinks)
    k, v = torch.cat([c, rope], -1)[:, :, None], c[:, :, None]
    torch.testing.assert_close(found, F.attend(q, k, v, seen, 0.3, sinks=sinks))
