"""FP8 products of the slots of experts, interpreted, against the exact reference."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from backends.triton.tiles import FP8_GROUPED
from runtime import fp8
from tests.support.kernels import COUNTS, KernelLoader, agree, as_written, ends_of, normal, poisoned

OUT, WIDTH = 192, 328  # neither is a multiple of 128


@pytest.fixture
def module(kernels: KernelLoader, target: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file of V3, whose tiles serve the sizes of tests, too; new memory holds NaN."""
    found = kernels("fp8_grouped_linear", "deepseek_v3", target)
    monkeypatch.setattr(found, "TILES", {n: found.TILES[7168] for n in (OUT, WIDTH, 96, 288)})
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    return found


@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_linear(module: ModuleType, counts: tuple[int, ...]) -> None:
    x, ends = fp8.quantize(normal(sum(counts), WIDTH)), ends_of(counts)
    w = fp8.quantize_weight(normal(len(counts), OUT, WIDTH, seed=1))
    y = module.grouped_linear(*x, ends, *w, dtype=torch.float32)
    agree(y, fp8.grouped_linear(*x, ends, *w, dtype=torch.float32))
    assert torch.equal(y, module.grouped_linear(*x, ends, *w, dtype=torch.float32))


@pytest.mark.parametrize("counts", COUNTS)
def test_input_grad(module: ModuleType, counts: tuple[int, ...]) -> None:
    dy, ends = fp8.quantize(normal(sum(counts), OUT)), ends_of(counts)
    w = fp8.quantize_weight(normal(len(counts), OUT, WIDTH, seed=1))
    dx = module.grouped_linear_input_grad(*dy, ends, *w, dtype=torch.float32)
    agree(dx, fp8.grouped_linear_input_grad(*dy, ends, *w, dtype=torch.float32))


@pytest.mark.parametrize("counts", COUNTS)
def test_weight_grad(module: ModuleType, counts: tuple[int, ...]) -> None:
    ends = ends_of(counts)
    dy = fp8.quantize_columns(normal(sum(counts), OUT), ends)
    x = fp8.quantize_columns(normal(sum(counts), WIDTH, seed=1), ends)
    dw = module.grouped_linear_weight_grad(*dy, *x, ends, dtype=torch.float32)
    agree(dw, fp8.grouped_linear_weight_grad(*dy, *x, ends, dtype=torch.float32))
    assert not any(dw[e].any() for e, count in enumerate(counts) if not count)


def test_tiles_of_tokens_between_experts_are_not_read(module: ModuleType) -> None:
    counts, out, width = (3, 140, 0, 2), 64, 96
    ends = ends_of(counts)
    q, s = fp8.quantize_columns(normal(sum(counts), out), ends)
    x = fp8.quantize_columns(normal(sum(counts), width, seed=1), ends)
    expected = fp8.grouped_linear_weight_grad(q, s, *x, ends, dtype=torch.float32)
    used = {
        b // 128 + e + i for e, (b, n) in enumerate(_begins(counts)) for i in range(-(-n // 128))
    }
    spare = [tile for tile in range(len(q)) if tile not in used]
    assert spare
    q.view(torch.uint8)[spare], s[spare] = 0x7F, torch.nan
    agree(module.grouped_linear_weight_grad(q, s, *x, ends, dtype=torch.float32), expected)


def _begins(counts: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(sum(counts[:e]), count) for e, count in enumerate(counts)]


def test_numbers_without_end_spoil_their_row_only(module: ModuleType) -> None:
    counts, x = (4, 3), normal(7, WIDTH)
    x[4] = torch.nan  # the first slot of the second expert, beside the last of the first
    q, ends = fp8.quantize(x), ends_of(counts)
    w = fp8.quantize_weight(normal(2, OUT, WIDTH, seed=1))
    y = module.grouped_linear(*q, ends, *w, dtype=torch.float32)
    assert y.isfinite().all(1).tolist() == [True] * 4 + [False] + [True] * 2


def test_parts_begin_anew(module: ModuleType) -> None:
    parts, ends, wanted = (96, 192), ends_of((3, 0, 4)), {"dtype": torch.float32}
    w = fp8.quantize_weight(normal(3, 288, 96, seed=1), parts=parts)
    x, dy = fp8.quantize(normal(7, 96)), fp8.quantize(normal(7, 288), parts=parts)
    y = module.grouped_linear(*x, ends, *w, parts=parts, **wanted)
    agree(y, fp8.grouped_linear(*x, ends, *w, parts=parts, **wanted))
    dx = module.grouped_linear_input_grad(*dy, ends, *w, parts=parts, **wanted)
    agree(dx, fp8.grouped_linear_input_grad(*dy, ends, *w, parts=parts, **wanted))


@pytest.mark.parametrize("name", FP8_GROUPED)
def test_every_tile(kernels: KernelLoader, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, ends = kernels("fp8_grouped_linear", "deepseek_v3", name), ends_of((70, 0, 30))
    x, w = fp8.quantize(normal(100, 384)), fp8.quantize_weight(normal(3, 320, 384, seed=1))
    expected = fp8.grouped_linear(*x, ends, *w, dtype=torch.float32)
    for tile in FP8_GROUPED[name]:
        monkeypatch.setattr(module, "TILES", {320: [(None, as_written(module, tile))]})
        agree(module.grouped_linear(*x, ends, *w, dtype=torch.float32), expected)


def test_few_slots_launch_few_programs(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many experts there are, a slot needs no more than its own tiles."""
    grids = []
    launch = type(module.grouped_linear_kernel).__getitem__

    def seen(kernel: object, grid: tuple[int, ...]) -> object:
        grids.append(grid)
        return launch(kernel, grid)

    monkeypatch.setattr(type(module.grouped_linear_kernel), "__getitem__", seen)
    counts = (0,) * 30 + (1,) + (0,) * 33
    x, w = fp8.quantize(normal(1, 96)), fp8.quantize_weight(normal(64, 288, 96))
    module.grouped_linear(*x, ends_of(counts), *w, dtype=torch.float32)
    assert max(grids[-1]) <= -(-288 // 64)
