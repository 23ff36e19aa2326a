"""The layout: which stages and experts each rank of a mesh holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from compiler.graph.core import Graph, Op, Value
from compiler.parallel.mesh import Mesh


@dataclass(frozen=True)
class Unit:
    """A part of the outermost block that no cut divides: one layer, or operators of its own.

    Its operators are `ops` of the graph, by index; for a layer that is the `repeat`. `layer` is the
    number of the layer, None for operators outside of layers.
    """

    ops: range
    layer: int | None = None


def units(main: Graph) -> tuple[Unit, ...]:
    """The units of an outermost block, in order; together they are all of it but `return`.

    What comes before the first layer (the embedding) is a unit, and so is all that follows the
    last one: norm, head, losses and the modules of multi-token prediction.
    """
    found: list[Unit] = []
    start = 0
    for i, op in enumerate(main.ops):
        if op.kind not in ("repeat", "return"):
            continue
        if i > start:
            found.append(Unit(range(start, i)))
        if op.kind == "repeat":
            found += [Unit(range(i, i + 1), n) for n in op.layers]
        start = i + 1
    return tuple(found)


def router_of(producers: Mapping[Value, Op], topk_indices: Value) -> Op | None:
    """The operator that chooses experts by groups, if one makes their numbers."""
    made = producers.get(topk_indices)
    return made if made is not None and "topk_group" in made.attrs else None


@dataclass(frozen=True)
class Stage:
    """Units that follow each other and run on one pipeline rank. Stages count from 0."""

    index: int
    units: tuple[Unit, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(unit.layer for unit in self.units if unit.layer is not None)

    @property
    def words(self) -> str:
        """As tables name its layers: `4..7`; `+` means units before or after all layers."""
        layers = self.layers
        ends = f"{layers[0]}..{layers[-1]}" if len(layers) > 1 else "".join(map(str, layers))
        before = "+" if self.units[0].layer is None else ""
        after = "+" if layers and self.units[-1].layer is None else ""
        return " ".join(part for part in (before, ends, after) if part)


def placement(schedule: str, pipeline: int) -> tuple[tuple[int, ...], ...]:
    """The pipeline rank of each stage, for each direction in which micro-batches go.

    With `dualpipe` they enter at both ends of the pipeline, and each rank holds two stages: p for
    those that come from rank 0, and the mirrored one for those that come from the last rank
    (report, section 3.2.1). With `dualpipe_v` the pipeline turns back at its last rank.
    """
    ranks = tuple(range(pipeline))
    match schedule:
        case "dualpipe":
            return ranks, ranks[::-1]
        case "dualpipe_v":
            return (ranks + ranks[::-1],)
        case _:
            return (ranks,)


@dataclass(frozen=True)
class Layout:
    """Where everything lies, and in how many micro-batches a step is executed.

    `schedule` is `1f1b`, `zero_bubble`, `dualpipe` or `dualpipe_v`.
    """

    mesh: Mesh
    schedule: str
    stages: tuple[Stage, ...]
    micro_batch: int  # sequences
    micro_batches: int  # a step, on each data rank; with dualpipe half of them from each end
    zero: int  # 0: optimizer state on every rank, 1: sharded over the ranks that hold a weight

    @cached_property
    def placement(self) -> tuple[tuple[int, ...], ...]:
        """The pipeline rank of each stage, by direction."""
        return placement(self.schedule, self.mesh.pipeline)

    @property
    def bidirectional(self) -> bool:
        return len(self.placement) > 1

    def stages_of(self, pipeline: int) -> tuple[int, ...]:
        """The stages on one pipeline rank, in the order in which a micro-batch visits it."""
        ranks = (enumerate(direction) for direction in self.placement)
        return tuple(stage for one in ranks for stage, rank in one if rank == pipeline)

    def holders(self, stage: int) -> tuple[int, ...]:
        """The pipeline ranks that hold a stage, by direction."""
        return tuple(direction[stage] for direction in self.placement)

    @property
    def gradient_axes(self) -> tuple[str, ...]:
        """The axes over whose ranks the gradient of a weight of all data ranks is summed."""
        return ("mirror", *self.mesh.data_axes) if self.bidirectional else self.mesh.data_axes

    def in_flight(self, stage: int) -> int:
        """For how many micro-batches a stage keeps activations at most.

        A micro-batch returns to a stage once it has been to the last one and back, while the stage
        has begun as many others as there are stages from it to the last. Together the two stages
        of a rank under DualPipe keep one more than there are stages (report, table 2). What
        products read that then wait for chunks W is counted apart (`compiler/plan/memory.py`).
        """
        stages = len(self.placement[0])
        return min(stages - stage, self.micro_batches // len(self.placement))

    def owner(self, routed: int, count: int) -> int:
        """The `expert` coordinate of the ranks that hold routed expert `routed` of `count`."""
        return routed // (count // self.mesh.expert)

    def nodes_of_group(self, group: int, groups: int, count: int) -> tuple[int, ...]:
        """The nodes, of those of an expert group, on which one of the router's groups lies.

        `count` experts are cut into `groups` (report, section 2.1.2, node-limited routing). Nodes
        count from that of the expert group's first rank.
        """
        each = count // groups
        members = range(group * each, (group + 1) * each)
        return tuple(sorted({self.mesh.node(self.owner(e, count)) for e in members}))

    def nodes_of_token(self, router: Op | None, k: int, count: int) -> int:
        """The most nodes on which the `k` of `count` experts lie that `router` chooses for a token.

        Its groups lie on nodes, and it chooses among few of them (report, section 2.1.2).
        """
        most = min(k, len({self.mesh.node(rank) for rank in self.mesh.group(0, ("expert",))}))
        if router is None:
            return most
        groups = router.number("n_group")
        spans = sorted(len(self.nodes_of_group(group, groups, count)) for group in range(groups))
        return min(most, sum(spans[-router.number("topk_group") :]))
