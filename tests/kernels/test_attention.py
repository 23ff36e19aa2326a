"""Attention kernels, interpreted, against exact attention in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from backends.triton.attention import FORWARD, tuning_key
from backends.triton.checks import violations
from backends.triton.compiled import compile_kernels
from backends.triton.package import kernel_files, kernels_package
from backends.triton.target import TARGETS
from backends.triton.tuning_table import TuningTable
from compiler.pipeline import compile
from dsl.load import load
from runtime import functional, gradients
from tests.support.kernels import KernelLoader, close, difference
from tests.support.places import ROOT

GQA = (
    "blocks=[causal_lm, decoder, gqa, swiglu]",
    "params={vocab_size: 32, hidden_size: 64, num_attention_heads: 4, num_key_value_heads: 2,"
    " head_dim: 40, intermediate_size: 64}",
    "architecture={layers: [{repeat: 1, attention: GQA, feed_forward: SwiGLU}]}",
    "train={}",
)


DOCUMENTS = ("train.document_mask=true", "sequence.eos_token_id=1")


@dataclass(frozen=True)
class Heads:
    """A spec, and what heads it has."""

    spec: str
    heads: int
    kv_heads: int
    dim: int
    width: int
    sets: tuple[str, ...] = ()


V3 = Heads("deepseek_v3", 2, 2, 192, 128)
TINY = Heads("deepseek_v3_tiny", 4, 4, 24, 16)
# Two heads of queries share one of keys; 40 is neither a power of two nor a sum of two.
SHARED = Heads("deepseek_v3_tiny", 4, 2, 40, 40, GQA)


def made(
    heads: Heads, batch: int, queries: int, keys: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as a model passes them: values stand behind the keys in one tensor of poison.

    Values are a tenth of normal, as in FlashMLA's tests, whose bounds hold for those.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    q = random(batch, queries, heads.heads, heads.dim)
    k = random(batch, keys, heads.kv_heads, heads.dim)
    kv = torch.full(
        (batch, keys, heads.kv_heads, heads.dim + heads.width + 8), torch.nan
    ).bfloat16()
    kv[..., heads.dim : heads.dim + heads.width] = (
        random(batch, keys, heads.kv_heads, heads.width) / 10
    )
    return q, k, kv[..., heads.dim : heads.dim + heads.width]


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    first: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp in float64; differentiable.

    `first` [.., query] is the first key that a query sees.
    """
    times = q.shape[2] // k.shape[2]
    k, v = (t.double().repeat_interleave(times, 2).transpose(1, 2) for t in (k, v))
    score = q.double().transpose(1, 2) @ k.transpose(-1, -2) * scale
    seen = torch.ones(score.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[1])
    if first is not None:
        seen = seen & (torch.arange(k.shape[2]) >= first[:, None, :, None])
    score = score.masked_fill(~seen, -math.inf)
    if sinks is not None:
        sink = sinks[:, None, None].expand(*score.shape[:-1], 1)
        score, v = torch.cat([score, sink], -1), torch.nn.functional.pad(v, (0, 0, 0, 1))
    return (score.softmax(-1) @ v).transpose(1, 2), score.logsumexp(-1).transpose(1, 2)


def exact_grad(
    d: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> list[Tensor]:
    """The gradients in float64, of the rounded o and lse that the kernels are given, too."""
    times = q.shape[2] // k.shape[2]
    d, q, o = (t.double().transpose(1, 2) for t in (d, q, o))
    wide_k, wide_v = (t.double().repeat_interleave(times, 2).transpose(1, 2) for t in (k, v))
    p = (q @ wide_k.transpose(-1, -2) * scale - lse.double().transpose(1, 2)[..., None]).exp()
    p = p.tril(k.shape[1] - q.shape[2])
    ds = p * (d @ wide_v.transpose(-1, -2) - (d * o).sum(-1, keepdim=True)) * scale
    dk, dv = ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ d
    shared = (t.unflatten(1, (-1, times)).sum(2) for t in (dk, dv))
    return [t.transpose(1, 2) for t in (ds @ wide_k, *shared)]


# One token; less than a tile; tiles that are cut off; a cached prefix; a decoder's query.
SIZES = [(1, 1, 1), (2, 5, 5), (1, 130, 130), (1, 40, 200), (2, 1, 70)]
# Each target has its own tiles; narrow and shared heads differ from V3's alike on all of them.
HEADS = [("sm_90", V3), ("sm_100", V3), ("gfx942", V3), ("sm_90", TINY), ("sm_90", SHARED)]
IDS = ["sm_90", "sm_100", "gfx942", "tiny", "shared"]


@pytest.mark.parametrize(("batch", "queries", "keys"), SIZES)
@pytest.mark.parametrize(("target", "heads"), HEADS, ids=IDS)
def test_attention(
    kernels: KernelLoader, target: str, heads: Heads, batch: int, queries: int, keys: int
) -> None:
    module = kernels("attention", heads.spec, target, heads.sets)
    q, k, v = made(heads, batch, queries, keys)
    scale = heads.dim**-0.5
    o, lse = module.attention_saving(q, k, v, scale)
    expected, expected_lse = exact(q, k, v, scale)
    reference = functional.attention(q, k, v, scale)
    assert (o.shape, o.dtype) == (reference.shape, reference.dtype)
    # FlashMLA's bounds for bfloat16 against a wider reference.
    assert close(o, expected, 8e-4, 2.01 / 128)
    assert difference(o, expected) < 5e-6
    assert lse.dtype is torch.float32
    assert close(lse, expected_lse, 1e-6, 8.01 / 65536)
    again, lse_again = module.attention_saving(q, k, v, scale)
    assert torch.equal(o, again) and torch.equal(lse, lse_again)
    assert torch.equal(o, module.attention(q, k, v, scale))


@pytest.mark.parametrize(("batch", "queries", "keys"), SIZES)
@pytest.mark.parametrize(("target", "heads"), HEADS, ids=IDS)
def test_attention_grad(
    kernels: KernelLoader, target: str, heads: Heads, batch: int, queries: int, keys: int
) -> None:
    module = kernels("attention", heads.spec, target, heads.sets)
    q, k, v = made(heads, batch, queries, keys)
    d = made(heads, batch, queries, queries, seed=1)[2]
    d = d.repeat_interleave(heads.heads // heads.kv_heads, 2)
    scale = heads.dim**-0.5
    o, lse = module.attention_saving(q, k, v, scale)
    found = module.attention_grad(d, q, k, v, o, lse, scale)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    true = torch.autograd.grad(exact(leaves[0], leaves[1], leaves[2], scale)[0], leaves, d.double())
    given = exact_grad(d, q, k, v, o, lse, scale)
    for grad, leaf, x, y in zip(found, (q, k, v), true, given, strict=True):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
        # FlashMLA's bounds of the backward pass, the absolute one that of the forward pass.
        assert close(grad, x, 8e-4, 8.01 / 128)
        # Of a single key the gradient is 0, and what is found a rounding error of float32.
        assert keys == 1 or difference(grad, y) < 7e-6
    again = module.attention_grad(d, q, k, v, o, lse, scale)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


# Queries, keys, a window, documents of so many tokens, sinks. There are rows that see nothing of
# the first tile of keys, and tiles that no query of a tile sees, before and after.
BOUNDED = [
    (TINY, 200, 200, 40, 0, False),
    (SHARED, 40, 200, 70, 0, True),
    (SHARED, 130, 130, 0, 0, True),
    (TINY, 200, 200, 0, 60, False),
    (SHARED, 200, 200, 33, 60, True),
]


@pytest.mark.parametrize(("heads", "queries", "keys", "window", "length", "sunk"), BOUNDED)
def test_windows_sinks_and_documents(
    kernels: KernelLoader,
    heads: Heads,
    queries: int,
    keys: int,
    window: int,
    length: int,
    sunk: bool,
) -> None:
    """Results and gradients against float64; of a few tokens, too, which a window does not cut."""
    sets = (*heads.sets, *(DOCUMENTS if length else ()))
    module, name = kernels("attention", heads.spec, "sm_90", sets), "document_" * bool(length)
    q, k, v = made(heads, 1, queries, keys)
    d = made(heads, 1, queries, queries, seed=1)[2]
    d = d.repeat_interleave(heads.heads // heads.kv_heads, 2)
    # The first head has none.
    sinks = [torch.tensor([-math.inf, -2, 0.5, 3]).bfloat16()] * sunk
    named = {"window": window} if window else {}
    named |= {"sinks": sinks[0]} if sunk else {}
    last = torch.arange(keys - queries, keys)[None]
    first = (last - window + 1 if window else torch.zeros_like(last)).clamp(min=0)
    position = [torch.arange(queries)[None] % length] if length else []
    for one in position:
        first = torch.maximum(first, last - one)
    scale = heads.dim**-0.5
    o, lse = getattr(module, f"{name}attention_saving")(q, k, v, *position, scale, **named)
    leaves = [t.double().requires_grad_() for t in (q, k, v, *sinks)]
    expected, expected_lse = exact(leaves[0], leaves[1], leaves[2], scale, first, *leaves[3:])
    assert close(o, expected, 8e-4, 2.01 / 128)
    assert difference(o, expected.detach()) < 5e-6
    assert close(lse, expected_lse, 1e-6, 8.01 / 65536)
    gradient = getattr(module, f"{name}attention_grad")
    found = gradient(d, q, k, v, *position, o, lse, scale, **named)
    true = torch.autograd.grad(expected, leaves, d.double())
    for grad, leaf, x in zip(found, (q, k, v, *sinks), true, strict=True):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
        # A value's gradient is a sum of a hundred probabilities in bfloat16, which may cancel out.
        assert close(grad, x, 2e-3, 8.01 / 128) and difference(grad, x) < 1e-5
    few = [t[:, :5] for t in (q, k, v, *position)]
    alone, reference = (
        getattr(one, f"{name}attention")(*few, scale, **named) for one in (module, functional)
    )
    assert close(alone, reference.double(), 8e-4, 2.01 / 128)


# Empty, of one token, of several tiles; one behind a cached prefix.
LENGTHS = [(1, 1), (0, 0), (130, 130), (5, 40), (0, 3), (2, 2)]


@pytest.mark.parametrize(("target", "heads"), HEADS, ids=IDS)
def test_one_behind_another(kernels: KernelLoader, target: str, heads: Heads) -> None:
    """Sequences of any length, as each alone; three tokens behind the last one, which are zeros."""
    module = kernels("attention", heads.spec, target, heads.sets)
    totals = [sum(lengths) for lengths in zip(*LENGTHS, strict=True)]
    (q, _, _), (_, k, v) = (made(heads, 1, n + 3, n + 3, seed=n) for n in totals)
    starts = [
        torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
        for lengths in zip(*LENGTHS, strict=True)
    ]
    arguments = (q[0], k[0], v[0], *starts, 200, 0.1)
    found, reference = (
        f(*arguments) for f in (module.attention_varlen, functional.attention_varlen)
    )
    assert (found.shape, found.dtype) == (reference.shape, reference.dtype)
    assert not found[totals[0] :].any() and not reference[totals[0] :].any()
    for begin_q, begin_k, (queries, keys) in zip(
        *(s[:-1].tolist() for s in starts), LENGTHS, strict=True
    ):
        own = slice(begin_q, begin_q + queries), slice(begin_k, begin_k + keys)
        expected = exact(q[:, own[0]], k[:, own[1]], v[:, own[1]], 0.1)[0][0]
        assert close(found[own[0]], expected, 8e-4, 2.01 / 128)
        assert close(reference[own[0]], expected, 8e-4, 2.01 / 128)
        assert difference(found[own[0]], expected) < 5e-6
    assert torch.equal(found, module.attention_varlen(*arguments))


@pytest.mark.parametrize(("target", "heads"), HEADS, ids=IDS)
def test_gradients_of_one_behind_another(kernels: KernelLoader, target: str, heads: Heads) -> None:
    """Each sequence as alone, by kernel and by reference; zeros outside of all sequences."""
    module = kernels("attention", heads.spec, target, heads.sets)
    totals = [sum(lengths) for lengths in zip(*LENGTHS, strict=True)]
    (q, _, _), (_, k, v) = (made(heads, 1, n + 3, n + 3, seed=n) for n in totals)
    d = made(heads, 1, totals[0] + 3, totals[0] + 3, seed=1)[2]
    d = d.repeat_interleave(heads.heads // heads.kv_heads, 2)
    starts = [
        torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
        for lengths in zip(*LENGTHS, strict=True)
    ]
    sequences = (*starts, 200, heads.dim**-0.5)
    o, lse = module.attention_varlen_saving(q[0], k[0], v[0], *sequences)
    _, levels = gradients.attention_varlen_saving(q[0], k[0], v[0], *sequences)
    assert close(lse, levels, 1e-6, 8.01 / 65536)
    arguments = (d[0], q[0], k[0], v[0], o, lse, *sequences)
    found = module.attention_varlen_grad(*arguments)
    reference = gradients.attention_varlen_grad(*arguments)
    outside = (totals[0], totals[1], totals[1])
    for grad, true, leaf, end in zip(found, reference, (q, k, v), outside, strict=True):
        assert grad.shape == true.shape == leaf[0].shape and grad.dtype == leaf.dtype
        assert not grad[end:].any() and not true[end:].any()
    for begin_q, begin_k, (queries, keys) in zip(
        *(s[:-1].tolist() for s in starts), LENGTHS, strict=True
    ):
        of_q, of_k = slice(begin_q, begin_q + queries), slice(begin_k, begin_k + keys)
        own = (d[:, of_q], q[:, of_q], k[:, of_k], v[:, of_k], o[None, of_q], lse[None, of_q])
        leaves = [t.double().requires_grad_() for t in own[1:4]]
        out = exact(leaves[0], leaves[1], leaves[2], sequences[-1])[0]
        true = torch.autograd.grad(out, leaves, own[0].double())
        given = exact_grad(*own, sequences[-1])
        parts = zip((of_q, of_k, of_k), found, reference, true, given, strict=True)
        for part, grad, plain, x, y in parts:
            assert close(grad[part], x[0], 8e-4, 8.01 / 128)
            assert close(plain[part], x[0], 8e-4, 8.01 / 128)
            assert keys == 1 or difference(grad[part], y[0]) < 7e-6
    again = module.attention_varlen_grad(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_tiles_that_may_be_measured_keep_the_rules(target: str) -> None:
    description, gpu = load(ROOT / "specs/deepseek_v3.yaml"), TARGETS[target]
    programs = compile(description).programs
    for tile in FORWARD[target][1:]:
        tuning = TuningTable({tuning_key(V3.dim, V3.width): tile.name})
        files = kernel_files(programs, description, gpu, tuning)
        own = [file for file in files if file.name == "attention"]
        assert str(tile) in own[0].text
        for row in compile_kernels(own, kernels_package(own, gpu), gpu):
            assert not violations(row, gpu), (tile, row)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_documents_with_a_window_keep_the_rules(target: str) -> None:
    """At the sizes of V3, where registers are few: one case of each kernel."""
    sets, gpu = (*DOCUMENTS, "params.window=128"), TARGETS[target]
    description = load(ROOT / "specs/deepseek_v3.yaml", sets=sets)
    files = kernel_files(compile(description).programs, description, gpu)
    (own,) = (file for file in files if file.name == "attention")
    wanted = ("document_attention_saving", "document_attention_grad")
    cases = {case.function: case for case in reversed(own.cases) if case.function in wanted}
    own = replace(own, cases=tuple(cases.values()))
    rows = list(compile_kernels([own], kernels_package([own], gpu), gpu))
    bounded = {row["kernel"] for row in rows if row["constants"]["WINDOW"]}
    assert bounded == {"attention_kernel", "grad_queries_kernel", "grad_keys_kernel"}
    for row in rows:
        assert not violations(row, gpu), row


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 3), (2, 0, 0), (2, 0, 5)])
def test_nothing_to_attend_to(kernels: KernelLoader, batch: int, queries: int, keys: int) -> None:
    module = kernels("attention", V3.spec)
    q, k, v = made(V3, batch, queries, keys)
    o, lse = module.attention_saving(q, k, v, 0.1)
    assert o.shape == (batch, queries, V3.heads, V3.width)
    dq, dk, dv = module.attention_grad(o, q, k, v, o, lse, 0.1)
    assert dq.shape == q.shape
    # Keys that no query sees have gradients, too: zeros.
    assert not dk.any() and not dv.any()


def test_more_queries_than_keys(kernels: KernelLoader) -> None:
    q, k, v = made(V3, 1, 3, 2)
    with pytest.raises(ValueError, match="3 queries but only 2 keys"):
        kernels("attention", V3.spec).attention(q, k, v, 0.1)


def test_offsets_beyond_32_bits(kernels: KernelLoader) -> None:
    """Tokens so far apart that offsets of elements pass 2^31; memory is taken where it is used."""
    module = kernels("attention", TINY.spec)
    q, k, v = made(TINY, 1, 40, 200)
    apart = 2**31 // 150
    room = torch.empty(200 * apart, dtype=torch.bfloat16)
    far = room.as_strided(k.shape, (0, apart, TINY.dim, 1)).copy_(k)
    assert torch.equal(module.attention(q, far, v, 0.2), module.attention(q, k, v, 0.2))
