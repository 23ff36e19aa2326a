"""Libraries in place of kernels: which are called when, and what they are called with.

Stand-ins compute in torch what a library would. Torch itself is asked whether it would take the
arguments on a GPU: its dispatcher checks the signature, its shape functions types and strides.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import ScalingType
from torch.nn.functional import scaled_mm as torch_scaled_mm

from backends.render import render
from backends.triton.kernel import Arg, Case
from backends.triton.launches import load
from backends.triton.libraries import Ranges, Shape, size_of, table
from backends.triton.package import LIBRARIES, kernel_files, kernels_package
from backends.triton.target import TARGETS
from backends.triton.tuning_table import RowRange, TuningTable, shipped
from compiler.pipeline import compile
from dsl.diagnostic import DiagnosticError
from dsl.load import Description
from dsl.load import load as load_spec
from runtime import fp8, functional, gradients
from tests.support.kernels import KernelLoader, difference, is_product, normal_bf16
from tests.support.places import ROOT

SM_90 = TARGETS["sm_90"]


def spec(*sets: str) -> Description:
    return load_spec(ROOT / "specs/deepseek_v3_tiny.yaml", sets=list(sets))


FP8_TINY = spec("precision.policy=fp8_blockwise")
PROGRAMS = compile(FP8_TINY).programs


def names_of(tuning: TuningTable, description: Description = FP8_TINY) -> list[str]:
    return [file.name for file in kernel_files(PROGRAMS, description, SM_90, tuning)]


# ---- who serves ------------------------------------------------------------------------------


def test_ranges_of_rows_follow_from_what_was_measured() -> None:
    files = ("own", "library", "other")
    key = "F.linear 8x16"
    names = {1: "own", 16: "library", 64: "library", 128: "own", 4096: "other"}
    measured = TuningTable({f"{key} m{rows}": name for rows, name in names.items()})
    assert measured.ranges(key, files) == [
        RowRange(1, 1, "own"),
        RowRange(2, 64, "library"),
        RowRange(65, 128, "own"),
        RowRange(129, None, "other"),
    ]
    assert measured.ranges("F.linear 8x1", files) == [RowRange(1, None, "own")]  # not measured
    with pytest.raises(DiagnosticError, match="'gone'"):
        TuningTable({f"{key} m1": "gone"}).ranges(key, files)


def test_nothing_is_called_that_was_not_measured() -> None:
    names = names_of(TuningTable())
    assert names and not set(names) & {library.name for library in LIBRARIES}


def test_a_build_calls_what_was_measured_and_says_when() -> None:
    first = TuningTable()
    kernel_files(PROGRAMS, FP8_TINY, SM_90, first)
    (key, *_) = (key for key in first.files if key.startswith("F.linear ") and key.endswith(" m1"))
    what = key.removesuffix(" m1")
    shape = tuple(map(int, what.split()[1].split("x")))
    measured = TuningTable({f"{what} m1": "linear", f"{what} m16": "cublas"})
    files = kernel_files(PROGRAMS, FP8_TINY, SM_90, measured)
    (file,) = (file for file in files if file.library)
    assert file.name == "cublas" and f"{shape}: [(2, inf)]" in file.text
    rows = {size_of(case)[1] for case in file.cases}
    assert min(rows) == 16 and {size_of(case)[0] for case in file.cases} == {shape}
    text = kernels_package(files, SM_90)["kernels/__init__.py"]
    assert f"# cublas: 2 rows or more of {what.split()[1]}\n" in text
    assert 'linear = kernel(torch_F.linear, torch.bfloat16, "cublas", "linear")' in text
    # A spec can ask for kernels of dslc alone.
    own = names_of(measured, spec("precision.policy=fp8_blockwise", "kernels.products=triton"))
    assert "cublas" not in own


def test_a_spec_asks_for_a_library_at_any_size() -> None:
    asked = spec("precision.policy=fp8_blockwise", "kernels.products=deep_gemm")
    files = kernel_files(PROGRAMS, asked, SM_90, TuningTable())
    (file,) = (file for file in files if file.library)
    assert file.name == "deep_gemm" and "FASTEST" not in file.text and not file.when
    assert not any(f.library for f in kernel_files(PROGRAMS, asked, TARGETS["sm_100"]))


def test_what_is_shipped_names_files_that_can_serve() -> None:
    """Its keys are those of V3, and its GPU, versions and figures are there."""
    h200 = shipped("sm_90")
    by_name = {library.name: library for library in LIBRARIES}
    for key, name in h200.measured.items():
        path = key.split()[0]
        assert name in ("fp8_linear", "linear") or path in by_name[name].serves, key
    assert h200.measured["fp8.linear 24576x1536 m1"] == "fp8_linear"
    assert h200.measured["fp8.linear 24576x1536 m4096"] == "fp8_cublas"
    assert not any(key.startswith("G.") for key in h200.measured)  # gradients were not measured
    assert not shipped("gfx942").measured


def test_sizes_of_cases() -> None:
    def size(function: str, *shapes: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        return size_of(Case("", function, tuple(map(Arg, shapes))))

    assert size("linear", (5, 8), (16, 8)) == ((16, 8), 5)
    assert size("linear", (5, 8), (5, 1), (16, 8), (1, 1)) == ((16, 8), 5)
    assert size("linear_weight_grad", (5, 16), (5, 8)) == ((16, 8), 5)
    tiles = ((2, 16, 128), (2, 16), (2, 8, 128), (2, 8))
    assert size("linear_weight_grad", *tiles) == ((16, 8), 256)
    assert size("grouped_linear", (5, 8), (4,), (4, 16, 8)) == ((4, 16, 8), 5)
    assert size("attention", (1, 7, 4, 24), (1, 7, 4, 24), (1, 7, 4, 16)) == ((4, 24, 16), 7)
    assert size("latent_attention", (3, 1, 4, 8), (3, 1, 4, 2), (3, 9, 8), (3, 9, 2)) == ((4, 1), 3)


# ---- torch's own -----------------------------------------------------------------------------


def written(tmp_path: Path, name: str, shapes: Mapping[str, Sequence[Shape]]) -> Any:
    """A library's file that serves functions at some shapes, whatever the number of rows."""
    anywhere: Ranges = [(1, None)]
    fastest = {function: dict.fromkeys(known, anywhere) for function, known in shapes.items()}
    text = render(f"triton/{name}.py.jinja", functions=list(shapes), fastest=table(fastest))
    (tmp_path / f"{name}.py").write_text(text)
    return load(tmp_path / f"{name}.py")


def on_gpu(mode: FakeTensorMode, x: Tensor) -> Tensor:
    with mode:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, of_a: ScalingType, scale_b: Tensor, of_b: ScalingType,
    *, output_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """torch's, which is asked whether it would take this on a GPU, by the reference."""
    mode = FakeTensorMode()
    a_, b_, scale_a_, scale_b_ = (on_gpu(mode, x) for x in (a, b, scale_a, scale_b))
    with mode:
        torch_scaled_mm(a_, b_, scale_a_, of_a, scale_b_, of_b, output_dtype=output_dtype)
    if of_b is ScalingType.BlockWise128x128:
        return fp8.linear(a, scale_a, b.t(), scale_b.t(), dtype=output_dtype)
    tiles = [x.reshape(len(x), -1, 128).transpose(0, 1) for x in (a, b.t())]
    return fp8.linear_weight_grad(tiles[0], scale_a.t(), tiles[1], scale_b.t(), dtype=output_dtype)


@pytest.fixture
def fp8_cublas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    shape = (512, 1024)
    functions = ("linear", "linear_input_grad", "linear_weight_grad")
    module = written(tmp_path, "fp8_cublas", {name: [shape] for name in functions})
    monkeypatch.setattr(module, "SUPPORTED", True)
    monkeypatch.setattr(module, "scaled_mm", scaled_mm)
    return module


@pytest.mark.parametrize("rows", [(1,), (2, 3), (1, 129)])
def test_fp8_products_by_cublas(fp8_cublas: Any, rows: tuple[int, ...]) -> None:
    """Scales of rows and weights as torch wants them, also of one row; the reference's bits."""
    w = fp8.quantize_weight(torch.randn(512, 1024))
    x, dy = torch.randn(*rows, 1024), torch.randn(*rows, 512)
    for function, operand in (("linear", x), ("linear_input_grad", dy)):
        arguments = (*fp8.quantize(operand), *w)
        found = getattr(fp8_cublas, function)(*arguments, dtype=torch.bfloat16)
        expected = getattr(fp8, function)(*arguments, dtype=torch.bfloat16)
        assert torch.equal(found, expected)
    tiles = (*fp8.quantize_columns(dy), *fp8.quantize_columns(x))
    found = fp8_cublas.linear_weight_grad(*tiles, dtype=torch.bfloat16)
    assert torch.equal(found, fp8.linear_weight_grad(*tiles, dtype=torch.bfloat16))


def test_scales_that_lie_by_columns_are_not_copied(fp8_cublas: Any) -> None:
    scales = torch.randn(4, 3).t()
    assert fp8_cublas.by_columns(scales) is scales
    assert fp8_cublas.by_columns(scales.contiguous()).stride() == (1, 3)


def test_arguments_that_torch_refuses_fail_here(fp8_cublas: Any) -> None:
    (q, s), (wq, ws) = (
        fp8.quantize(torch.randn(4, 1024)),
        fp8.quantize_weight(torch.randn(512, 1024)),
    )
    of = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    with pytest.raises(RuntimeError, match="1x128 x 128x128 blockwise"):  # scales by rows
        scaled_mm(q, wq.t(), s, of[0], ws.t(), of[1], output_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="col_major"):  # columns of a weight lie together
        turned, scales = wq.t().contiguous(), fp8_cublas.by_columns(s)
        scaled_mm(q, turned, scales, of[0], ws.t(), of[1], output_dtype=torch.bfloat16)


def test_fp8_products_that_cublas_has_not(fp8_cublas: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(
        rows: int = 3,
        out: int = 512,
        parts: Sequence[int] = (),
        dtype: torch.dtype = torch.bfloat16,
    ) -> Any:
        x, w = torch.randn(rows, 1024), torch.randn(out, 1024)
        arguments = *fp8.quantize(x), *fp8.quantize_weight(w, parts=parts)
        return fp8_cublas.linear(*arguments, dtype=dtype, parts=parts)

    assert call() is not NotImplemented
    assert call(out=640) is NotImplemented  # not measured
    assert call(rows=0) is NotImplemented
    assert call(parts=(100, 412)) is NotImplemented  # blocks restart within a block
    assert call(dtype=torch.float32) is NotImplemented
    monkeypatch.setattr(fp8_cublas, "SUPPORTED", False)
    assert call() is NotImplemented


def test_which_fp8_products_fit() -> None:
    (library,) = (one for one in LIBRARIES if one.name == "fp8_cublas")

    def fits(function: str, out: int, width: int, **keywords: Any) -> bool:
        shapes = ((4, 1), (4, 1), (out, width), (1, 1))
        return bool(library.fits(Case("", function, tuple(map(Arg, shapes)), keywords)))

    assert fits("linear", 2112, 7168) and not fits("linear_input_grad", 2112, 7168)
    assert fits("linear_input_grad", 24576, 1536)
    assert not fits("linear", 2112, 640)  # five scales in a row, where torch wants eight
    assert not fits("linear", 2100, 7168)
    assert fits("linear", 768, 512, parts=(256, 512))
    assert not fits("linear", 768, 512, parts=(100, 668))


def test_bf16_products_by_cublas(tmp_path: Path) -> None:
    shape, experts = (24, 16), (3, 24, 16)
    products = ("linear", "linear_input_grad", "linear_weight_grad")
    grouped = ("grouped_linear", "grouped_linear_input_grad")
    shapes = {name: [shape] for name in products} | {name: [experts] for name in grouped}
    module = written(tmp_path, "cublas", shapes)
    x, dy, w = normal_bf16(2, 5, 16), normal_bf16(2, 5, 24, seed=1), normal_bf16(24, 16, seed=2)
    is_product(module.linear(x, w).flatten(0, 1), x.flatten(0, 1), w.t())
    is_product(module.linear_input_grad(dy, w).flatten(0, 1), dy.flatten(0, 1), w)
    is_product(module.linear_weight_grad(dy, x), dy.flatten(0, 1).t(), x.flatten(0, 1))
    assert module.linear(x, w[:16]) is NotImplemented
    mode = FakeTensorMode()
    offs, many = torch.tensor([2, 2, 5], dtype=torch.int32), normal_bf16(3, 24, 16)
    for function, rows in (("grouped_linear", x[0]), ("grouped_linear_input_grad", dy[0])):
        call = getattr(module, function)
        on_cpu = call(rows, offs, many)
        reference = getattr(functional if function == "grouped_linear" else gradients, function)
        assert difference(on_cpu, reference(rows, offs, many)) < 5e-6
        with mode:
            fake = call(*(on_gpu(mode, t) for t in (rows, offs, many)))
        assert fake.shape == on_cpu.shape and fake.device.type == "cuda"


# ---- attention -------------------------------------------------------------------------------


ATTENTIONS = {name: [(4, 24, 16)] for name in ("attention", "attention_saving")}


def cudnn_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, compute_log_sumexp: bool,
    dropout_p: float = 0.0, is_causal: bool = False, return_debug_mask: bool = False,
    *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """What cuDNN gives, in float32: the output in the layout of the queries, and the natural
    logarithm of the sum of exponentials [batch, heads, query, 1]."""
    assert attn_bias is None and compute_log_sumexp and is_causal and not dropout_p and scale
    assert value.transpose(1, 2).is_contiguous()
    score = query.float() @ key.float().transpose(-1, -2) * scale
    score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), -torch.inf)
    o = (score.softmax(-1) @ value.float()).to(query.dtype)
    o = o.transpose(1, 2).contiguous().transpose(1, 2)
    none = query.new_empty(0)
    lse, sizes = score.logsumexp(-1, keepdim=True), (query.shape[2], key.shape[2])
    return o, lse, none, none, *sizes, none.long(), none.long(), none


@pytest.fixture
def cudnn() -> Iterator[None]:
    """`aten::_scaled_dot_product_cudnn_attention` on the CPU; torch's dispatcher calls it."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_dot_product_cudnn_attention", cudnn_attention, "CPU")
        yield


def attention_operands(queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values are a part of something wider, as they are in MLA."""
    q, k = (normal_bf16(2, queries, 4, 24, seed=seed) for seed in (0, 1))
    return q, k, normal_bf16(2, queries, 4, 32, seed=2)[..., 16:]


@pytest.mark.usefixtures("cudnn")
def test_attention_saves_what_the_kernel_of_its_gradient_reads(
    tmp_path: Path, kernels: KernelLoader
) -> None:
    """Forward by cuDNN, backward by the kernel of a build: gradients as in float32."""
    file = written(tmp_path, "sdpa", ATTENTIONS)
    own = kernels("attention", "deepseek_v3_tiny", "sm_90")
    q, k, v = attention_operands(17)
    o, lse = file.attention_saving(q, k, v, 0.2)
    own_o, own_lse = own.attention_saving(q, k, v, 0.2)
    assert (o.shape, o.dtype) == (own_o.shape, own_o.dtype) and o.is_contiguous()
    assert lse.dtype == torch.float32 and (lse - own_lse).abs().max() < 1e-5
    assert difference(o, own_o) < 5e-6 and difference(file.attention(q, k, v, 0.2), own_o) < 5e-6

    wide = [x.float().requires_grad_() for x in (q, k, v)]
    d = normal_bf16(2, 17, 4, 16, seed=3)
    out = functional.attention(wide[0], wide[1], wide[2], 0.2)
    expected = torch.autograd.grad(out, wide, d.float())
    found = own.attention_grad(d, q, k, v, o, lse, 0.2)
    for gradient, exact in zip(found, expected, strict=True):
        assert difference(gradient.float(), exact) < 2e-5
    to_base_2 = own.attention_grad(d, q, k, v, o, lse / 0.6931, 0.2)
    assert difference(to_base_2[0].float(), expected[0]) > 1e-3


@pytest.mark.usefixtures("cudnn")
def test_attentions_that_are_left_to_the_kernel(tmp_path: Path) -> None:
    file = written(tmp_path, "sdpa", ATTENTIONS)
    q, k, v = attention_operands(17)
    for function in (file.attention, file.attention_saving):
        assert function(q[:, -3:], k, v, 0.2) is NotImplemented  # keys of a cache come before
        assert function(q[:, :1], k[:, :1], v[:, :1], 0.2) is NotImplemented
        assert function(q, k[:, :, :2], v[:, :, :2], 0.2) is NotImplemented
        assert function(q[:, :, :2], k[:, :, :2], v[:, :, :2], 0.2) is NotImplemented


def test_cudnn_is_called_as_torch_declares_it(tmp_path: Path) -> None:
    """By torch's own shape function, at the sizes of V3."""
    file = written(tmp_path, "sdpa", {"attention_saving": [(128, 192, 128)]})
    q, k = (torch.empty(1, 4096, 128, 192, dtype=torch.bfloat16, device="meta") for _ in "qk")
    v = torch.empty(1, 4096, 128, 256, dtype=torch.bfloat16, device="meta")[..., 128:]
    o, lse = file.attention_saving(q, k, v, 0.1)
    assert o.shape == (1, 4096, 128, 128) and lse.shape == (1, 4096, 128)


# ---- what is installed apart -----------------------------------------------------------------


def asked(tmp_path: Path, name: str) -> Any:
    """The file of a library that a spec asks for."""
    (tmp_path / f"{name}.py").write_text(
        render(f"triton/{name}.py.jinja", functions=[], fastest="")
    )
    return load(tmp_path / f"{name}.py")


@pytest.fixture
def deep_gemm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The file of a build, over a stand-in that has the library's contract."""

    def fp8_gemm_nt(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor) -> None:
        (q, s), (wq, ws) = a, b
        assert q.dim() == wq.dim() == 2 and q.shape[1] == wq.shape[1]
        assert s.shape == (len(q), -(-q.shape[1] // 128)) and s.dtype == torch.float32
        assert ws.shape == (-(-wq.shape[0] // 128), -(-wq.shape[1] // 128))
        assert d.shape == (len(q), len(wq)) and d.dtype == torch.bfloat16
        d.copy_(fp8.linear(q, s, wq, ws, dtype=d.dtype))

    library = types.ModuleType("deep_gemm")
    vars(library)["fp8_gemm_nt"] = fp8_gemm_nt
    monkeypatch.setitem(sys.modules, "deep_gemm", library)
    return asked(tmp_path, "deep_gemm")


def test_deep_gemm(deep_gemm: Any, tmp_path: Path) -> None:
    x, w = torch.randn(2, 3, 256), torch.randn(384, 256)
    arguments = *fp8.quantize(x), *fp8.quantize_weight(w)
    found = deep_gemm.linear(*arguments, dtype=torch.bfloat16)
    assert torch.equal(found, fp8.linear(*arguments, dtype=torch.bfloat16))
    measured = written(tmp_path, "deep_gemm", {"linear": [(384, 128)]})
    assert measured.linear(*arguments, dtype=torch.bfloat16) is NotImplemented


@pytest.mark.parametrize("parts", [(64, 320), (100, 284)])
def test_deep_gemm_has_no_blocks_that_begin_anew(deep_gemm: Any, parts: tuple[int, ...]) -> None:
    x, w = torch.randn(3, 256), torch.randn(384, 256)
    arguments = *fp8.quantize(x), *fp8.quantize_weight(w, parts=parts)
    assert deep_gemm.linear(*arguments, dtype=torch.bfloat16, parts=parts) is NotImplemented


def test_flash_mla(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def with_kvcache(
        q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, v: int, meta: str, splits: None,
        *, softmax_scale: float, causal: bool,
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert cache.shape[1:] == (64, 1, 576) and v == 512 and meta == "plan" and causal
        (length,) = set(lengths.tolist())
        rows = cache[table.long()].flatten(1, 3)[:, :length]
        latents = rows[..., :512], rows[..., 512:]
        parts = q[..., :512], q[..., 512:]
        return functional.latent_attention(*parts, *latents, softmax_scale), None

    library = types.ModuleType("flash_mla")
    vars(library)["flash_mla_with_kvcache"] = with_kvcache
    vars(library)["get_mla_metadata"] = lambda *_: ("plan", None)
    monkeypatch.setitem(sys.modules, "flash_mla", library)
    file = asked(tmp_path, "flash_mla")
    q, rope = torch.randn(2, 1, 4, 512).bfloat16(), torch.randn(2, 1, 4, 64).bfloat16()
    latents, key = torch.randn(2, 70, 512).bfloat16(), torch.randn(2, 70, 64).bfloat16()
    found = file.latent_attention(q, rope, latents, key, 0.1)
    assert torch.equal(found, functional.latent_attention(q, rope, latents, key, 0.1))
    assert file.latent_attention(q, rope, latents[:, :0], key[:, :0], 0.1) is NotImplemented
    measured = written(tmp_path, "flash_mla", {"latent_attention": [(4, 1)]})
    assert torch.equal(measured.latent_attention(q, rope, latents, key, 0.1), found)
    assert measured.latent_attention(q[:, :, :2], rope, latents, key, 0.1) is NotImplemented
