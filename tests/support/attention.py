"""A dense model in plain torch, whose attention sees what a function of two positions says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Sees = Callable[[int, int], bool]


@dataclass(frozen=True)
class Layer:
    """What the attention of a layer does besides being causal."""

    sees: Sees = lambda q, k: True
    softcap: float = math.inf


def logits(
    weights: Mapping[str, Tensor], p: Any, layers: list[Layer], tokens: Tensor, position: Tensor
) -> Tensor:
    """[batch, seq, vocab] of a model of `DecoderLayer` with SwiGLU, by its published weights.

    Attention is multi-head latent where weights say so, else grouped-query; both as papers write
    them, pair by pair and without what a compiler does to them. `position` counts within documents.
    """
    x = weights["model.embed_tokens.weight"][tokens]
    for i, layer in enumerate(layers):
        prefix = f"model.layers.{i}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        normed = norm(x, own["input_layernorm.weight"])
        x = x + (latent if "self_attn.kv_b_proj.weight" in own else grouped)(
            {n.removeprefix("self_attn."): w for n, w in own.items()}, p, layer, normed, position
        )
        normed = norm(x, own["post_attention_layernorm.weight"])
        gate, up, down = (own[f"mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        x = x + (torch.nn.functional.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm(x, weights["model.norm.weight"]) @ head.T


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def turn(x: Tensor, position: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary embedding of x [batch, seq, heads, d], whose tables are float32."""
    d = x.shape[-1]
    frequency = 1.0 / theta ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    angle = (position.float().unsqueeze(-1) * frequency).unsqueeze(2)
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, layer: Layer, position: Tensor) -> Tensor:
    """Query by query: q and k [batch, seq, heads, d], v [.., e] -> [batch, seq, heads * e]."""
    rows = []
    for b, own in enumerate(position.tolist()):
        for i, at in enumerate(own):
            first = i - at  # of this document
            keys = [j for j in range(first, i + 1) if layer.sees(at, own[j])]
            score = torch.einsum("hd,khd->hk", q[b, i], k[b, keys]) * q.shape[-1] ** -0.5
            if math.isfinite(layer.softcap):
                score = layer.softcap * torch.tanh(score / layer.softcap)
            rows.append(torch.einsum("hk,khe->he", score.softmax(-1), v[b, keys]).flatten())
    return torch.stack(rows).unflatten(0, position.shape)


def grouped(w: Mapping[str, Tensor], p: Any, layer: Layer, x: Tensor, position: Tensor) -> Tensor:
    q, k, v = (
        (x @ w[f"{n}_proj.weight"].T).unflatten(-1, (-1, p.head_dim)) for n in ("q", "k", "v")
    )
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (turn(k, position), v))
    return attend(turn(q, position), k, v, layer, position) @ w["o_proj.weight"].T


def latent(w: Mapping[str, Tensor], p: Any, layer: Layer, x: Tensor, position: Tensor) -> Tensor:
    c_q = norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"])
    q = (c_q @ w["q_b_proj.weight"].T).unflatten(-1, (p.num_attention_heads, -1))
    c_kv, k_rope = (x @ w["kv_a_proj_with_mqa.weight"].T).split(
        [p.kv_lora_rank, p.qk_rope_head_dim], -1
    )
    kv = norm(c_kv, w["kv_a_layernorm.weight"]) @ w["kv_b_proj.weight"].T
    kv = kv.unflatten(-1, (p.num_attention_heads, -1))
    k_nope, v = kv.split([p.qk_nope_head_dim, p.v_head_dim], -1)
    q_nope, q_rope = q.split([p.qk_nope_head_dim, p.qk_rope_head_dim], -1)
    k_rope = turn(k_rope.unsqueeze(2), position).expand(-1, -1, p.num_attention_heads, -1)
    q, k = torch.cat([q_nope, turn(q_rope, position)], -1), torch.cat([k_nope, k_rope], -1)
    return attend(q, k, v, layer, position) @ w["o_proj.weight"].T
