"""Decoding in the latent space: keys and values are never made from what the cache holds.

With kv_b_proj cut by head into rows W_uk for keys and W_uv for values,
q_nope . (W_uk c) = (W_uk^T q_nope) . c and sum_j p_j W_uv c_j = W_uv (sum_j p_j c_j): one product
with the query and one with the output replace one with every token of the context. Every head then
reads the same latents, kv_lora_rank + qk_rope_head_dim numbers a token (DeepSeek-V2 report,
arXiv 2405.04434, section 2.1.2).
"""

from __future__ import annotations

from collections.abc import Sequence

from compiler.graph.core import Op, Program, Value
from compiler.ops.attention import also_of, scores_of
from compiler.ops.base import dims_attr, dims_of
from compiler.passes.base import Pass
from compiler.rewrite import Miss, Rewriter, rewrite
from dsl.load import Description


def _run(program: Program, description: Description) -> Sequence[Miss]:
    return rewrite(program, "attention", _absorb)


ABSORB = Pass(
    "absorb",
    "fold the up-projections of keys and values into query and output",
    _run,
    requires="insert_cache",
    ensures="latent_attention where keys and values came from one latent",
)


def _absorb(at: Rewriter) -> Sequence[Value] | Miss:
    """attention(q_nope ++ q_rope, k_nope ++ k_rope, v) with k_nope and v projected from latents."""
    q, k, v = at.op.operands[:3]
    queries, keys = at.producer(q, "concat"), at.producer(k, "concat")
    if queries is None or keys is None:
        return Miss("queries and keys are not joined from two parts", at.op)
    (q_nope, q_rope), (k_nope, k_rope) = queries.operands, keys.operands
    shared = at.producer(k_rope, "broadcast")
    if shared is None:
        return Miss("the heads do not share one rotated key", keys)
    parts = at.producer(v, "split")
    if parts is None or parts.results != [k_nope, v]:
        return Miss("keys and values are not the two parts of one projection", at.op)
    heads = at.producer(parts.operands[0], "unflatten")
    projection = heads and at.producer(heads.operands[0], "linear")
    if heads is None or projection is None or len(projection.symbols) > 1:
        return Miss("keys and values are not projected together", parts)
    return _latent(at, q_nope, q_rope, projection, shared.operands[0], parts)


def _latent(
    at: Rewriter, q_nope: Value, q_rope: Value, projection: Op, k_rope: Value, parts: Op
) -> Sequence[Value]:
    c_kv, weight = projection.operands[0], projection.symbols
    key_dim, value_dim = dims_of(parts.attrs["into"])
    (q_latent,) = at.add(
        "head_linear", [q_nope], weight, names=["q_latent"],
        start=0, rows=dims_attr(key_dim), transposed=True,
    )  # fmt: skip
    (o_latent,) = at.add(
        "latent_attention", [q_latent, q_rope, c_kv, k_rope, *also_of(at.op).values()],
        names=["o_latent"],
        **scores_of(at.op),
    )  # fmt: skip
    return at.add(
        "head_linear", [o_latent], weight, names=[at.op.result.name],
        start=key_dim.size or 0, rows=dims_attr(value_dim), transposed=False,
    )  # fmt: skip
