"""How long an operator takes: at the rates of a calibration, or at those of the cluster file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import log

from compiler.analysis.executed import Executed
from compiler.graph.types import Type
from dsl.schema import Calibration, Cluster, MeasuredLink, MeasuredProduct

ATTENTION = ("attention", "attention_saving", "document_attention", "document_attention_saving")
ATTENTION_GRADS = ("attention_grad", "document_attention_grad")
EXCHANGES: Mapping[str, str] = {
    "dispatch": "dispatch", "dispatch_again": "dispatch", "combine": "combine",
}  # fmt: skip


class Term(StrEnum):
    """What time is spent on, in the order in which a prediction adds it."""

    PRODUCTS = "products"
    AGAIN = "recomputation"
    ATTENTION = "attention"
    POINTWISE = "pointwise"
    EXCHANGE = "exchange"


class NoRate(Exception):
    """Neither the calibration nor the cluster file says how fast products of this type are."""

    def __init__(self, dtype: str) -> None:
        super().__init__(f"there is no rate of products in {dtype}")


@dataclass(frozen=True)
class Rates:
    """The rates of a cluster, by its calibration where that has one.

    An operator takes the larger of its arithmetic and its bytes over their rates, and the time
    between two operators. Memory and links without a bandwidth take no time.
    """

    cluster: Cluster
    calibration: Calibration | None = None

    def seconds(self, one: Executed) -> tuple[Term, float]:
        """Of one run of an operator, and what it counts under. Raises `NoRate`."""
        kind = one.op.kind
        if kind in EXCHANGES:
            inside, across = one.moved.intra_node, one.moved.inter_node
            return Term.EXCHANGE, self.sending(EXCHANGES[kind], inside, across)
        if kind == "accumulate_grad" and self._accumulated(one):
            return Term.POINTWISE, 0.0
        if not one.flops and not one.bytes:
            return Term.POINTWISE, 0.0
        memory = one.bytes / self.memory_bandwidth if self.memory_bandwidth else 0.0
        return _term(one), max(self._arithmetic(one), memory) + self.launch

    @property
    def memory_bandwidth(self) -> int | None:
        measured = self.calibration.memory_bandwidth if self.calibration else None
        return measured or self.cluster.memory_bandwidth

    @property
    def launch(self) -> float:
        """Seconds between two operators."""
        return self.calibration.launch / 1e6 if self.calibration else 0.0

    def sending(self, purpose: str, inside: int, across: int) -> float:
        """Seconds to send these bytes to ranks of the node and to other nodes at once.

        `purpose` is a key of calibrations: dispatch, combine, pair, ring. Its measured bandwidth is
        that to other nodes, or inside where nothing leaves the node.
        """
        if not inside and not across:
            return 0.0
        measured: MeasuredLink | None = getattr(self.calibration, purpose, None)
        links = self.cluster.links
        near, far = links.inside, links.across
        if measured is not None:
            near, far = (near, measured.bandwidth) if across else (measured.bandwidth, far)
        times = (inside / near if near else 0.0, across / far if far else 0.0)
        return max(times) + (measured.microseconds / 1e6 if measured else 0.0)

    def _arithmetic(self, one: Executed) -> float:
        if not one.flops:
            return 0.0
        attention = self.calibration.attention if self.calibration else None
        if one.op.kind in ATTENTION and attention:
            return one.flops / attention.forward
        if one.op.kind in ATTENTION_GRADS and attention:
            return one.flops / attention.backward
        similar = self._similar(one)
        if similar is not None:
            return one.flops / similar.rate
        rates = self.cluster.flops
        dtype = "fp8" if product_type(one) == "fp8" else "bf16"
        rate = rates.fp8 if dtype == "fp8" else rates.bf16
        if not rate:
            raise NoRate(dtype)
        return one.flops / rate

    def _similar(self, one: Executed) -> MeasuredProduct | None:
        """The measured product of the most similar shape, among those of as many groups if any."""
        if self.calibration is None or one.op.kind in (*ATTENTION, *ATTENTION_GRADS):
            return None
        dtype, grad = product_type(one), one.op.kind.endswith("weight_grad")
        known = [p for p in self.calibration.products if (p.dtype, p.weight_grad) == (dtype, grad)]
        if not known:
            known = [p for p in self.calibration.products if p.dtype == dtype]
        grouped = [p for p in known if (p.groups > 1) == ("grouped" in one.op.kind)]
        shape = product_shape(one)

        def distance(p: MeasuredProduct) -> float:
            pairs = zip(shape, (p.m, p.n, p.k), strict=True)
            return sum(abs(log(max(ours, 1) / theirs)) for ours, theirs in pairs)

        return min(grouped or known, key=distance, default=None)

    def _accumulated(self, one: Executed) -> bool:
        """Whether the measured product before a sum of gradients has added to it already."""
        makes = one.site.types[0]
        return self.calibration is not None and len(makes.dims) > 1 and any(
            p.accumulates for p in self.calibration.products if p.weight_grad
        )  # fmt: skip


def _term(one: Executed) -> Term:
    if one.op.kind in (*ATTENTION, *ATTENTION_GRADS):
        return Term.ATTENTION
    if not one.flops:
        return Term.POINTWISE
    again = one.backward and not one.op.kind.endswith("_grad")
    return Term.AGAIN if again else Term.PRODUCTS


def product_type(one: Executed) -> str:
    """In which element type a product is computed: that of its first operand."""
    found = one.site.types[0].dtype
    return {"f8e4m3": "fp8", "f32": "fp32"}.get(found, "bf16")


def product_shape(one: Executed) -> tuple[int, int, int]:
    """m, n and k of a product, of which `one.flops` is twice the product."""
    made: Type = one.op.results[0].type
    if one.op.kind.endswith("weight_grad"):
        m, n = (d.size or 1 for d in made.dims[-2:])
        return m, n, one.flops // (2 * m * n)
    k = one.site.types[0].last.size or 1
    fused = one.op.kind == "linear_cross_entropy"  # the head and its two gradients
    n = (one.site.weights[0].dims[0] if fused else made.last).size or 1
    return max(1, one.flops // (2 * n * k * (3 if fused else 1))), n, k
