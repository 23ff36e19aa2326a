"""What of a plan can be measured: its products, attention, and what ranks send at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compiler.analysis.executed import Executed
from compiler.plan.plan import Plan
from compiler.plan.predict import boundary, of_a_micro_batch
from compiler.plan.rates import ATTENTION, ATTENTION_GRADS, product_shape, product_type
from compiler.roles import Role


@dataclass(frozen=True, order=True)
class Product:
    """A product [m, k] x [k, n], as `dsl.schema.MeasuredProduct` has it."""

    dtype: str
    weight_grad: bool
    groups: int
    m: int
    n: int
    k: int


@dataclass(frozen=True)
class AttentionShapes:
    """The operands of attention: q, k [batch, seq, heads, qk], v [batch, seq, heads, v]."""

    dtype: str
    batch: int
    seq: int
    heads: int
    qk: int
    v: int
    kv_heads: int


@dataclass(frozen=True)
class Measurable:
    """Of one plan. Bytes are those of one message or collective of a rank."""

    products: tuple[Product, ...]
    attention: AttentionShapes | None
    pointwise: int
    dispatch: int
    combine: int
    pair: int
    ring: int


def measurable(plan: Plan, roles: Sequence[Role]) -> Measurable:
    """Each product, of forward and backward passes, once."""
    every = [one for role in roles for one in of_a_micro_batch(plan, role)]
    sent = {
        kind: [_sent(one) for one in every if one.op.kind == kind]
        for kind in ("dispatch", "combine")
    }
    ring = [one for rank in plan.ranks for one in rank.sent if one.purpose == "gradients"]
    return Measurable(
        tuple(sorted({_product(one, plan) for one in every if _is_product(one)})),
        next((_heads(one, plan) for one in every if one.op.kind in ATTENTION), None),
        max((one.bytes for one in every if not one.flops), default=0),
        max(sent["dispatch"], default=0),
        max(sent["combine"], default=0),
        sum(boundary(plan)),
        max((one.bytes_inside + one.bytes_across for one in ring), default=0),
    )


def _is_product(one: Executed) -> bool:
    return bool(one.flops) and one.op.kind not in (*ATTENTION, *ATTENTION_GRADS)


def _product(one: Executed, plan: Plan) -> Product:
    grouped = "grouped" in one.op.kind
    groups = plan.exchanges[0].experts // plan.layout.mesh.expert if grouped else 1
    m, n, k = product_shape(one)
    return Product(product_type(one), one.op.kind.endswith("weight_grad"), groups, m, n, k)


def _heads(one: Executed, plan: Plan) -> AttentionShapes:
    q, k, v = one.site.types[:3]
    parallel = plan.parallel
    sizes = (d.size or 1 for d in (q.dims[2], q.last, v.last, k.dims[2]))
    heads, width, value, kv_heads = sizes
    return AttentionShapes(
        {"f32": "fp32"}.get(q.dtype, "bf16"), parallel.micro_batch, parallel.sequence_length,
        heads, width, value, kv_heads,
    )  # fmt: skip


def _sent(one: Executed) -> int:
    return one.moved.intra_node + one.moved.inter_node
