"""What the same work takes with libraries: torch (cuBLAS, cuDNN, flash), DeepGEMM and FlashMLA."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import grouped_mm, linear, scaled_dot_product_attention

Run = Callable[[], Any]
Named = dict[str, Any]
"""The arguments of a function by the names in its signature."""


def peers_of(function: str, named: Named) -> Iterator[tuple[str, Run]]:
    """The libraries that do what a launcher does, on arguments like its own.

    A library may refuse the arguments when it is run.
    """
    if function in PEERS:
        yield from PEERS[function](named)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _linear(named: Named) -> Iterator[tuple[str, Run]]:
    quantized = "wq" in named
    x, weight = (named["q"], named["wq"]) if quantized else (named["x"], named["weight"])
    wide, wide_weight = x.bfloat16(), weight.bfloat16()
    yield "cuBLAS bf16", lambda: linear(wide, wide_weight)
    if quantized and not named.get("parts"):
        s, ws = named["s"], named["ws"]
        yield "cuBLAS fp8", _blockwise(x, s, weight, ws)
        if _installed("deep_gemm"):
            import deep_gemm

            y = torch.empty(len(x), len(weight), dtype=torch.bfloat16, device=x.device)
            yield "DeepGEMM", lambda: deep_gemm.fp8_gemm_nt((x, s), (weight, ws), y)


def _blockwise(q: Tensor, s: Tensor, wq: Tensor, ws: Tensor) -> Run:
    """cuBLAS's product of numbers with scales for 1 x 128 and 128 x 128, since CUDA 12.9."""
    from torch.nn.functional import ScalingType, scaled_mm

    # Scales of the rows lie together by columns, of one row, too.
    by_columns = torch.empty_strided(s.shape, (1, len(s)), dtype=s.dtype, device=s.device).copy_(s)
    return lambda: scaled_mm(
        q,
        wq.t(),
        by_columns,
        ScalingType.BlockWise1x128,
        ws.t(),
        ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


def _grouped_linear(named: Named) -> Iterator[tuple[str, Run]]:
    x, weight = named.get("q", named.get("x")), named.get("wq", named.get("weight"))
    assert x is not None and weight is not None
    wide, wide_weight = x.bfloat16(), weight.bfloat16().transpose(-1, -2)
    yield "grouped_mm bf16", lambda: grouped_mm(wide, wide_weight, offs=named["ends"])


def _attention(named: Named) -> Iterator[tuple[str, Run]]:
    q, k, v = (named[name].transpose(1, 2) for name in "qkv")
    if q.shape[2] != k.shape[2]:  # is_causal of torch lets the first query see the first key only
        return

    def run() -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=named["scale"], enable_gqa=grouped
        )

    def by(backend: SDPBackend) -> Run:
        def with_backend() -> Tensor:
            with sdpa_kernel(backend):
                return run()

        return with_backend

    yield "SDPA", run
    yield "SDPA cuDNN", by(SDPBackend.CUDNN_ATTENTION)
    yield "SDPA flash", by(SDPBackend.FLASH_ATTENTION)


def _attention_grad(named: Named) -> Iterator[tuple[str, Run]]:
    """cuDNN's, for which forward runs once, with the graph of autograd kept. Its sums have no fixed
    order as torch calls it, so that it is only compared with, never called by a build."""
    q, k, v, d = (named[name].transpose(1, 2).detach() for name in ("q", "k", "v", "d"))
    if q.shape[:3] != k.shape[:3]:
        return
    made: list[Tensor] = []

    def run() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), torch.enable_grad():
            if not made:
                a, b, c = (x.clone().requires_grad_() for x in (q, k, v))
                out = scaled_dot_product_attention(a, b, c, is_causal=True, scale=named["scale"])
                made.extend([out, a, b, c])
            return torch.autograd.grad(made[0], made[1:], d, retain_graph=True)

    yield "SDPA cuDNN", run


def _latent_attention(named: Named) -> Iterator[tuple[str, Run]]:
    c_kv, k_rope = named["c_kv"], named["k_rope"]
    batch, keys, width = c_kv.shape
    if not _installed("flash_mla") or width != 512 or keys % 64:
        return
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    cache = torch.cat([c_kv, k_rope], -1).view(batch * keys // 64, 64, 1, -1)
    table = torch.arange(len(cache), dtype=torch.int32, device=cache.device).view(batch, -1)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=cache.device)
    query: Tensor = torch.cat([named["q_latent"], named["q_rope"]], -1)
    metadata, splits = get_mla_metadata(lengths, query.shape[1] * query.shape[2], 1)
    scale = named["scale"]
    yield (
        "FlashMLA",
        lambda: flash_mla_with_kvcache(
            query, cache, table, lengths, width, metadata, splits, softmax_scale=scale, causal=True
        ),
    )


PEERS: dict[str, Callable[[Named], Iterator[tuple[str, Run]]]] = {
    "linear": _linear,
    "grouped_linear": _grouped_linear,
    "attention": _attention,
    "attention_saving": _attention,
    "attention_grad": _attention_grad,
    "latent_attention": _latent_attention,
}
