"""Attention to pages: as to contiguous keys, and the same bits in any company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from runtime import functional as F
from runtime.pages import Pages, make_rows

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


def attend(chosen: list[int], kind: str) -> dict[int, Tensor]:
    """The attention of the new tokens of some sequences, computed together."""
    pages, module, blocks = Pages(40, PAGE), nn.Module(), blocks_of(LENGTHS)
    widths = {"latent": {"c": (12,), "r": (6,)}, "grouped": {"k": (2, 12), "v": (2, 10)}}[kind]
    for i in range(len(LENGTHS)):  # all sequences are in the cache, whoever computes now
        pages.rows, _ = make_rows([(blocks[i], 0, LENGTHS[i])], [], PAGE)
        found = pages.append(module, **{n: entries_of(i, *w)[None] for n, w in widths.items()})
    sequences = [(blocks[i], LENGTHS[i] - NEW[i], NEW[i]) for i in chosen]
    pages.rows, position = make_rows(sequences, [], PAGE)
    assert position.shape == (1, sum(NEW[i] for i in chosen))
    q = torch.cat([queries(i) for i in chosen])[None]
    if kind == "latent":
        parts = (*q.split((12, 6), -1), *found)
        out = pages.attend(F.latent_attention, *parts, scale=0.3)
    else:
        out = pages.attend(F.attention, q[..., :12], *found, scale=0.3)
    return dict(zip(chosen, out[0].split([NEW[i] for i in chosen]), strict=True))


def queries(i: int) -> Tensor:
    return random(NEW[i], 4, 18, seed=7 + i)


@pytest.mark.parametrize("kind", ["latent", "grouped"])
def test_attention_to_pages_is_attention(kind: str) -> None:
    for i, out in attend([*range(len(LENGTHS))], kind).items():
        q = queries(i)[None]
        if kind == "latent":
            parts = (*q.split((12, 6), -1), entries_of(i, 12)[None], entries_of(i, 6)[None])
            expected = F.latent_attention(*parts, scale=0.3)
        else:
            keys = (entries_of(i, 2, 12)[None], entries_of(i, 2, 10)[None])
            expected = F.attention(q[..., :12], *keys, scale=0.3)
        assert torch.allclose(out, expected[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["latent", "grouped"])
def test_bits_do_not_depend_on_the_company(kind: str) -> None:
    together = attend([3, 0, 4, 1, 5, 2], kind)
    for i, out in together.items():
        assert torch.equal(attend([i], kind)[i], out)
    assert torch.equal(attend([4, 3], kind)[3], together[3])


def test_what_others_wrote_counts_nothing() -> None:
    pages, module = Pages(4, PAGE), nn.Module()
    pages.rows, _ = make_rows([([2], 0, 2)], [], PAGE)
    (k,) = pages.append(module, k=torch.ones(1, 2, 1, 4))
    k[1], k[3] = torch.nan, torch.nan
    pages.rows, _ = make_rows([([2, 0], 1, 1)], [0], PAGE)
    out = pages.attend(F.attention, torch.ones(1, 1, 1, 4), k, k, scale=1.0)
    assert torch.equal(out, torch.ones(1, 1, 1, 4))


def test_rows_know_their_places() -> None:
    rows, position = make_rows([([2], 4, 1), ([3, 1], 15, 2), ([4, 5], 14, 3)], [0, 5], PAGE)
    assert position.tolist() == [[4, 15, 16, 14, 15, 16]]
    assert rows.slots.tolist() == [36, 63, 16, 78, 79, 80]
    assert rows.lengths.tolist() == [5, 16, 17, 15, 16, 17]
    # Few rows attend each by their own table, with others of about the same length.
    assert [(g.rows.start, g.rows.stop, g.table.tolist()) for g in rows.groups] == [
        (0, 2, [[2], [3]]),
        (2, 3, [[3, 1]]),
        (3, 6, [[4, 5]]),
    ]
