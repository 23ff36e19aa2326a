"""What the report says of a plan; `plan.html.jinja` says how it looks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from compiler.plan.explain import CONVENTIONS, place
from compiler.plan.memory import Kind
from compiler.plan.plan import Plan, Rank

LARGEST = 8  # tensors of the fullest rank


@dataclass(frozen=True)
class BarPart:
    """Memory of one kind, and its part of the whole width of a bar, in percent."""

    kind: Kind
    bytes: int
    percent: float


@dataclass(frozen=True)
class RankLine:
    """All ranks with one pipeline coordinate."""

    rank: Rank
    stages: str
    layers: str
    parts: tuple[BarPart, ...]
    bytes_inside: int
    bytes_across: int


@dataclass(frozen=True)
class PlanPage:
    """A plan as the page shows it. Bars are as wide as a GPU's memory, or as the fullest rank."""

    plan: Plan
    facts: tuple[tuple[str, str], ...]
    ranks: tuple[RankLine, ...]
    largest: tuple[tuple[int, str, str, str], ...]
    conventions: tuple[str, ...] = CONVENTIONS


def plan_page(plan: Plan) -> PlanPage:
    largest = tuple(
        (use.bytes, use.kind.words, use.name, place(use.span) if use.span else "")
        for use in plan.fullest.memory.largest()[:LARGEST]
    )
    return PlanPage(plan, tuple(_facts(plan)), tuple(_ranks(plan)), largest)


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    mesh, layout, cluster = plan.layout.mesh, plan.layout, plan.cluster
    yield "Cluster", f"{cluster.cluster}: {cluster.nodes} nodes of {cluster.gpus_per_node} GPUs"
    yield "Ranks", f"{mesh.pipeline} pipeline, {mesh.replicas} replicas, {mesh.expert} expert"
    yield "Schedule", f"{layout.schedule}, {layout.micro_batches} micro-batches a step and rank"
    for one in plan.exchanges:
        each = one.experts // mesh.expert
        yield f"Experts of {one.block}", f"{each} of {one.experts} on each rank"
        sizes = f"{one.dispatch:,} bytes there, {one.combine:,} back"
        yield "A token to one node", f"{sizes}; to {one.nodes} nodes at most"


def _ranks(plan: Plan) -> Iterator[RankLine]:
    width = max(plan.cluster.memory or 0, plan.fullest.memory.peak)
    for rank in plan.ranks:
        stages = plan.layout.stages_of(rank.pipeline)
        yield RankLine(
            rank,
            ", ".join(map(str, stages)),
            ", ".join(plan.layout.stages[stage].words for stage in stages),
            tuple(
                BarPart(kind, rank.memory.of(kind), 100 * rank.memory.of(kind) / width)
                for kind in Kind
            ),
            sum(one.bytes_inside for one in rank.sent),
            sum(one.bytes_across for one in rank.sent),
        )
