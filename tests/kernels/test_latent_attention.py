"""Decoding in the latent space, interpreted: contiguous and paged, against float64."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from runtime import functional
from tests.support.kernels import KernelLoader, close, difference

GARBAGE = 2147480000
"""What stands in a table beyond the pages of a sequence."""

PAGE = 64
# V3's 128 heads are two tiles of rows, V2-Lite's 16 one with keys first on sm_90.
SPECS = {
    "deepseek_v3": (128, 512, 64),
    "deepseek_v2_lite": (16, 512, 64),
    "deepseek_v3_tiny": (4, 24, 8),
}

# Each way of cutting once: what differs otherwise is how many heads there are.
PLACES = [
    ("sm_90", "deepseek_v3"),
    ("sm_90", "deepseek_v2_lite"),
    ("sm_90", "deepseek_v3_tiny"),
    ("sm_100", "deepseek_v2_lite"),
    ("gfx942", "deepseek_v3"),
    ("gfx942", "deepseek_v2_lite"),
]


def random(generator: torch.Generator, *shape: int) -> Tensor:
    """A tenth of normal, as in FlashMLA's tests, whose bounds hold for those."""
    return (torch.randn(*shape, generator=generator) / 10).bfloat16()


def exact(q: Tensor, keys: Tensor, latent: int, scale: float) -> Tensor:
    """One sequence in float64: q [query, heads, c + r], keys [key, c + r]. Zeros without keys."""
    score = torch.einsum("qhc,kc->qhk", q.double(), keys.double()) * scale
    seen = torch.ones(len(q), len(keys), dtype=torch.bool).tril(len(keys) - len(q))
    share = score.masked_fill(~seen.unsqueeze(1), -math.inf).softmax(-1).nan_to_num()
    return share @ keys[:, :latent].double()


def check(found: Tensor, expected: Tensor) -> None:
    # FlashMLA's bounds for bfloat16 against a wider reference.
    assert close(found, expected, 8e-4, 2.01 / 128)
    assert difference(found, expected) < 5e-6


@pytest.mark.parametrize(("target", "spec"), PLACES)
@pytest.mark.parametrize(("batch", "queries", "keys"), [(1, 1, 1), (2, 1, 200), (1, 2, 65)])
def test_contiguous(
    kernels: KernelLoader, target: str, spec: str, batch: int, queries: int, keys: int
) -> None:
    """Views as the module's cache gives them: each sequence has room for more, which is poison."""
    module, (heads, c, r) = kernels("latent_attention", spec, target), SPECS[spec]
    generator = torch.Generator().manual_seed(keys)
    # Latent queries come with the heads outermost in memory.
    q = random(generator, heads, batch, queries, c).permute(1, 2, 0, 3)
    q_rope = random(generator, batch, queries, heads, r)
    c_kv, k_rope = (torch.full((batch, keys + 9, n), torch.nan).bfloat16() for n in (c, r))
    c_kv[:, :keys], k_rope[:, :keys] = (random(generator, batch, keys, n) for n in (c, r))
    arguments = (q, q_rope, c_kv[:, :keys], k_rope[:, :keys], 0.3)
    found = module.latent_attention(*arguments)
    reference = functional.latent_attention(*arguments)
    assert (found.shape, found.dtype) == (reference.shape, reference.dtype)
    for b in range(batch):
        latents = torch.cat([c_kv, k_rope], -1)[b, :keys]
        check(found[b], exact(torch.cat([q, q_rope], -1)[b], latents, c, 0.3))
    assert torch.equal(found, module.latent_attention(*arguments))


def paged(spec: str, lengths: list[int], queries: int) -> tuple[Tensor, ...]:
    """Arguments of `paged_latent_attention`: pages in no order, poison in all that is not used."""
    heads, c, r = SPECS[spec]
    generator = torch.Generator().manual_seed(len(lengths))
    counts = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(counts) + 3, generator=generator).int()
    table = torch.full((len(lengths), max(counts) + 2), GARBAGE, dtype=torch.int32)
    pages = torch.full((len(order), PAGE, c + r), torch.nan).bfloat16()
    for b, (length, own) in enumerate(
        zip(lengths, order[: sum(counts)].split(counts), strict=True)
    ):
        table[b, : len(own)] = own
        rows = torch.full((len(own) * PAGE, c + r), torch.nan).bfloat16()
        rows[:length] = random(generator, length, c + r)
        pages[own.long()] = rows.view(len(own), PAGE, c + r)
    q = random(generator, len(lengths), queries, heads, c + r)
    return (
        q[..., :c],
        q[..., c:],
        pages[..., :c],
        pages[..., c:],
        table,
        torch.tensor(lengths).int(),
    )


def keys_of(pages: Tensor, rope: Tensor, row: Tensor, length: int) -> Tensor:
    """The latents and rotated keys of one sequence, side by side."""
    own = row[: -(-length // PAGE)].long()
    return torch.cat([pages, rope], -1)[own].flatten(0, 1)[:length]


@pytest.mark.parametrize(("lengths", "queries"), [([0, 1, 64, 65, 200], 2), ([130], 1)])
@pytest.mark.parametrize(("target", "spec"), PLACES)
def test_paged(
    kernels: KernelLoader, target: str, spec: str, lengths: list[int], queries: int
) -> None:
    module = kernels("latent_attention", spec, target)
    arguments = paged(spec, lengths, queries)
    q, q_rope, c_kv, k_rope, table, _ = arguments
    found = module.paged_latent_attention(*arguments, 0.3)
    reference = functional.paged_latent_attention(*arguments, 0.3)
    for b, length in enumerate(lengths):
        keys = keys_of(c_kv, k_rope, table[b], length)
        expected = exact(torch.cat([q, q_rope], -1)[b], keys, q.shape[-1], 0.3)
        check(found[b], expected)
        check(reference[b], expected)
    assert torch.equal(found, module.paged_latent_attention(*arguments, 0.3))


def test_a_sequence_without_tokens_gives_zeros(kernels: KernelLoader) -> None:
    arguments = paged("deepseek_v3_tiny", [0, 1], 2)
    found = kernels("latent_attention", "deepseek_v3_tiny").paged_latent_attention(*arguments, 0.3)
    assert not found[0].any()
    # One token, two queries: the first one would be before the sequence.
    assert not found[1, 0].any() and found[1, 1].any()


@pytest.mark.parametrize("pages", [1, 2, 3, 7])
def test_results_do_not_hang_on_splits(
    kernels: KernelLoader, monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    """Many splits are empty. What `torch.empty` gives is poison, lest it be read."""
    module = kernels("latent_attention", "deepseek_v3_tiny")
    arguments = paged("deepseek_v3_tiny", [0, 1, 64, 65, 300], 1)
    monkeypatch.setattr(module, "SPLIT", pages)
    poison(module, monkeypatch)
    found = module.paged_latent_attention(*arguments, 0.3)
    check(found, functional.paged_latent_attention(*arguments, 0.3))


def test_no_row_depends_on_the_sequences_beside_it(
    kernels: KernelLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server computes them in any company, which may be longer; queries of one sequence, too."""
    module = kernels("latent_attention", "deepseek_v3_tiny")
    monkeypatch.setattr(module, "SPLIT", 2)
    q, q_rope, c_kv, k_rope, table, lengths = paged("deepseek_v3_tiny", [3, 64, 190, 700], 1)
    together = module.paged_latent_attention(q, q_rope, c_kv, k_rope, table, lengths, 0.3)
    for b in range(3):
        pages = -(-int(lengths[b]) // PAGE)
        own = slice(b, b + 1)
        rest = c_kv, k_rope, table[own, :pages].contiguous(), lengths[own]
        alone = module.paged_latent_attention(q[own], q_rope[own], *rest, 0.3)
        assert torch.equal(alone, together[own])
        # As the last query of several.
        two = (torch.cat([torch.ones_like(x[own]), x[own]], 1) for x in (q, q_rope))
        assert torch.equal(module.paged_latent_attention(*two, *rest, 0.3)[:, 1:], alone)


def poison(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(*shape: object, **options: object) -> Tensor:
        return torch.full(shape if isinstance(shape[0], int) else shape[0], torch.nan, **options)  # type: ignore[arg-type, call-overload, no-any-return]

    class Poisoned:
        def __getattr__(self, name: str) -> object:
            return empty if name == "empty" else getattr(torch, name)

    monkeypatch.setattr(module, "torch", Poisoned())


def test_no_row_depends_on_the_batch(
    kernels: KernelLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splits are as long in any batch: a contiguous cache gives a sequence the same bits."""
    module = kernels("latent_attention", "deepseek_v3_tiny")
    monkeypatch.setattr(module, "SPLIT", 2)
    heads, c, r = SPECS["deepseek_v3_tiny"]
    generator = torch.Generator().manual_seed(0)
    q, q_rope = (random(generator, 3, 1, heads, n) for n in (c, r))
    c_kv, k_rope = (random(generator, 3, 700, n) for n in (c, r))
    together = module.latent_attention(q, q_rope, c_kv, k_rope, 0.3)
    for b in range(3):
        own = slice(b, b + 1)
        alone = module.latent_attention(q[own], q_rope[own], c_kv[own], k_rope[own], 0.3)
        assert torch.equal(alone, together[own])


def test_pages_of_another_size(kernels: KernelLoader) -> None:
    q, q_rope, c_kv, k_rope, table, lengths = paged("deepseek_v3_tiny", [30], 1)
    module = kernels("latent_attention", "deepseek_v3_tiny")
    with pytest.raises(ValueError, match="pages have 32 tokens"):
        module.paged_latent_attention(q, q_rope, c_kv[:, :32], k_rope[:, :32], table, lengths, 0.3)


@pytest.mark.parametrize(("batch", "queries"), [(0, 1), (2, 0)])
def test_nobody_asks(kernels: KernelLoader, batch: int, queries: int) -> None:
    heads, c, r = SPECS["deepseek_v3_tiny"]
    q, q_rope = (torch.empty(batch, queries, heads, n).bfloat16() for n in (c, r))
    c_kv, k_rope = (torch.empty(batch, 3, n).bfloat16() for n in (c, r))
    module = kernels("latent_attention", "deepseek_v3_tiny")
    assert module.latent_attention(q, q_rope, c_kv, k_rope, 0.3).shape == q.shape


def test_offsets_beyond_32_bits(kernels: KernelLoader) -> None:
    """Pages so far apart that offsets of elements pass 2^31; memory is taken where it is used."""
    module = kernels("latent_attention", "deepseek_v3_tiny")
    q, q_rope, c_kv, k_rope, table, lengths = paged("deepseek_v3_tiny", [400], 1)
    apart = 2**31 // (len(c_kv) - 1) + 64
    room = torch.empty(len(c_kv) * apart, dtype=torch.bfloat16)
    far = room.as_strided(c_kv.shape, (apart, c_kv.shape[2], 1)).copy_(c_kv)
    found = module.paged_latent_attention(q, q_rope, far, k_rope, table, lengths, 0.3)
    near = module.paged_latent_attention(q, q_rope, c_kv, k_rope, table, lengths, 0.3)
    assert torch.equal(found, near)
