"""Training on the ranks of a mesh, each of which holds some stages and experts of the model.

Ranks count along `expert` first, then `replica`, then `pipeline` (`compiler/parallel/mesh.py`).
Data ranks, which are experts times replicas, hold the same stages and work on different sequences;
the ranks of a pipeline work on the same ones. DeepSeek-V3 report, section 3.2.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce, get_process_group_ranks

from ..config import Config
from ..deepep import DeepEPExchange, deep_ep_buffer
from ..exchange import Exchange, NodeExchange
from ..model import LanguageModel
from ..stage import ModelShare, StageLoss, StagePlan, is_inside
from ..symmetric import SymmetricBuffers, SymmetricExchange, symmetric_memory
from ..weights import Stack
from .balance import Balance, ExpertUtilization
from .overlap import Overlap, overlap_on
from .pipeline import Chunk, ChunkPair, Execution, Held, Row, rounds
from .ranks import ProcessGroups, all_gather_objects, new_training_group
from .sequences import Sequences
from .settings import Settings, TrainError
from .trainer import Trainer
from .waits import Waits


def check_parallel(config: Config, world_size: int) -> None:
    """Raises TrainError where the ranks that were started are not those of `parallel`."""
    parallel = config.parallel
    if parallel is None:
        return
    if parallel.exchange == "deep_ep" and find_spec("deep_ep") is None:
        raise TrainError(
            "`parallel.exchange` is deep_ep, and there is no module deep_ep here: install DeepEP "
            "(https://github.com/deepseek-ai/DeepEP), or leave the key out"
        )
    if parallel.exchange == "symmetric_memory" and not symmetric_memory().is_nvshmem_available():
        raise TrainError(
            "`parallel.exchange` is symmetric_memory, and torch finds no NVSHMEM here: install "
            "torch for CUDA, with which it comes, or leave the key out"
        )
    size = parallel.pipeline * parallel.replicas * parallel.expert
    if size != world_size:
        sizes = (f"{parallel[name]} {name}" for name in ("pipeline", "replicas", "expert"))
        mesh = " x ".join(sizes)
        raise TrainError(
            f"`parallel` is for {size:,} ranks ({mesh}), and {world_size:,} started: use torchrun "
            f"with {size:,} processes, or take the section out of the spec"
        )


@dataclass(frozen=True)
class Holders:
    """Which ranks hold a weight: pipeline ranks, and of an expert only those of its replicas."""

    pipelines: frozenset[int]
    expert: bool = False


@dataclass(frozen=True)
class RankMesh:
    """Where this rank is in the mesh, and its process groups.

    `column` are the ranks of its pipeline, `groups` those that hold a weight as it does, None where
    that is this rank alone. `exchange` has the ranks over which the experts are spread; if these
    are several nodes of several ranks, `across` those with its place in all nodes, and `inside`
    those of its node.
    """

    pipeline: int
    data: int
    data_ranks: int
    experts: int
    ranks: Sequence[int]
    world: ProcessGroup
    column: ProcessGroup
    groups: Mapping[Holders, ProcessGroup | None]
    exchange: ProcessGroup
    across: ProcessGroup | None = None
    inside: ProcessGroup | None = None
    symmetric: SymmetricBuffers | None = None
    """Memory for exchanges, where they go by it."""

    @property
    def expert(self) -> int:
        return self.data % self.experts

    @property
    def replica(self) -> int:
        return self.data // self.experts

    @classmethod
    def of(cls, config: Config, plans: Sequence[StagePlan], world: ProcessGroup) -> RankMesh:
        """Every rank calls it, for groups are made by all ranks together."""
        parallel = config.parallel
        experts, data_ranks = parallel.expert, parallel.replicas * parallel.expert
        pipeline, data = divmod(world.rank(), data_ranks)
        rank = world.rank()
        columns = [
            [p * data_ranks + d for p in range(parallel.pipeline)] for d in range(data_ranks)
        ]
        column = [new_training_group(ranks) for ranks in columns][data]
        firsts = range(0, parallel.pipeline * data_ranks, experts)
        exchange = [new_training_group(range(first, first + experts)) for first in firsts][
            rank // experts
        ]
        across = inside = None
        size = parallel.gpus_per_node
        if 1 < size < experts:
            for first in firsts:
                ends = first + experts
                across_places = [
                    new_training_group(range(first + i, ends, size)) for i in range(size)
                ]
                nodes = [new_training_group(range(n, n + size)) for n in range(first, ends, size)]
                if first <= rank < ends:
                    across, inside = across_places[rank % size], nodes[(rank - first) // size]
        sets = {frozenset(_holders(config, stage)) for stage in range(len(plans))}
        sets |= set(_module_holders(config, plans).values())
        groups: dict[Holders, ProcessGroup | None] = {}
        for one in sorted(sets, key=sorted):
            ranks = [p * data_ranks + d for p in sorted(one) for d in range(data_ranks)]
            parts = [[r for r in ranks if r % experts == e] for e in range(experts)]
            made = new_training_group(ranks) if len(ranks) > 1 else None
            of_experts = [new_training_group(part) if len(part) > 1 else None for part in parts]
            if pipeline in one:
                groups[Holders(one)] = made
                groups[Holders(one, expert=True)] = of_experts[rank % experts]
        return cls(
            pipeline, data, data_ranks, experts, columns[data], world, column, groups, exchange,
            across, inside,
        )  # fmt: skip

    def spread(
        self, count: int, waiting: Callable[[], AbstractContextManager[None]], tokens: int | None
    ) -> Any:
        """An exchange for `count` experts; by DeepEP where a rank sends at most `tokens`."""
        if self.symmetric is not None:
            return SymmetricExchange(self.symmetric, count, waiting)
        if tokens is not None:
            return DeepEPExchange(deep_ep_buffer, self.exchange, count, tokens, waiting)
        if self.across is not None and self.inside is not None:
            return NodeExchange(self.across, self.inside, count, waiting)
        return Exchange(self.exchange, count, waiting)


def _holders(config: Config, stage: int) -> Iterable[int]:
    """The pipeline ranks that hold a stage."""
    return (direction[stage] for direction in config.parallel.stages)


def _module_holders(config: Config, plans: Sequence[StagePlan]) -> dict[str, frozenset[int]]:
    """The pipeline ranks that hold each module."""
    found: dict[str, frozenset[int]] = {}
    for stage, plan in enumerate(plans):
        for name in plan.holds:
            found[name] = found.get(name, frozenset()).union(_holders(config, stage))
    return found


def make_mesh(
    model: type[LanguageModel], ranks: ProcessGroups, device: torch.device
) -> RankMesh | None:
    """The mesh of a model that was built to be cut; all ranks call it.

    Raises TrainError, the same on all ranks, where the ranks that were started do not fit, or the
    device has no symmetric memory for what the spec exchanges by it.
    """
    check_parallel(model.config, ranks.world_size)
    parallel = model.config.parallel
    if ranks.training is None or parallel is None or parallel.pipeline * parallel.expert == 1:
        return None
    mesh = RankMesh.of(model.config, stages_of(model).STAGES, ranks.training)
    if parallel.exchange != "symmetric_memory" or mesh.experts == 1:
        return mesh
    # No rank gets more than all tokens of all ranks, each of which comes once.
    rows = mesh.experts * _tokens(Settings.of(model.config))
    try:
        buffers = SymmetricBuffers(mesh.world, mesh.exchange, device, rows, parallel.row_bytes)
    except RuntimeError as error:
        raise TrainError(f"`parallel.exchange`: no symmetric memory on {device}: {error}") from None
    return replace(mesh, symmetric=buffers)


def _tokens(settings: Settings) -> int:
    """Those of a micro-batch."""
    return (settings.micro_batch or 1) * settings.sequence_length


def stages_of(model: type[LanguageModel]) -> Any:
    """The module `stages` of a model's package. Raises TrainError where it has none."""
    name = f"{model.__module__.rpartition('.')[0]}.stages"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise TrainError(
            "the package has no stages.py, with which `parallel` is trained: build it with all "
            "passes and, for experts on several ranks, without --target"
        ) from None


def make_trainer(
    model: type[LanguageModel],
    device: torch.device,
    seed: int,
    settings: Settings,
    sequences: Sequences,
    ranks: ProcessGroups,
    mesh: RankMesh | None,
    waits: Waits,
    overlap: Overlap | None = None,
) -> Trainer:
    """The trainer of a fresh model, or of what a rank of a mesh holds of it.

    What runs beside computing there, `overlap`, is by default all that the device can do.
    """
    zero = model.config.parallel is not None and model.config.parallel.zero
    if mesh is None:
        whole, group = model(device, seed=seed), ranks.training
        return Trainer(whole, settings, sequences, group, sharded=zero, waits=waits)
    overlap = overlap or overlap_on(device)
    module = stages_of(model)
    plans: Sequence[StagePlan] = module.STAGES
    here = [s for s in range(len(plans)) if mesh.pipeline in _holders(model.config, s)]
    holds = tuple(dict.fromkeys(name for stage in here for name in plans[stage].holds))
    own = model(device, seed=seed, share=ModelShare(holds, mesh.expert, mesh.experts))
    modules = _module_holders(model.config, plans)
    experts: set[str] = set()
    others, tokens = get_process_group_ranks(mesh.exchange), None
    if model.config.parallel.exchange == "deep_ep" and device.type != "meta":
        tokens = _tokens(settings)
    exchanging = partial(waits.waiting, "the exchange of tokens", others)
    for name, one in own.named_modules():
        if isinstance(one, Stack):
            experts |= {f"{name}.{weight}" for weight, _ in one.named_parameters()}
        spread = module.SPREAD.get(type(one))
        if spread is not None:
            (stack,) = (child for child in one.children() if isinstance(child, Stack))
            one.__class__ = spread
            one.exchange = overlap.spread(mesh.spread(stack.total, exchanging, tokens))
    holders = {
        name: Holders(
            next(one for module, one in modules.items() if is_inside(name, module)),
            name in experts and mesh.experts > 1,
        )
        for name, _ in own.named_parameters()
    }
    found = {name: mesh.groups[one] for name, one in holders.items()}
    groups = {name: group for name, group in found.items() if group is not None}
    trainer = MeshTrainer(
        own, settings, sequences, mesh.world, holders=groups, sharded=zero, waits=waits
    )
    graphs = Path(inspect.getfile(model)).parent / "graph"
    parallel = model.config.parallel
    sizes = {size for count in parallel.micro_batches for size in rounds(count, parallel)}
    rows = {size: Row.read(graphs / f"schedule-{size}.json", mesh.pipeline) for size in sizes}
    trainer.attach(mesh, plans, here, rows, overlap)
    return trainer


class MeshTrainer(Trainer):
    """Trains what a rank holds; after each step all holders of a weight are equal."""

    execution: Callable[..., Execution] = Execution

    def attach(
        self,
        mesh: RankMesh,
        plans: Sequence[StagePlan],
        here: Sequence[int],
        rows: Mapping[int, Row],
        overlap: Overlap,
    ) -> None:
        """Gives the trainer its place; `here` are the numbers of its stages, `rows` are by the
        count of micro-batches of a schedule."""
        self.mesh, self.rows = mesh, rows
        self.rank, self.ranks = mesh.data, mesh.data_ranks
        stages = {s: plans[s].stage(self.model, plans[s].first) for s in here}
        config = self.model.config
        self.held = Held(config, stages, len(plans), mesh.ranks, mesh.world, self.waits, overlap)
        self.balances = {s: Balance(self.model, plans[s].holds) for s in here}
        self.stage_holders = {s: Holders(frozenset(_holders(config, s))) for s in here}

    @property
    def batches(self) -> list[int]:
        """The batches for which there is a schedule, in sequences."""
        counts = self.model.config.parallel.micro_batches
        return [count * (self.settings.micro_batch or 1) * self.ranks for count in counts]

    def _batch_at(self, tokens: int, steps: int) -> int:
        """The nearest batch for which there is a schedule: while it grows, it grows in stairs."""
        batch = super()._batch_at(tokens, steps)
        return min(self.batches, key=lambda one: (abs(one - batch), one))

    def _gradients(self, batch: int, tokens_seen: int) -> Tensor:
        batches, sums = self._micro_batches(batch), self._zeros()
        # Terms of a stage are those of all ranks over which experts are spread.
        share = len(batches[0]) * self.mesh.experts / batch
        for size in rounds(len(batches), self.model.config.parallel):
            sums += self._round(batches[:size], share, tokens_seen)
            del batches[:size]
        return sums

    def _round(self, batches: Sequence[Tensor], share: float, tokens_seen: int) -> Tensor:
        """The gradients of some micro-batches, by one schedule."""
        row, sums = self.rows[len(batches)], self._zeros()
        step = self.execution(row, self.held, batches, tokens_seen)
        for entry in row.entries:
            if isinstance(entry, ChunkPair):
                self._add(step.pair(entry, share), entry.forward.stage, share, sums)
                self.optimizer.collect()
            elif not isinstance(entry, Chunk):
                step.transfer(entry)
            elif entry.kind == "F":
                self._add(step.forward(entry), entry.stage, share, sums)
            else:
                if entry.kind in "BI":
                    step.backward(entry, share)
                elif step.defers:
                    step.weights(entry)
                self.optimizer.collect()
        step.finish()
        return sums

    def _add(self, loss: StageLoss, stage: int, share: float, sums: Tensor) -> None:
        """Adds a stage's terms, of which `share` counts, and its loads of experts."""
        sums += self._terms(loss) * share
        if loss.load:
            self.balances[stage].add(loss.load)

    def _terms(self, loss: StageLoss) -> Tensor:
        """A stage's terms of `losses_of`."""
        sums = self._zeros()
        for i, term in enumerate((loss.total, loss.main, loss.balance, *loss.mtp)):
            if term is not None:
                sums[i] = term.detach()
        return sums

    def _zeros(self) -> Tensor:
        depth = self.model.config.architecture.mtp.depth
        return torch.zeros(3 + depth, dtype=torch.float64, device=self.model.device)

    def _reduce(self, sums: Tensor) -> None:
        with self._all_waiting("the sums of losses"):
            all_reduce(sums, group=self.mesh.world)
            for stage, balance in self.balances.items():
                group = self.mesh.groups[self.stage_holders[stage]]
                if group is not None:
                    balance.reduce(group)
        self.optimizer.reduce()

    def _all_waiting(self, what: str) -> AbstractContextManager[None]:
        return self.waits.waiting(what, get_process_group_ranks(self.mesh.world))

    def _finish_balance(self, speed: float) -> dict[str, ExpertUtilization]:
        """The utilization in the layers of all stages, in their order."""
        own = {stage: balance.finish(speed) for stage, balance in self.balances.items()}
        found: dict[int, dict[str, ExpertUtilization]] = {}
        with self.waits.waiting("the loads of experts", self.mesh.ranks):
            parts = all_gather_objects(self.mesh.column, own)
        for part in parts:
            found |= part
        return {name: use for stage in sorted(found) for name, use in found[stage].items()}

    def _drop_loads(self) -> None:
        for balance in self.balances.values():
            balance.load = None

    def _forward(self, tokens: Tensor) -> None:
        self.losses(tokens)

    @torch.no_grad()
    def losses(self, tokens: Tensor) -> Tensor:
        """This rank's terms of `losses_of`; all ranks call it together."""
        row = Row.forward(self.model.config.parallel.stages[0], self.mesh.pipeline)
        step, sums = Execution(row, self.held, [tokens], self.tokens), self._zeros()
        for entry in row.entries:
            if isinstance(entry, Chunk):
                sums += self._terms(step.forward(entry)) * self.mesh.experts
            elif not isinstance(entry, ChunkPair):
                step.transfer(entry)
        step.finish()
        return sums
