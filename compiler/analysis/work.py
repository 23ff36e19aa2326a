"""What an operator's weights and arithmetic are counted under."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from compiler.graph.core import Graph, Op, Program


class Work(StrEnum):
    """A share of the model, in the order in which tables list it."""

    EMBEDDING = "embedding"
    ATTENTION_PROJECTIONS = "attention_projections"
    CACHE_PROJECTIONS = "projections_of_the_cache"
    ATTENTION_CORE = "attention_core"
    DENSE = "dense_feed_forward"
    GATE = "gate"
    ROUTED_EXPERTS = "routed_experts"
    SHARED_EXPERTS = "shared_experts"
    OTHER_PROJECTIONS = "other_projections"
    NORMS = "norms"
    HEAD = "head"

    @property
    def words(self) -> str:
        """As tables name it."""
        return self.value.replace("_", " ")


# Numbers by share. Those that are 0 are left out.
Tally = Mapping[Work, int]


def total(tally: Tally) -> int:
    return sum(tally.values())


def scaled(a: Tally, times: int) -> dict[Work, int]:
    return {work: times * n for work, n in a.items()}


def merged(a: Tally, b: Tally) -> dict[Work, int]:
    """The sums by share, in the order of `Work`."""
    sums = {work: a.get(work, 0) + b.get(work, 0) for work in Work}
    return {work: n for work, n in sums.items() if n}


_BY_KIND = {
    "embedding": Work.EMBEDDING,
    "rms_norm": Work.NORMS,
    "add_rms_norm": Work.NORMS,
    "layer_norm": Work.NORMS,
    "rms_norm_quantize": Work.NORMS,
    "attention": Work.ATTENTION_CORE,
    "document_attention": Work.ATTENTION_CORE,
    "latent_attention": Work.ATTENTION_CORE,
    "lightning_indexer": Work.ATTENTION_CORE,
    "indexer_loss": Work.ATTENTION_CORE,
    "sequence_extern": Work.ATTENTION_CORE,
    "grouped_linear": Work.ROUTED_EXPERTS,
    "grouped_parameter": Work.ROUTED_EXPERTS,
    "fp8_grouped_linear": Work.ROUTED_EXPERTS,
}

# Operators that make a block one of attention, that choose experts, that make it one of experts.
ATTENTION = ("attention", "document_attention", "latent_attention", "sequence_extern")
CHOICE = ("topk_groups", "gate", "gate_saving")
EXPERTS = ("experts", "permute", "permute_quantized")


class Shares:
    """To which share the operators of one program belong; decided by structure, not by names."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._holds_attention: dict[str, bool] = {}
        self._gates: dict[str, set[Op]] = {}

    def of(self, op: Op, graph: Graph, around: Work | None) -> Work:
        """The share of `op`; `around` is the one that the block which holds it was called for."""
        if op.kind in _BY_KIND:
            return _BY_KIND[op.kind]
        if around is Work.ROUTED_EXPERTS:
            return around
        if op in self._gate(graph):
            return Work.GATE
        if graph is self._program.main and any(v in graph.results for v in op.results):
            return Work.HEAD
        if any(d.name == "context" for v in op.operands for d in v.type.dims):
            return Work.CACHE_PROJECTIONS
        if _directly_holds(graph, ATTENTION):
            return Work.ATTENTION_PROJECTIONS
        if around is not None or _directly_holds(graph, EXPERTS):
            return Work.SHARED_EXPERTS
        return Work.OTHER_PROJECTIONS if self._attends(graph.name) else Work.DENSE

    def around_callees(self, graph: Graph, around: Work | None) -> Work | None:
        """What the blocks that `graph` calls belong to, unless they are attention."""
        if around is None and _directly_holds(graph, EXPERTS):
            return Work.SHARED_EXPERTS
        return around

    def _gate(self, graph: Graph) -> set[Op]:
        """Operators that decide which experts a token goes to."""
        if graph.name not in self._gates:
            found: set[Op] = set()
            wanted = set()
            for op in reversed(list(graph.walk())):
                if op.kind in CHOICE or (not op.callee and any(v in wanted for v in op.results)):
                    found.add(op)
                    wanted |= set(op.operands)
            self._gates[graph.name] = found
        return self._gates[graph.name]

    def _attends(self, name: str) -> bool:
        """Whether a graph, or one that it calls, holds attention."""
        graph = self._program.graphs[name]
        if name not in self._holds_attention:
            found = _directly_holds(graph, ATTENTION)
            self._holds_attention[name] = found or any(map(self._attends, graph.calls()))
        return self._holds_attention[name]


def _directly_holds(graph: Graph, kinds: tuple[str, ...]) -> bool:
    return any(op.kind in kinds for op in graph.walk())
