"""DeepGEMM and FlashMLA: what a build calls them with, by stand-ins that compute in torch."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime import fp8, functional
from tests.support.kernels import KernelLoader, files_of

ASKED = ("kernels={products: deep_gemm, attention: flash_mla}",)


def test_they_are_there_only_where_a_spec_asks() -> None:
    names = {file.name for file in files_of("deepseek_v3", "sm_90")}
    assert not names & {"deep_gemm", "flash_mla"}
    names = {file.name for file in files_of("deepseek_v3", "sm_90", ASKED)}
    assert {"deep_gemm", "flash_mla"} <= names
    assert not {f.name for f in files_of("deepseek_v3", "sm_100", ASKED)} & {
        "deep_gemm",
        "flash_mla",
    }
    # No product is in FP8, and the latent has another size.
    tiny = {file.name for file in files_of("deepseek_v3_tiny", "sm_90", ASKED)}
    assert not tiny & {"deep_gemm", "flash_mla"}


@pytest.fixture
def deep_gemm(monkeypatch: pytest.MonkeyPatch, kernels: KernelLoader) -> types.ModuleType:
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
    return kernels("deep_gemm", "deepseek_v3", "sm_90", ASKED)


def test_deep_gemm(deep_gemm: Any) -> None:
    x, w = torch.randn(2, 3, 256), torch.randn(384, 256)
    arguments = *fp8.quantize(x), *fp8.quantize_weight(w)
    found = deep_gemm.linear(*arguments, dtype=torch.bfloat16)
    assert torch.equal(found, fp8.linear(*arguments, dtype=torch.bfloat16))


@pytest.mark.parametrize("parts", [(64, 320), (100, 284)])
def test_deep_gemm_has_no_blocks_that_begin_anew(deep_gemm: Any, parts: tuple[int, ...]) -> None:
    x, w = torch.randn(3, 256), torch.randn(384, 256)
    arguments = *fp8.quantize(x), *fp8.quantize_weight(w, parts=parts)
    assert deep_gemm.linear(*arguments, dtype=torch.bfloat16, parts=parts) is NotImplemented


def test_flash_mla(monkeypatch: pytest.MonkeyPatch, kernels: KernelLoader) -> None:
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
    file = kernels("flash_mla", "deepseek_v3", "sm_90", ASKED)
    q, rope = torch.randn(2, 1, 4, 512).bfloat16(), torch.randn(2, 1, 4, 64).bfloat16()
    latents, key = torch.randn(2, 70, 512).bfloat16(), torch.randn(2, 70, 64).bfloat16()
    found = file.latent_attention(q, rope, latents, key, 0.1)
    assert torch.equal(found, functional.latent_attention(q, rope, latents, key, 0.1))
    assert file.latent_attention(q, rope, latents[:, :0], key[:, :0], 0.1) is NotImplemented
