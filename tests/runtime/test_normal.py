"""Numbers by index: any part equals that part of the whole, and all are normal and independent."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from runtime.normal import CPU_CHUNK, _hash, fill_normal, tensor_key

KEY = tensor_key(0, "model.layers.3.mlp.up_proj.weight")


def numbers(*shape: int, seed: int = 0, name: str = "w") -> Tensor:
    out = torch.empty(shape)
    fill_normal(out, tensor_key(seed, name))
    return out


@pytest.fixture(scope="module")
def many() -> Tensor:
    return numbers(10_000_000).double()


def test_any_part_equals_that_part_of_the_whole() -> None:
    whole = torch.empty(40, 50, 300)
    assert whole.numel() > 4 * CPU_CHUNK
    fill_normal(whole, KEY)
    strides = whole.stride()
    parts = (
        (..., 5, 7),
        (slice(3, 9), slice(None), slice(None)),
        (slice(None), slice(10, 20), slice(None)),
        (slice(None), slice(None), slice(100, 101)),
        (slice(1, 40, 3), slice(2, 50, 7), slice(0, 300, 2)),
        (39, 49, 299),
    )
    for place in parts:
        wanted = whole[place]
        part = torch.empty(wanted.shape)
        fill_normal(part, KEY, start=wanted.storage_offset(), strides=wanted.stride())
        assert torch.equal(part, wanted), place
        # Where a part lies does not matter either: here between other rows, or transposed.
        inside = torch.zeros(*wanted.shape, 2)[..., 1]
        fill_normal(inside, KEY, start=wanted.storage_offset(), strides=wanted.stride())
        assert torch.equal(inside, wanted), place
    transposed = torch.empty(300, 50, 40).permute(2, 1, 0)
    fill_normal(transposed, KEY)
    assert torch.equal(transposed, whole)
    rest = torch.empty(whole.numel() - 123_457)
    fill_normal(rest, KEY, start=123_457)
    assert torch.equal(rest, whole.view(-1)[123_457:])
    assert strides == (15_000, 300, 1)


def test_other_dtypes_are_casts_of_float32() -> None:
    whole, half = torch.empty(1000), torch.empty(1000, dtype=torch.bfloat16)
    fill_normal(whole, KEY, mean=1.0, std=0.006)
    fill_normal(half, KEY, mean=1.0, std=0.006)
    assert torch.equal(half, whole.bfloat16())
    expected = torch.empty(1000)
    fill_normal(expected, KEY)
    assert torch.equal(whole, expected * 0.006 + 1.0)
    fill_normal(torch.empty(0, 4), KEY)


def test_the_numbers_are_these() -> None:
    """Checkpoints are compared with initial values: they may not change by accident."""
    found = torch.empty(3)
    fill_normal(found, KEY)
    assert found.tolist() == [-0.6350158452987671, 0.16918343305587769, -0.8129835724830627]
    fill_normal(found, KEY, start=(1 << 32) - 3)
    assert found.tolist() == [0.37939584255218506, 1.1011097431182861, -1.6219394207000732]


def test_the_global_dtype_device_and_random_state_do_not_matter() -> None:
    before = numbers(1000)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            after = torch.empty(1000, dtype=torch.float32)
            fill_normal(after, tensor_key(0, "w"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(before, after)
    assert torch.equal(state, torch.get_rng_state())


def test_tensors_of_more_than_2_to_the_32_elements_are_refused() -> None:
    with pytest.raises(ValueError, match="element 4,294,967,296 cannot be initialized"):
        fill_normal(torch.empty(2), KEY, start=(1 << 32) - 1)


def test_the_moments_are_those_of_a_normal_distribution(many: Tensor) -> None:
    """Each within 4 standard errors, sqrt(variance of the estimate / n)."""
    n = many.numel()
    assert abs(many.mean()) < 4 * math.sqrt(1 / n)
    assert abs(many.square().mean() - 1) < 4 * math.sqrt(2 / n)
    assert abs(many.pow(3).mean()) < 4 * math.sqrt(15 / n)
    assert abs(many.pow(4).mean() - 3) < 4 * math.sqrt(96 / n) + 0.0006


@pytest.mark.slow
def test_the_distribution_is_normal_and_so_are_its_tails(many: Tensor) -> None:
    n = many.numel()
    ordered = many.sort().values
    expected = torch.special.ndtr(ordered)
    ranks = torch.arange(n, dtype=torch.float64) / n
    distance = torch.maximum(expected - ranks, ranks + 1 / n - expected).max()
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at a level of 0.001
    assert 4.5 < ordered[-1] < 6.2 and -6.2 < ordered[0] < -4.5
    for bound in (2.0, 3.0, 4.0, 4.5):
        wanted = n * 2 * torch.special.ndtr(torch.tensor(-bound, dtype=torch.float64))
        assert abs((many.abs() > bound).sum() - wanted) < 4 * wanted.sqrt() + 1, bound


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard errors."""
    return float((a * b).mean() * math.sqrt(a.numel()))


@pytest.mark.slow
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 64, 1000, 4096, 7168, 1 << 16, 1 << 17, 1 << 20])
def test_neighbours_are_not_correlated(many: Tensor, lag: int) -> None:
    a, b = many[:-lag], many[lag:]
    assert abs(correlation(a, b)) < 4
    assert abs(correlation(a.square() - 1, b.square() - 1)) < 8  # deviation 2 each way


def test_names_and_seeds_are_not_correlated() -> None:
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(40)]
    rows = [numbers(100_000, name=name) for name in names]
    rows += [numbers(100_000, seed=seed, name=names[0]) for seed in range(1, 41)]
    products = torch.stack(rows).double().corrcoef().fill_diagonal_(0) * math.sqrt(100_000)
    assert products.abs().max() < 5  # of 3,160 pairs
    assert abs(products.square().sum() / (80 * 79) - 1) < 0.1


def test_matrices_have_the_spectrum_of_random_ones() -> None:
    """Marchenko-Pastur: singular values of [n, n / 4] end at sqrt(n) * (1 +- 1 / 2)."""
    values = torch.linalg.svdvals(numbers(1024, 256))
    assert values.max() / 32 == pytest.approx(1.5, abs=0.04)
    assert values.min() / 32 == pytest.approx(0.5, abs=0.04)


def test_each_bit_of_an_index_and_each_other_key_changes_half_of_the_bits() -> None:
    """Avalanche: each of 32 output bits changes in half of the cases, within 5 standard errors."""
    n = 1 << 16
    indices = torch.arange(n, dtype=torch.int32)

    def hashed(flip: int, words: tuple[int, ...] = KEY) -> Tensor:
        x = (indices ^ flip) + (words[0] - (1 << 32) if words[0] >> 31 else words[0])
        _hash(x, words, torch.empty_like(x))
        return x

    def changed(before: Tensor, after: Tensor) -> Tensor:
        bits = (before ^ after).unsqueeze(-1) >> torch.arange(32, dtype=torch.int32) & 1
        return bits.double().mean(0)

    bound = 5 * 0.5 / math.sqrt(n)
    for bit in range(31):
        assert (changed(hashed(0), hashed(1 << bit)) - 0.5).abs().max() < bound, bit
    for i in range(32):
        other = tensor_key(i, "w")
        assert (changed(hashed(0), hashed(0, other)) - 0.5).abs().max() < bound, other
