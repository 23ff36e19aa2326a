"""Products in bfloat16 of the slots of experts, interpreted, against float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from backends.triton.tiles import BF16
from tests.support.kernels import COUNTS, KernelLoader, ends_of, is_product, normal_bf16

OUT, WIDTH = 192, 104  # not a multiple of what a turn of the loop takes


@pytest.fixture
def module(kernels: KernelLoader, target: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file of V2-Lite, whose tiles serve the sizes of tests, too; new memory holds NaN."""
    found = kernels("grouped_linear", "deepseek_v2_lite", target)
    monkeypatch.setattr(found, "TILES", {n: found.TILES[2048] for n in (OUT, WIDTH)})
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    return found


@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_linear(module: ModuleType, counts: tuple[int, ...]) -> None:
    x, w = normal_bf16(sum(counts), WIDTH), normal_bf16(len(counts), OUT, WIDTH, seed=1)
    y = module.grouped_linear(x, ends_of(counts), w)
    assert y.shape == (sum(counts), OUT)
    for rows, made, matrix in zip(x.split(counts), y.split(counts), w, strict=True):
        is_product(made, rows, matrix.t())
    assert torch.equal(y, module.grouped_linear(x, ends_of(counts), w))


@pytest.mark.parametrize("counts", COUNTS)
def test_input_grad(module: ModuleType, counts: tuple[int, ...]) -> None:
    dy, w = normal_bf16(sum(counts), OUT), normal_bf16(len(counts), OUT, WIDTH, seed=1)
    dx = module.grouped_linear_input_grad(dy, ends_of(counts), w)
    assert dx.shape == (sum(counts), WIDTH)
    for rows, made, matrix in zip(dy.split(counts), dx.split(counts), w, strict=True):
        is_product(made, rows, matrix)


@pytest.mark.parametrize("counts", COUNTS)
def test_weight_grad(module: ModuleType, counts: tuple[int, ...]) -> None:
    dy, x = normal_bf16(sum(counts), OUT), normal_bf16(sum(counts), WIDTH, seed=1)
    dw = module.grouped_linear_weight_grad(dy, x, ends_of(counts))
    assert dw.shape == (len(counts), OUT, WIDTH)
    for made, a, b in zip(dw, dy.split(counts), x.split(counts), strict=True):
        is_product(made, a.t(), b)


def test_slots_of_other_experts_do_not_leak(module: ModuleType) -> None:
    counts, dy, x = (4, 3, 0), normal_bf16(7, OUT), normal_bf16(7, WIDTH, seed=1)
    w = normal_bf16(3, OUT, WIDTH, seed=2)
    x[4], w[2] = torch.nan, torch.inf
    y = module.grouped_linear(x, ends_of(counts), w)
    assert y.isfinite().all(1).tolist() == [True] * 4 + [False] + [True] * 2
    dw = module.grouped_linear_weight_grad(dy, x, ends_of(counts))
    assert dw.isfinite().all(2).all(1).tolist() == [True, False, True]
    assert module.grouped_linear_input_grad(dy, ends_of(counts), w).isfinite().all()


@pytest.mark.parametrize("name", BF16)
def test_every_tile(kernels: KernelLoader, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, counts = kernels("grouped_linear", "deepseek_v2_lite", name), (70, 0, 30)
    x, w = normal_bf16(100, 200), normal_bf16(3, 320, 200)
    for tile in BF16[name]:
        made = module.Tile(tile.rows, tile.columns, tile.step, tile.warps, tile.stages)
        monkeypatch.setattr(module, "TILES", {320: [(None, made)]})
        y = module.grouped_linear(x, ends_of(counts), w).split(counts)
        for rows, found, matrix in zip(x.split(counts), y, w, strict=True):
            is_product(found, rows, matrix.t())
