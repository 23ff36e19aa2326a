"""What the same work takes with libraries: torch (cuBLAS, SDPA), DeepGEMM and FlashMLA."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear, scaled_dot_product_attention

Run = Callable[[], Any]


def peers_of(function: str, arguments: list[Any], keywords: dict[str, Any]) -> dict[str, Run]:
    """The libraries that do what a launcher does, on arguments like its own."""
    made: dict[str, Run] = {}
    if function == "linear" and arguments[0].dim() == 2:
        made |= _products(arguments)
    if function == "grouped_linear":
        made |= _grouped(arguments)
    if function in ("attention", "attention_saving"):
        made |= _attention(arguments, keywords)
    if function == "latent_attention" and _installed("flash_mla"):
        made |= _flash_mla(arguments, keywords)
    return made


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _products(arguments: list[Any]) -> dict[str, Run]:
    x, weight = arguments[0], arguments[2] if len(arguments) > 2 else arguments[1]
    wide, wide_weight = x.bfloat16(), weight.bfloat16()
    made: dict[str, Run] = {"cuBLAS bf16": lambda: linear(wide, wide_weight)}
    if len(arguments) > 2 and _installed("deep_gemm"):
        import deep_gemm

        y = torch.empty(len(x), len(weight), dtype=torch.bfloat16, device=x.device)
        q, s, wq, ws = arguments[:4]
        made["DeepGEMM"] = lambda: deep_gemm.fp8_gemm_nt((q, s), (wq, ws), y)
    return made


def _grouped(arguments: list[Any]) -> dict[str, Run]:
    quantized = len(arguments) > 3
    x, weight = arguments[0].bfloat16(), arguments[3 if quantized else 2].bfloat16()
    ends = arguments[2 if quantized else 1]
    return {"torch grouped_mm bf16": lambda: grouped_mm(x, weight.transpose(-1, -2), offs=ends)}


def _attention(arguments: list[Any], keywords: dict[str, Any]) -> dict[str, Run]:
    q, k, v = (t.transpose(1, 2) for t in arguments[:3])
    if q.shape[2] != k.shape[2]:
        return {}
    scale = keywords["scale"]
    return {"SDPA": lambda: scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)}


def _flash_mla(arguments: list[Any], keywords: dict[str, Any]) -> dict[str, Run]:
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    q_latent, q_rope, c_kv, k_rope = arguments[:4]
    batch, keys, width = c_kv.shape
    if width != 512 or keys % 64:
        return {}
    cache = torch.cat([c_kv, k_rope], -1).view(batch * keys // 64, 64, 1, -1)
    table = torch.arange(len(cache), dtype=torch.int32, device=cache.device).view(batch, -1)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=cache.device)
    query: Tensor = torch.cat([q_latent, q_rope], -1)
    metadata, splits = get_mla_metadata(lengths, query.shape[1] * query.shape[2], 1)
    scale = keywords["scale"]

    def run() -> Any:
        return flash_mla_with_kvcache(
            query, cache, table, lengths, width, metadata, splits, softmax_scale=scale, causal=True
        )

    return {"FlashMLA": run}
