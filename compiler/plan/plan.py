"""The plan of a model on a cluster: layout, memory, arithmetic and traffic of every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compiler.analysis.summary import TRAINING_PASSES
from compiler.graph.core import Program
from compiler.graph.types import FLOATS
from compiler.parallel.layout import Layout, Unit, placement, units
from compiler.parallel.mesh import Mesh
from compiler.plan.arrived import spread
from compiler.plan.memory import Kind, RankMemory, rank_memory
from compiler.plan.placement import Placed, placements
from compiler.plan.ramp import longest, rounds
from compiler.plan.saved import Activations, activations
from compiler.plan.schedule import Schedule, schedule
from compiler.plan.simulate import ChunkCosts, simulate
from compiler.plan.stages import Flops, cut, unit_flops
from compiler.plan.traffic import ExpertTraffic, Sent, exchanges, sent
from compiler.plan.transfers import executed_schedule
from compiler.plan.weights import weights_of
from dsl.schema import Cluster, Parallel
from dsl.schema import Schedule as BatchSchedule


@dataclass(frozen=True)
class Rank:
    """Every rank with one pipeline coordinate, in one step. `flops` are without recomputation."""

    memory: RankMemory
    flops: Flops
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
    exchanges: tuple[ExpertTraffic, ...]
    ranks: tuple[Rank, ...]
    slowest: Flops  # of a forward pass of one micro-batch through the stage that has most to do
    order: Schedule  # of a step, with what ranks send and receive; of its first part, if it is long

    @property
    def fits(self) -> bool:
        limit = self.cluster.memory
        return limit is None or all(rank.memory.peak <= limit for rank in self.ranks)

    @property
    def fullest(self) -> Rank:
        return max(self.ranks, key=lambda rank: (rank.memory.peak, -rank.pipeline))

    def seconds(self, rank: Rank) -> Mapping[str, float]:
        """How long a step at least keeps a rank busy, at the full speeds of the cluster.

        By `compute`, `memory` (weights and sums of gradients go through it for each micro-batch,
        the optimizer's state once), `inside` (links inside the node) and `across`; those without a
        known speed are left out.
        """
        links = self.cluster.links
        found = {}
        computing = self._computing(rank.flops)
        if computing is not None:
            found["compute"] = computing
        if self.cluster.memory_bandwidth:
            found["memory"] = self._moved(rank.memory) / self.cluster.memory_bandwidth
        if links.inside:
            found["inside"] = sum(one.bytes_inside for one in rank.sent) / links.inside
        if links.across:
            found["across"] = sum(one.bytes_across for one in rank.sent) / links.across
        return found

    def step_seconds(self) -> float | None:
        """How long a step takes at full speed with the bubble of its schedule, were all sending
        hidden and every stage as slow as the slowest; None where no speed is known."""
        forward = self._computing(self.slowest)
        if forward is None:
            return None
        order = schedule(self.layout.schedule, self.layout.mesh.pipeline, self.layout.micro_batches)
        return simulate(order, ChunkCosts(forward, forward, forward)).end

    @property
    def flops_of_token(self) -> int:
        """FLOPs of training on one token, without recomputation, on all ranks together."""
        return sum(rank.flops.total for rank in self.ranks) // self._tokens_of_column

    @property
    def peak_seconds_of_token(self) -> float | None:
        """The seconds of one GPU at peak rates for that; None where no rate is known."""
        found = [self._computing(rank.flops) for rank in self.ranks]
        known = [seconds for seconds in found if seconds is not None]
        return sum(known) / self._tokens_of_column if len(known) == len(found) else None

    @property
    def _tokens_of_column(self) -> int:
        """Tokens of a step in one pipeline, of whose ranks `ranks` has each."""
        sequences = self.layout.micro_batches * self.layout.micro_batch
        return sequences * self.parallel.sequence_length

    def _computing(self, flops: Flops) -> float | None:
        rates = self.cluster.flops
        if not rates.bf16 or (flops.fp8 and not rates.fp8):
            return None
        fast = flops.fp8 / rates.fp8 if rates.fp8 else 0.0
        return (flops.total - flops.fp8) / rates.bf16 + fast

    def _moved(self, memory: RankMemory) -> int:
        """Bytes of weights that are read or written in a step: twice each time."""
        passes = self.layout.micro_batches // len(self.layout.placement)
        each = memory.of(Kind.WEIGHTS) + memory.of(Kind.GRADIENTS)
        return 2 * (passes * each + memory.of(Kind.MASTER) + memory.of(Kind.MOMENTS))


@dataclass(frozen=True)
class _Costs:
    """Of one micro-batch, by the operators of a unit."""

    flops: Mapping[range, Flops]
    saved: Mapping[range, Activations]


class Planner:
    """Makes plans of one model on one cluster, for any layout that can be.

    `program` is what training computes, as the equations say it: before operators are fused;
    `train` is the finished program, which says what is saved for the gradients. `batch` is how that
    of training changes on the way, if it does.
    """

    def __init__(
        self,
        program: Program,
        train: Program,
        cluster: Cluster,
        longest: int,
        batch: BatchSchedule | None = None,
    ) -> None:
        self.program = program
        self.train = train
        self.cluster = cluster
        self.longest = longest  # tokens of a sequence
        self.batch = batch
        self._costs: dict[tuple[int, int], _Costs] = {}
        self.units = units(program.main)
        self.kinds: Mapping[range, Unit] = {unit.ops: unit for unit in self.units}
        weights = [held for unit in self.kinds.values() for held in weights_of(program, unit)]
        # How many routed experts there are in a layer, of each kind of layer that has any.
        self.experts = tuple(dict.fromkeys(held.experts for held in weights if held.routed))

    def layout(self, parallel: Parallel) -> Layout:
        """The layout that `parallel` asks for; it must be possible (`compiler.plan.possible`)."""
        data = self.cluster.ranks // parallel.pipeline
        mesh = Mesh(
            parallel.pipeline, data // parallel.expert, parallel.expert, self.cluster.gpus_per_node
        )
        flops = self._of_a_micro_batch(parallel.micro_batch, parallel.sequence_length).flops
        costs = [flops[unit.ops].total for unit in self.units]
        return Layout(
            mesh,
            parallel.schedule,
            cut(self.units, costs, len(placement(parallel.schedule, parallel.pipeline)[0])),
            parallel.micro_batch,
            parallel.batch // (data * parallel.micro_batch),
            parallel.zero,
        )

    def plan(self, parallel: Parallel) -> Plan:
        """The plan for a layout that is possible; it may still not fit."""
        layout = self.layout(parallel)
        placed = placements(self.program, layout)
        costs = self._of_a_micro_batch(parallel.micro_batch, parallel.sequence_length)
        around = {ops: exchanges(self.program, unit, layout) for ops, unit in self.kinds.items()}
        tokens = parallel.micro_batch * parallel.sequence_length
        saved = {
            ops: spread(one, around[ops], layout.mesh, tokens) for ops, one in costs.saved.items()
        }
        boundary = self._boundary(_sizes(parallel.micro_batch, parallel.sequence_length))
        found = tuple(dict.fromkeys(one for every in around.values() for one in every))
        buffers = 0
        if parallel.exchange == "symmetric_memory" and parallel.expert > 1:
            # For the tokens of all ranks of a group, three times (`runtime/symmetric.py`).
            buffers = 3 * parallel.expert * tokens * max(one.row for one in found)
        stages, ways = layout.mesh.pipeline, len(layout.placement)
        count = rounds(layout.micro_batches, ways, longest(stages))[0]
        order = executed_schedule(layout.schedule, stages, count)
        ranks = tuple(
            Rank(
                rank_memory(layout, placed, saved, order, boundary, buffers, at),
                _step_flops(layout, costs.flops, at),
                sent(layout, placed, around, boundary, tokens, at),
            )
            for at in range(parallel.pipeline)
        )
        forward = [_stage_flops(layout, costs.flops, stage.index) for stage in layout.stages]
        slowest = max(forward, key=lambda one: one.total)
        return Plan(parallel, self.cluster, layout, placed, found, ranks, slowest, order)

    def _of_a_micro_batch(self, size: int, length: int) -> _Costs:
        """Made once for each size, since a search tries many layouts of the same."""
        if (size, length) not in self._costs:
            sizes = _sizes(size, length)
            # The same units in the finished program, each of one operator or a few there.
            same = zip(self.units, units(self.train.main), strict=True)
            there = {unit.ops: other for unit, other in same}
            self._costs[size, length] = _Costs(
                unit_flops(self.program, self.units, sizes),
                {ops: activations(self.train, there[ops], sizes) for ops in self.kinds},
            )
        return self._costs[size, length]

    def _boundary(self, sizes: Mapping[str, int]) -> int:
        """Bytes that one layer hands to the next for a micro-batch."""
        repeats = [op for op in self.program.main.ops if op.kind == "repeat"]
        carried = [v.type for op in repeats[:1] for v in op.regions[0].args]
        return sum(type.bytes(sizes) for type in carried if type.dtype in FLOATS)


def _sizes(micro_batch: int, length: int) -> dict[str, int]:
    return {"batch": micro_batch, "seq": length, "context": length}


def _step_flops(layout: Layout, flops: Mapping[range, Flops], pipeline: int) -> Flops:
    """FLOPs of a step on one rank, forward and backward."""
    each = layout.micro_batches // len(layout.placement)
    stages = layout.stages_of(pipeline)
    found = sum((_stage_flops(layout, flops, stage) for stage in stages), Flops())
    return found.times(TRAINING_PASSES * each)


def _stage_flops(layout: Layout, flops: Mapping[range, Flops], stage: int) -> Flops:
    """Of one forward pass of a micro-batch."""
    return sum((flops[unit.ops] for unit in layout.stages[stage].units), Flops())
