"""FP8 products, interpreted against the exact reference, and held to the figures of their peers."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch

from backends.render import render
from backends.triton.compiled import compile_kernels
from backends.triton.kernel import Arg as Argument
from backends.triton.kernel import Case, KernelFile
from backends.triton.package import kernels_package
from backends.triton.target import TARGETS
from backends.triton.tiles import BF16, FP8, GemmTile
from runtime import fp8
from tests.support.kernels import KernelLoader, agree, as_written, files_of, normal, poisoned

SHAPES = [
    (1, 512, 256),
    (7, 2112, 576),  # neither is a multiple of 128
    (128, 192, 1536),
    (500, 96, 200),
    (0, 128, 128),
    (33, 64, 24),  # shorter than a run
]


@pytest.fixture
def module(kernels: KernelLoader, target: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The file of V3, whose tiles serve the sizes of tests, too; new memory holds NaN."""
    found = kernels("fp8_linear", "deepseek_v3", target)
    sizes = {n for _, *shape in SHAPES for n in shape} | {64, 288}
    monkeypatch.setattr(found, "TILES", {n: found.TILES[7168] for n in sizes})
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    return found


@pytest.mark.parametrize(("rows", "out", "width"), SHAPES)
def test_linear(module: ModuleType, rows: int, out: int, width: int) -> None:
    x = fp8.quantize(normal(rows, width))
    w = fp8.quantize_weight(normal(out, width, seed=1))
    y = module.linear(*x, *w, dtype=torch.float32)
    agree(y, fp8.linear(*x, *w, dtype=torch.float32))
    assert torch.equal(y, module.linear(*x, *w, dtype=torch.float32))


@pytest.mark.parametrize(("rows", "out", "width"), SHAPES)
def test_input_grad(module: ModuleType, rows: int, out: int, width: int) -> None:
    dy = fp8.quantize(normal(rows, out), "ue8m0")
    w = fp8.quantize_weight(normal(out, width, seed=1))
    dx = module.linear_input_grad(*dy, *w, dtype=torch.float32)
    agree(dx, fp8.linear_input_grad(*dy, *w, dtype=torch.float32))


@pytest.mark.parametrize(("rows", "out", "width"), SHAPES)
def test_weight_grad(module: ModuleType, rows: int, out: int, width: int) -> None:
    dy, x = fp8.quantize_columns(normal(rows, out)), fp8.quantize_columns(normal(rows, width))
    dw = module.linear_weight_grad(*dy, *x, dtype=torch.float32)
    agree(dw, fp8.linear_weight_grad(*dy, *x, dtype=torch.float32))


def test_results_are_rounded_once(module: ModuleType) -> None:
    x, w = fp8.quantize(normal(2, 3, 256)), fp8.quantize_weight(normal(512, 256, seed=1))
    y, exact = module.linear(*x, *w, dtype=torch.bfloat16), fp8.linear(*x, *w, dtype=torch.float32)
    assert y.shape == (2, 3, 512)
    assert torch.allclose(y.float(), exact, rtol=2**-8, atol=1e-6)


def test_parts_begin_anew(module: ModuleType) -> None:
    parts = (96, 192)
    w = fp8.quantize_weight(normal(288, 64, seed=1), parts=parts)
    module.TILES.update({n: module.TILES[64] for n in parts})
    x, dy = fp8.quantize(normal(5, 64)), fp8.quantize(normal(5, 288), parts=parts)
    wanted = {"dtype": torch.float32, "parts": parts}
    agree(module.linear(*x, *w, **wanted), fp8.linear(*x, *w, **wanted))
    agree(module.linear_input_grad(*dy, *w, **wanted), fp8.linear_input_grad(*dy, *w, **wanted))


@pytest.mark.parametrize("value", [0.0, 1e30, -448.0])
def test_extreme_numbers(module: ModuleType, value: float) -> None:
    x = fp8.quantize(torch.full((3, 256), value))
    w = fp8.quantize_weight(normal(512, 256))
    agree(module.linear(*x, *w, dtype=torch.float32), fp8.linear(*x, *w, dtype=torch.float32))


def test_numbers_without_end_spoil_their_row_only(module: ModuleType) -> None:
    x = normal(20, 200)
    x[3, 150] = torch.inf
    x[5, 0] = torch.nan
    q, w = fp8.quantize(x), fp8.quantize_weight(normal(512, 200))
    y = module.linear(*q, *w, dtype=torch.float32)
    expected = fp8.linear(*q, *w, dtype=torch.float32)
    assert torch.equal(y.isfinite(), expected.isfinite())
    fine = [n for n in range(20) if n not in (3, 5)]
    agree(y[fine], expected[fine])


def test_what_lies_beside_is_not_read(module: ModuleType) -> None:
    """Rows of a wider tensor, with NaN beyond the last row and column."""
    x, w = fp8.quantize(normal(5, 208)), fp8.quantize_weight(normal(96, 208))
    rows = torch.full((8, 256), 0x7F, dtype=torch.uint8)
    rows[:5, :208] = x[0].view(torch.uint8)
    scales = torch.full((8, 4), torch.nan)
    scales[:5, :2] = x[1]
    inside = rows.view(torch.float8_e4m3fn)[:5, :208], scales[:5, :2]
    y = module.linear(*inside, *w, dtype=torch.float32)
    agree(y, fp8.linear(*x, *w, dtype=torch.float32))


def test_offsets_beyond_32_bits(kernels: KernelLoader) -> None:
    module, stride = kernels("fp8_linear", "deepseek_v3"), 2**30 + 16
    memory = torch.empty(2 * stride + 256, dtype=torch.uint8)  # pages that nobody touches are free
    x, w = fp8.quantize(normal(3, 256)), fp8.quantize_weight(normal(512, 256))
    far = memory.as_strided((3, 256), (stride, 1))
    far.copy_(x[0].view(torch.uint8))
    y = module.linear(far.view(torch.float8_e4m3fn), x[1], *w, dtype=torch.float32)
    agree(y, fp8.linear(*x, *w, dtype=torch.float32))


@pytest.mark.parametrize("name", FP8)
def test_every_tile(kernels: KernelLoader, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = kernels("fp8_linear", "deepseek_v3", name)
    x, w = fp8.quantize(normal(70, 384)), fp8.quantize_weight(normal(320, 384))
    expected = fp8.linear(*x, *w, dtype=torch.float32)
    for tile in FP8[name]:
        monkeypatch.setattr(module, "TILES", {320: [(None, as_written(module, tile))]})
        agree(module.linear(*x, *w, dtype=torch.float32), expected)


PEERS = {
    (16, 128): (76, 164),
    (32, 128): (96, 235),
    (64, 64): (63, 119),
    (64, 128): (106, 160),
    (128, 128): (170, 232),
}
"""The best public Triton kernel for each tile on sm_90, at K = 7168: registers, and instructions in
the loop for 128 of K (DeepSeek-V3's `kernel.py` up to 64 x 128, torchao for 128 x 128), counted in
the same way as ours with Triton 3.7.1."""


@pytest.mark.slow
def test_tiles_need_less_than_those_of_peers() -> None:
    """No more registers, at most three quarters of the instructions, FP8 tensor cores, no spill."""
    rows = _compiled([tile for tile in FP8["sm_90"] if (tile.rows, tile.columns) in PEERS])
    assert len(rows) == 2 * len(PEERS)
    for row in rows:
        found, constants = row["metrics"], row["constants"]
        registers, instructions = PEERS[constants["BLOCK_M"], constants["BLOCK_N"]]
        assert found["registers"] <= registers, row
        assert found["hot"] / (constants["BLOCK_K"] // 128) <= 0.75 * instructions, row
        assert set(found["matrix"]) == {"QGMMA"} and not found["spilled_bytes"], row


def _compiled(tiles: Sequence[GemmTile]) -> list[dict[str, Any]]:
    """Each tile for a number of columns of its own; with a width of whole runs, and another."""
    target, columns = TARGETS["sm_90"], {2048 + 128 * n: tile for n, tile in enumerate(tiles)}
    text = render(
        "triton/fp8_linear.py.jinja",
        target=target,
        kinds=["fp8_linear"],
        products=True,
        tiles={n: ((None, tile),) for n, tile in columns.items()},
        block_k=256,
    )
    cases = tuple(_case(out, width) for out in columns for width in (7168, 7168 + 64))
    file = KernelFile("fp8_linear", text, {"fp8.linear": "float8_e4m3fn"}, cases)
    return compile_kernels([file], kernels_package([file], target), target)


def _case(out: int, width: int) -> Case:
    shapes = (128, width), (128, -(-width // 128)), (out, width), (out // 128, -(-width // 128))
    operands = [Argument(s, "float32" if n % 2 else "float8_e4m3fn") for n, s in enumerate(shapes)]
    return Case(f"{out}x{width}", "linear", tuple(operands), {"dtype": "bfloat16"}, bound_by="fp8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "name", "tiles"),
    [
        ("deepseek_v3", "fp8_grouped_linear", FP8),
        ("deepseek_v2_lite", "grouped_linear", BF16),
    ],
)
def test_warps_of_sm_100_have_work_of_their_own(
    spec: str, name: str, tiles: dict[str, Sequence[GemmTile]]
) -> None:
    """Triton drops `warp_specialize` without a word where it cannot: more warps, or it did not."""
    (file,) = (f for f in files_of(spec, "sm_100") if f.name == name)
    target = TARGETS["sm_100"]
    rows = compile_kernels([file], kernels_package([file], target), target)
    asked = {(t.rows, t.columns): t.warps for t in tiles["sm_100"]}
    found = [row for row in rows if row["kernel"] == name.removeprefix("fp8_") + "_kernel"]
    assert found
    for row in found:
        place = row["constants"]["BLOCK_M"], row["constants"]["BLOCK_N"]
        assert row["warps"] == asked[place] + 4, row
