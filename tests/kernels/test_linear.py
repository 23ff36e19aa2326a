"""Products in bfloat16, interpreted, against float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from backends.triton.tiles import BF16
from tests.support.kernels import KernelLoader, is_product, normal_bf16

SHAPES = [(1, 512, 256), (7, 3648, 96), (128, 192, 320), (300, 96, 72), (0, 128, 64), (33, 64, 24)]


@pytest.fixture
def module(kernels: KernelLoader, target: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file of V2-Lite, whose tiles serve the sizes of tests, too; new memory holds NaN."""
    found = kernels("linear", "deepseek_v2_lite", target)
    sizes = {n for _, *shape in SHAPES for n in shape}
    monkeypatch.setattr(found, "TILES", {n: found.TILES[2048] for n in sizes})
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    return found


@pytest.mark.parametrize(("rows", "out", "width"), SHAPES)
def test_linear(module: ModuleType, rows: int, out: int, width: int) -> None:
    x, w = normal_bf16(rows, width), normal_bf16(out, width, seed=1)
    y = module.linear(x, w)
    is_product(y, x, w.t())
    assert torch.equal(y, module.linear(x, w))


@pytest.mark.parametrize(("rows", "out", "width"), SHAPES)
def test_input_grad(module: ModuleType, rows: int, out: int, width: int) -> None:
    dy, w = normal_bf16(rows, out), normal_bf16(out, width, seed=1)
    is_product(module.linear_input_grad(dy, w), dy, w)


@pytest.mark.parametrize(("rows", "out", "width"), SHAPES)
def test_weight_grad(module: ModuleType, rows: int, out: int, width: int) -> None:
    dy, x = normal_bf16(rows, out), normal_bf16(rows, width, seed=1)
    is_product(module.linear_weight_grad(dy, x), dy.t(), x)


def test_batches_keep_their_shape(module: ModuleType) -> None:
    x, w = normal_bf16(2, 3, 256), normal_bf16(512, 256, seed=1)
    assert module.linear(x, w).shape == (2, 3, 512)
    assert module.linear_input_grad(module.linear(x, w), w).shape == x.shape
    assert module.linear_weight_grad(module.linear(x, w), x).shape == w.shape


def test_what_lies_beside_is_not_read(module: ModuleType) -> None:
    """Rows of a wider tensor, with NaN beyond the last row and column."""
    x, w = normal_bf16(5, 200), normal_bf16(96, 200, seed=1)
    wide = torch.full((8, 264), torch.nan, dtype=torch.bfloat16)
    wide[:5, :200] = x
    is_product(module.linear(wide[:5, :200], w), x, w.t())


def test_offsets_beyond_32_bits(kernels: KernelLoader) -> None:
    module, stride = kernels("linear", "deepseek_v2_lite"), 2**30
    memory = torch.empty(2 * stride + 64, dtype=torch.bfloat16)  # pages not touched are free
    x, w = memory.as_strided((3, 64), (stride, 1)), normal_bf16(2048, 64)
    x.copy_(normal_bf16(3, 64, seed=1))
    is_product(module.linear(x, w), x, w.t())


@pytest.mark.parametrize("name", BF16)
def test_every_tile(kernels: KernelLoader, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = kernels("linear", "deepseek_v2_lite", name)
    x, w = normal_bf16(70, 200), normal_bf16(320, 200)
    for tile in BF16[name]:
        made = module.Tile(tile.rows, tile.columns, tile.step, tile.warps, tile.stages)
        monkeypatch.setattr(module, "TILES", {320: [(None, made)]})
        is_product(module.linear(x, w), x, w.t())
