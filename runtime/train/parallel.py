"""Training on several pipeline ranks, each of which holds some stages of the model.

Ranks count along the data ranks first, then along the pipeline, as in `compiler/parallel/mesh.py`.
Data ranks hold the same stages and work on different sequences; the ranks of a pipeline work on the
same ones. DeepSeek-V3 report, section 3.2.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.cuda import is_available
from torch.distributed import ProcessGroup, all_reduce, new_group

from ..config import Config
from ..model import LanguageModel
from ..stage import StageLoss, StagePlan
from .balance import Balance, ExpertUtilization
from .pipeline import Chunk, Execution, Held, Row
from .ranks import ProcessGroups, all_gather_objects
from .sequences import Sequences
from .settings import Settings, TrainError
from .trainer import Trainer


def check_parallel(config: Config, world_size: int) -> None:
    """Raises TrainError where the ranks that were started cannot train as `parallel` says."""
    parallel = config.parallel
    if parallel is None:
        return
    problems = []
    if parallel.expert > 1:
        problems.append(
            f"`parallel.expert` is {parallel.expert}: experts cannot be trained on ranks of their "
            "own yet; set it to 1"
        )
    size = parallel.pipeline * parallel.replicas * parallel.expert
    if size != world_size:
        mesh = f"{parallel.pipeline} pipeline x {parallel.replicas * parallel.expert} data"
        problems.append(
            f"`parallel` is for {size:,} ranks ({mesh}), and {world_size:,} started: use torchrun "
            f"with {size:,} processes, or build without it (--set parallel=null)"
        )
    if problems:
        raise TrainError("training cannot start:\n  " + "\n  ".join(problems))


@dataclass(frozen=True)
class PipelineMesh:
    """Where this rank is in the mesh, and its process groups.

    `world` has all ranks, `column` those of the same pipeline. `holders` has for each set of
    pipeline ranks that includes this one the group of them and their data ranks; None for a set of
    one rank.
    """

    pipeline: int
    data: int
    data_ranks: int
    ranks: Sequence[int]
    world: ProcessGroup
    column: ProcessGroup
    holders: Mapping[frozenset[int], ProcessGroup | None]

    @classmethod
    def of(cls, config: Config, plans: Sequence[StagePlan], world: ProcessGroup) -> PipelineMesh:
        """Every rank calls it, for groups are made by all ranks together."""
        pipelines, data_ranks = config.parallel.pipeline, config.parallel.replicas
        pipeline, data = divmod(world.rank(), data_ranks)
        columns = [[p * data_ranks + d for p in range(pipelines)] for d in range(data_ranks)]
        column = [_group(ranks) for ranks in columns][data]
        sets = {frozenset(_holders(config, stage)) for stage in range(len(plans))}
        sets |= set(_module_holders(config, plans).values())
        holders = {}
        for one in sorted(sets, key=sorted):
            ranks = [p * data_ranks + d for p in sorted(one) for d in range(data_ranks)]
            group = _group(ranks) if len(ranks) > 1 else None
            if pipeline in one:
                holders[one] = group
        return cls(pipeline, data, data_ranks, columns[data], world, column, holders)


def _group(ranks: Sequence[int]) -> ProcessGroup:
    # The device of a tensor decides which of the two backends is used.
    backend = "cpu:gloo,cuda:nccl" if is_available() else "gloo"
    group: ProcessGroup = new_group(list(ranks), backend=backend)
    return group


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


def make_trainer(
    model: type[LanguageModel],
    device: torch.device,
    seed: int,
    settings: Settings,
    sequences: Sequences,
    ranks: ProcessGroups,
    mesh: PipelineMesh | None,
) -> Trainer:
    """The trainer of a fresh model, or of the stages that a pipeline rank holds."""
    if mesh is None:
        whole = model(device, seed=seed)
        parallel, group = model.config.parallel, ranks.training
        names = (name for name, _ in whole.named_parameters())
        groups = dict.fromkeys(names, group) if parallel and parallel.zero and group else {}
        return Trainer(whole, settings, sequences, ranks.training, shard_groups=groups)
    plans = stage_plans(model)
    here = [s for s in range(len(plans)) if mesh.pipeline in _holders(model.config, s)]
    holds = dict.fromkeys(name for stage in here for name in plans[stage].holds)
    own = model(device, seed=seed, holds=tuple(holds))
    modules = _module_holders(model.config, plans)
    holders = {name: _of_module(name, modules) for name, _ in own.named_parameters()}
    groups = {
        name: group
        for name, one in holders.items()
        if model.config.parallel.zero and (group := mesh.holders[one]) is not None
    }
    trainer = PipelineTrainer(own, settings, sequences, mesh.world, shard_groups=groups)
    schedule = Path(inspect.getfile(model)).parent / "graph" / "schedule.json"
    trainer.attach(mesh, plans, here, holders, Row.read(schedule, mesh.pipeline))
    return trainer


def _of_module(name: str, modules: Mapping[str, frozenset[int]]) -> frozenset[int]:
    """What `modules` say of the module that a weight is in."""
    return next(one for module, one in modules.items() if name.startswith(f"{module}."))


def make_mesh(model: type[LanguageModel], ranks: ProcessGroups) -> PipelineMesh | None:
    """The mesh of a model that was built with several pipeline ranks; all ranks call it.

    Raises TrainError, the same on all ranks, where the ranks that were started do not fit.
    """
    check_parallel(model.config, ranks.world_size)
    if ranks.training is None or model.config.parallel is None:
        return None
    if model.config.parallel.pipeline == 1:
        return None
    return PipelineMesh.of(model.config, stage_plans(model), ranks.training)


def stage_plans(model: type[LanguageModel]) -> Sequence[StagePlan]:
    """What the package of a model says of its stages. Raises TrainError where it has none."""
    package = model.__module__.rpartition(".")[0]
    try:
        plans: Sequence[StagePlan] = importlib.import_module(f"{package}.stages").STAGES
    except ModuleNotFoundError as error:
        if error.name != f"{package}.stages":
            raise
        raise TrainError(
            "the package has no stages.py: it was built without some passes; build it with all"
        ) from None
    return plans


class PipelineTrainer(Trainer):
    """Trains the stages of a pipeline rank; after each step all holders of a weight are equal."""

    def attach(
        self,
        mesh: PipelineMesh,
        plans: Sequence[StagePlan],
        here: Sequence[int],
        holders: Mapping[str, frozenset[int]],
        row: Row,
    ) -> None:
        """Gives the trainer its place; `here` are the numbers of its stages, `holders` the
        pipeline ranks that hold each weight."""
        self.mesh, self.row, self.holders = mesh, row, holders
        self.rank, self.ranks = mesh.data, mesh.data_ranks
        stages = {s: plans[s].stage(self.model, plans[s].first) for s in here}
        config = self.model.config
        self.held = Held(config, stages, len(plans), mesh.ranks, mesh.world)
        self.balances = {s: Balance(self.model, plans[s].holds) for s in here}
        self.stage_holders = {s: frozenset(_holders(config, s)) for s in here}
        # Of several pipeline ranks that hold a weight, one counts it in the norm.
        self.counted = {name for name, h in self.holders.items() if min(h) == mesh.pipeline}

    def _gradients(self, batch: int, tokens_seen: int) -> Tensor:
        batches = self._micro_batches(batch)
        wanted = self.model.config.parallel.micro_batches
        if len(batches) != wanted or len({len(one) for one in batches}) > 1:
            raise TrainError(
                f"a batch of {batch} sequences is {len(batches)} micro-batches for each data rank; "
                f"the schedule of the package is for {wanted}, all of one size"
            )
        share = len(batches[0]) / batch
        step, sums = Execution(self.row, self.held, batches, tokens_seen), self._zeros()
        for entry in self.row.entries:
            if not isinstance(entry, Chunk):
                step.transfer(entry)
            elif entry.kind == "F":
                loss = step.forward(entry)
                sums += self._terms(loss) * share
                if loss.load:
                    self.balances[entry.stage].add(loss.load)
            elif entry.kind in "BI":
                # Gradients of weights are computed with those of inputs: W has nothing to do.
                step.backward(entry, share)
                self.optimizer.collect()
        return sums

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
        all_reduce(sums, group=self.mesh.world)
        for weight in self.optimizer.weights:
            group = self.mesh.holders[self.holders[weight.name]]
            if group is not None:
                weight.reduce(group)
        for stage, balance in self.balances.items():
            group = self.mesh.holders[self.stage_holders[stage]]
            if group is not None:
                balance.reduce(group)

    def _squares(self) -> Tensor:
        squares = self.optimizer.squares(self.counted).to(self.model.device)
        all_reduce(squares, group=self.mesh.column)
        return squares

    def _finish_balance(self, speed: float) -> dict[str, ExpertUtilization]:
        """The utilization in the layers of all stages, in their order."""
        own = {stage: balance.finish(speed) for stage, balance in self.balances.items()}
        found: dict[int, dict[str, ExpertUtilization]] = {}
        for part in all_gather_objects(self.mesh.column, own):
            found |= part
        return {name: use for stage in sorted(found) for name, use in found[stage].items()}

    def _drop_loads(self) -> None:
        for balance in self.balances.values():
            balance.load = None

    def _first_not_finite(self, batch: int) -> str | None:
        bad = self.optimizer.not_finite() if batch else []
        return f"the gradient of {bad[0]}" if bad else None

    @torch.no_grad()
    def losses(self, tokens: Tensor) -> Tensor:
        """This rank's terms of `losses_of`; the ranks of a pipeline call it together."""
        row = Row.forward(self.model.config.parallel.stages[0], self.mesh.pipeline)
        step, sums = Execution(row, self.held, [tokens], self.tokens), self._zeros()
        for entry in row.entries:
            if isinstance(entry, Chunk):
                sums += self._terms(step.forward(entry))
            else:
                step.transfer(entry)
        return sums
