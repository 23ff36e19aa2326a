"""The order of data: a permutation, the same wherever it is entered and however it is dealt out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.train.order import permute_index
from runtime.train.sequences import Sequences, ValidationSet, split
from runtime.train.settings import TrainError

PARTS = st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(lambda n: max(n) >= 14)


def parts(lengths: list[int]) -> list[torch.Tensor]:
    """Parts whose tokens are all different."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [torch.arange(e - n, e, dtype=torch.int32) for n, e in zip(lengths, ends, strict=True)]


@given(st.integers(1, 700), st.text(max_size=5))
def test_an_epoch_is_a_permutation(count: int, key: str) -> None:
    assert sorted(permute_index(i, count, key) for i in range(count)) == list(range(count))


def test_epochs_and_seeds_have_other_orders() -> None:
    orders = {tuple(permute_index(i, 50, key) for i in range(50)) for key in ("0 0", "0 1", "1 0")}
    assert len(orders) == 3
    assert list(range(50)) not in map(list, orders)


@given(PARTS, st.integers(1, 7), st.integers(0, 9))
def test_an_epoch_has_every_token_once_but_those_at_the_ends(
    lengths: list[int], length: int, seed: int
) -> None:
    data = Sequences(parts(lengths), length, seed)
    for epoch in range(3):
        drawn = [data[epoch * data.count + i] for i in range(data.count)]
        assert all(len(s) == length + 1 and s.dtype == torch.int64 for s in drawn)
        # What follows a token is what follows it in the text.
        assert all(torch.equal(s, torch.arange(int(s[0]), int(s[0]) + length + 1)) for s in drawn)
        inputs = torch.cat([s[:-1] for s in drawn]).tolist()
        assert len(set(inputs)) == len(inputs) == data.count * length
        # A part gives up less than two sequences: what the first cut and the last one leave.
        assert len(inputs) > sum(max(0, n - 2 * length) for n in lengths) - 1


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_data_follows_from_the_index_alone(index: int, ranks: int) -> None:
    """Not from what was asked for before, nor from the number of ranks that share a batch."""
    data = Sequences(parts([90, 33]), 4, seed=3)
    expected = [data[i] for i in range(index, index + 12)]
    again = Sequences(parts([90, 33]), 4, seed=3)
    dealt = {i: again[i] for rank in range(ranks) for i in range(index + rank, index + 12, ranks)}
    assert all(torch.equal(dealt[index + i], s) for i, s in enumerate(expected))


def test_epochs_cut_the_text_elsewhere() -> None:
    data = Sequences(parts([1000]), 50, seed=0)
    cuts = {int(data[epoch * data.count][0]) % 50 for epoch in range(20)}
    assert len(cuts) > 5


@given(PARTS, st.integers(1, 7))
def test_held_out_text_is_read_once_and_in_order(lengths: list[int], length: int) -> None:
    text = ValidationSet(parts(lengths), length)
    inputs = torch.cat([text[i][:-1] for i in range(text.count)]).tolist() if text.count else []
    assert inputs == sorted(set(inputs))
    assert text.count == sum(max(0, n - 1) // length for n in lengths)


@given(PARTS, st.floats(0, 0.99))
def test_nothing_is_both_trained_on_and_held_out(lengths: list[int], share: float) -> None:
    data = parts(lengths)
    trained, held_out = split(data, share)
    for whole, a, b in zip(data, trained, held_out, strict=True):
        assert torch.equal(torch.cat([a, b]), whole)
        assert len(b) == int(len(whole) * share)


def test_a_text_that_is_too_short() -> None:
    with pytest.raises(TrainError, match=r"of 8 tokens need a text of 16, this has 15"):
        Sequences(parts([15, 3]), 8, seed=0)
