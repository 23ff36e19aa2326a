"""The plan of a model on a cluster: layout, memory, arithmetic and traffic of every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from compiler.analysis.summary import TRAINING_PASSES
from compiler.analysis.work import Tally, Work, merged, scaled, total
from compiler.graph.core import Program
from compiler.graph.types import FLOATS
from compiler.graph.verify import verify
from compiler.passes.base import Pass
from compiler.plan.kept import Activations, activations
from compiler.plan.layout import Layout, Mesh, Unit, units
from compiler.plan.memory import RankMemory, rank_memory
from compiler.plan.placement import Placed, placements
from compiler.plan.stages import cut, unit_flops
from compiler.plan.traffic import Exchange, Sent, exchanges, sent
from dsl.schema import Cluster, Parallel

# Products of these are FP8 where the policy says so (report, section 3.3.1).
FP8_WORK = (
    Work.ATTENTION_PROJECTIONS,
    Work.CACHE_PROJECTIONS,
    Work.DENSE,
    Work.ROUTED_EXPERTS,
    Work.SHARED_EXPERTS,
)


@dataclass(frozen=True)
class Rank:
    """Every rank with one pipeline coordinate, in one step. `flops` are without recomputation."""

    memory: RankMemory
    flops: Tally
    sent: tuple[Sent, ...]

    @property
    def pipeline(self) -> int:
        return self.memory.pipeline


@dataclass(frozen=True)
class Plan:
    """Where a model lies on a cluster, and what that takes. `ranks` are by pipeline coordinate."""

    parallel: Parallel
    cluster: Cluster
    layout: Layout
    placed: tuple[Placed, ...]
    exchanges: tuple[Exchange, ...]
    ranks: tuple[Rank, ...]
    fp8: bool

    @property
    def fits(self) -> bool:
        limit = self.cluster.memory
        return limit is None or all(rank.memory.peak <= limit for rank in self.ranks)

    @property
    def fullest(self) -> Rank:
        return max(self.ranks, key=lambda rank: (rank.memory.peak, -rank.pipeline))
