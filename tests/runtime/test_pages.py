"""Attention to pages: as to contiguous keys, and the same bits in any company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime import functional as F
from runtime.pages import PagedAttention, Pages, make_rows

PAGE = 16
LENGTHS = (1, 5, 16, 17, 40, 33)
"""Keys of each sequence, with those of its new tokens."""
NEW = (1, 3, 16, 1, 1, 33)


def blocks_of(lengths: tuple[int, ...]) -> list[list[int]]:
    """Blocks in no order, for each sequence."""
    needed = [-(-length // PAGE) for length in lengths]
    mixed = torch.randperm(sum(needed), generator=torch.manual_seed(1)) + 1
    return [part.tolist() for part in mixed.split(needed)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def entries_of(sequence: int, *width: int) -> Tensor:
    return random(LENGTHS[sequence], *width, seed=100 * sequence + width[-1])


WIDTHS: dict[str, dict[str, tuple[int, ...]]] = {
    "latent": {"c": (12,), "r": (6,)},
    "grouped": {"k": (2, 64), "v": (2, 40)},
    "multi-head": {"k": (4, 64), "v": (4, 64)},
}
"""Of what a token has in the cache. Products of 64 numbers are the library's, not torch's loop."""


SCORES: dict[str, dict[str, Any]] = {
    "all": {},
    "window": {"window": 18},
    "capped": {"softcap": 0.5},
    "mask": {"mask": lambda q, k: (q // 9 == k // 9) | (k < 2), "softcap": 3.0},
}


def attend(
    chosen: list[int], kind: str, scores: str = "all", kernel: PagedAttention | None = None
) -> dict[int, Tensor]:
    """The attention of the new tokens of some sequences, computed together."""
    pages, module, blocks = Pages(40, PAGE, kernel), nn.Module(), blocks_of(LENGTHS)
    widths = WIDTHS[kind]
    for i in range(len(LENGTHS)):  # all sequences are in the cache, whoever computes now
        pages.begin(make_rows([(blocks[i], 0, LENGTHS[i])], [], PAGE)[0])
        found = pages.append(module, **{n: entries_of(i, *w)[None] for n, w in widths.items()})
    sequences = [(blocks[i], LENGTHS[i] - NEW[i], NEW[i]) for i in chosen]
    rows, position = make_rows(sequences, [], PAGE)
    pages.begin(rows)
    assert position.shape == (1, sum(NEW[i] for i in chosen))
    q = torch.cat([queries(i, kind) for i in chosen])[None]
    if kind == "latent":
        parts = (*q.split((12, 6), -1), *found)
        out = pages.attend(F.latent_attention, *parts, scale=0.3, **SCORES[scores])
    else:
        out = pages.attend(F.attention, q, *found, scale=0.3, **SCORES[scores])
    return dict(zip(chosen, out[0].split([NEW[i] for i in chosen]), strict=True))


def queries(i: int, kind: str) -> Tensor:
    return random(NEW[i], 4, 18 if kind == "latent" else 64, seed=7 + i)


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("kind", WIDTHS)
def test_attention_to_pages_is_attention(kind: str, scores: str) -> None:
    for i, out in attend([*range(len(LENGTHS))], kind, scores).items():
        q = queries(i, kind)[None]
        if kind == "latent":
            parts = (*q.split((12, 6), -1), entries_of(i, 12)[None], entries_of(i, 6)[None])
            expected = F.latent_attention(*parts, scale=0.3, **SCORES[scores])
        else:
            keys = (entries_of(i, *width)[None] for width in WIDTHS[kind].values())
            expected = F.attention(q, *keys, scale=0.3, **SCORES[scores])
        assert torch.allclose(out, expected[0], atol=1e-5)


def test_a_kernel_for_pages_serves_all_rows() -> None:
    """Each by its own table, and several of one sequence."""
    calls: list[tuple[int, int]] = []

    def kernel(q_latent: Tensor, *rest: Tensor) -> Tensor:
        calls.append((len(q_latent), q_latent.shape[1]))
        return F.paged_latent_attention(q_latent, *rest)  # type: ignore[arg-type]

    chosen = [*range(len(LENGTHS))]
    expected = attend(chosen, "latent")
    found = attend(chosen, "latent", kernel=kernel)
    assert {queries > 1 for _, queries in calls} == {True, False}
    assert sum(batch * queries for batch, queries in calls) == sum(NEW)
    for i in chosen:
        assert torch.allclose(found[i], expected[i], atol=1e-5)
    calls.clear()
    attend(chosen, "latent", "window", kernel)
    assert not calls, "it knows no windows"


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("kind", WIDTHS)
def test_bits_do_not_depend_on_the_company(kind: str, scores: str) -> None:
    together = attend([3, 0, 4, 1, 5, 2], kind, scores)
    for i, out in together.items():
        assert torch.equal(attend([i], kind, scores)[i], out)
    assert torch.equal(attend([4, 3], kind, scores)[3], together[3])


def test_what_is_not_finite_is_marked_and_never_remembered() -> None:
    pages, module = Pages(3, PAGE), nn.Module()
    pages.begin(make_rows([([1], 0, 2), ([2], 0, 3)], [], PAGE)[0])
    k = torch.ones(1, 5, 1, 4)
    k[0, 1], k[0, 3, 0, 2] = torch.nan, torch.inf
    (pool,) = pages.append(module, k=k)
    assert pages.broken.tolist() == [False, True, False, True, False]
    # The place of the second token is in a block of others now, and not seen.
    pages.begin(make_rows([([1], 1, 1)], [0], PAGE)[0])
    pages.append(module, k=torch.ones(1, 1, 1, 4))
    out = pages.attend(F.attention, torch.ones(1, 1, 1, 4), pool, pool, scale=1.0)
    assert torch.equal(out, torch.ones(1, 1, 1, 4)) and not pages.broken.any()


def test_rows_know_their_places() -> None:
    rows, position = make_rows([([2], 4, 1), ([3, 1], 15, 2), ([4, 5], 11, 6)], [0, 5], PAGE)
    assert position.tolist() == [[4, 15, 16, *range(11, 17)]]
    assert rows.slots.tolist() == [36, 63, 16, *range(75, 81)]
    assert rows.lengths.tolist() == [5, 16, 17, *range(12, 18)]
    # Few rows attend each by their own table, with others of about the same length.
    assert [(g.rows.start, g.rows.stop, g.table.tolist()) for g in rows.groups] == [
        (0, 2, [[2], [3]]),
        (2, 3, [[3, 1]]),
        (3, 9, [[4, 5]]),
    ]
