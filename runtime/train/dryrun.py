"""One rank of a layout, executed without data and without other ranks: what it holds and sends.

Tensors are on torch's `meta` device and have no values; the process group is torch's `fake` one,
which sends nothing. All else is what a run does: the groups, the stages and experts of the rank,
its row of the schedule, the sums and the optimizer. Experts are in balance, and tokens go to as
many nodes and ranks as the plan says.
"""

from __future__ import annotations

import inspect
import json
import math
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import all_to_all_single, destroy_process_group, init_process_group
from torch.distributed.distributed_c10d import GroupMember, ProcessGroup
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from .. import fp8, functional
from ..exchange import Handle, NodeExchange
from ..model import LanguageModel
from ..stage import StageLoss
from .parallel import MeshTrainer, RankMesh, make_trainer, stages_of
from .pipeline import Chunk, Chunked, Execution
from .ranks import ProcessGroups
from .settings import Settings, TrainError
from .traffic import CountedExchange, Counter, SentTraffic, count_exchanges
from .waits import Waits


@dataclass(frozen=True)
class Transfer:
    """A message that a rank sent to another pipeline rank, or received from it."""

    kind: str
    number: int
    other: int
    bytes: int


@dataclass
class DryRun:
    """What a rank holds and sends in a step; sizes in bytes."""

    rank: int
    ranks: int
    pipeline: int
    micro_batches: int
    weights: int = 0
    fp8_copies: int = 0
    gradients: int = 0
    optimizer: int = 0
    """Masters and moments of the rank's share."""
    activations: int = 0
    """The most that is held besides between two entries of the row: of all micro-batches in
    flight. What a chunk holds inside depends on kernels."""
    sent: dict[str, SentTraffic] = field(default_factory=lambda: defaultdict(SentTraffic))
    transfers: list[Transfer] = field(default_factory=list)
    """All messages along the pipeline, in the order of the row."""

    @property
    def peak(self) -> int:
        parts = self.weights, self.fp8_copies, self.gradients, self.optimizer, self.activations
        return sum(parts)


class Recorder(Counter):
    """Adds up the storage of all tensors that are alive, and what is sent."""

    def __init__(self, run: DryRun) -> None:
        super().__init__(Waits())
        self.run = run
        self.now = self.most = 0
        """Bytes that are held, and the most between two entries of a row."""
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != "meta" or storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        weakref.finalize(storage, self._drop, size)
        self.now += size

    def template(self, made: Any) -> Any:
        """The same tensors without what they were made of, which are not counted."""

        def like(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            with _disable_current_modes():
                empty = torch.empty_like(leaf, requires_grad=False)
            self._known.add(empty.untyped_storage())
            return empty

        if isinstance(made, StageLoss):
            return StageLoss(*(tree_map(like, getattr(made, f.name)) for f in fields(made)))
        return tree_map(like, made)

    def _drop(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()  # such as whether all is finite
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        return result


class BalancedExchange(CountedExchange):
    """As many tokens to each rank; their sizes need no values of the route."""

    goes: int
    """Ranks of the group to which a token goes."""

    def _route(self, experts: Tensor) -> Handle:
        count = experts.flatten(0, -2).shape[0]
        each = -(-count * self.goes // self.ranks)
        tokens = torch.empty(each * self.ranks, dtype=torch.int64, device="meta")
        counts = torch.empty(self.ranks, dtype=torch.int64, device="meta")
        all_to_all_single(counts, counts, group=self.group)
        sizes = [each] * self.ranks
        return Handle(tokens, sizes, sizes, experts.shape[:-1])


def balance_exchanges(model: LanguageModel, counter: Counter) -> int:
    """Lets tokens go evenly to as many nodes and ranks as the plan says.

    Returns how often a token comes to some rank, 1 where experts are not on several.
    """
    plan = json.loads((Path(inspect.getfile(type(model))).parent / "plan.json").read_text())
    known = {one["block"]: one for one in plan["experts"]}
    count_exchanges(model, counter, BalancedExchange)
    comes = 1
    for module in model.modules():
        exchange = getattr(module, "exchange", None)
        if exchange is None:
            continue
        one = known[type(module).__name__]
        k, nodes = one["experts_of_a_token"], one["nodes_of_a_token"]
        hops: list[Any] = [exchange]
        if isinstance(exchange, NodeExchange):
            hops = [exchange.across, exchange.inside]
            hops[0].goes, k = nodes, -(-k // nodes)
        hops[-1].goes = min(k, hops[-1].ranks)
        comes = math.prod(hop.goes for hop in hops)
    return comes


@contextmanager
def without_values(comes: int) -> Iterator[None]:
    """`functional.permute` and `permute_local` with as many rows for each expert.

    A token comes to so many ranks, of which each has as many of its experts. And FP8 products
    without the steps by which they are computed where there is no kernel.
    """
    plain = functional.permute, functional.permute_local, fp8._product

    def permute(x: Tensor, index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        slots = index.numel() // comes
        rows = x.new_empty(slots, x.shape[-1])
        ends = [slots * (expert + 1) // experts for expert in range(experts)]
        offs = torch.tensor(ends, dtype=torch.int32, device="cpu")
        return rows, offs, index.new_empty(slots)

    def product(
        a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, parts: Sequence[int] = ()
    ) -> Tensor:
        return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)

    functional.permute = functional.permute_local = permute
    fp8._product = product
    try:
        yield
    finally:
        functional.permute, functional.permute_local, fp8._product = plain


@dataclass
class Chunks:
    """What a chunk of a stage does, measured at the last that was executed."""

    executed: int = 0
    kept: int = 0
    """Bytes that are held more after a forward chunk than before."""
    sent: dict[str, SentTraffic] = field(default_factory=dict)
    made: Any = None
    """The loss of a forward chunk, the gradients of inputs of a backward one."""


class Replay(Execution):
    """Executes the first two chunks of each kind and stage, and repeats what the second did.

    In the first one FP8 copies of weights and the sums of gradients are made, too. Gradients of
    weights are computed with those of inputs: what they wait with for a chunk W only plans count.
    """

    defers = False

    def __init__(
        self, recorder: Recorder, known: dict[tuple[str, int], Chunks], *given: Any
    ) -> None:
        """`known` is that of all schedules of a step."""
        super().__init__(*given)
        self.recorder, self.known = recorder, known

    def transfer(self, entry: tuple[str, int]) -> None:
        self._between()
        kind, number = entry
        message = self.row.messages[number]
        tensors = self.made.get(number, ())
        super().transfer(entry)
        if kind == "receive":
            tensors = self.arrived[message[:3]]
        other = message.receiver if kind == "send" else message.sender
        size = sum(tensor.nbytes for tensor in tensors)
        self.recorder.run.transfers.append(Transfer(kind, number, other, size))

    def forward(self, chunk: Chunk) -> StageLoss:
        self._between()
        known, place = self.known["F", chunk.stage], (chunk.stage, chunk.batch)
        if known.executed < 2:
            with self._executed(known):
                first = super().forward(chunk)
            if Chunk("F", chunk.stage + 1, chunk.batch) in self.numbers:  # is sent, and gone
                known.kept -= sum(t.nbytes for t in first.sent)
            known.made = self.recorder.template(first)
            return first
        self.recorder.now += known.kept
        self._send(known)
        loss: StageLoss = known.made
        like = [(t.shape, t.dtype) for t in loss.sent]
        self.saved[place] = Chunked(self.arrived.pop(chunk, ()), (), like, None)
        self._leave_like(Chunk("F", chunk.stage + 1, chunk.batch), loss.sent)
        return loss

    def backward(self, chunk: Chunk, share: float) -> None:
        self._between()
        known, reader = self.known["B", chunk.stage], Chunk("B", chunk.stage - 1, chunk.batch)
        if known.executed < 2:
            with self._executed(known):
                super().backward(chunk, share)
            number = self.numbers.get(reader)
            found = self.arrived.get(reader) if number is None else self.made[number]
            known.made = self.recorder.template(found or ())
            return
        self._send(known)
        self.recorder.now -= self.known["F", chunk.stage].kept
        self.saved.pop((chunk.stage, chunk.batch))
        self.arrived.pop(("B", *chunk[1:]), None)
        self._leave_like(reader, known.made)

    def _leave_like(self, reader: Chunk, tensors: Sequence[Tensor]) -> None:
        """Tensors that were not computed; what is sent is held until then."""
        if reader in self.numbers:
            tensors = [torch.empty_like(tensor) for tensor in tensors]
        self._leave(reader, tensors)

    @contextmanager
    def _executed(self, known: Chunks) -> Iterator[None]:
        """Measures what a chunk does while it is executed."""
        recorder = self.recorder
        before, sent = recorder.now, recorder.sent
        recorder.sent = defaultdict(SentTraffic)
        yield
        known.executed += 1
        known.kept, known.sent, recorder.sent = recorder.now - before, recorder.sent, sent
        self._send(known)

    def _send(self, known: Chunks) -> None:
        for purpose, traffic in known.sent.items():
            self.recorder.sent[purpose].add(traffic.messages, traffic.bytes)

    def _between(self) -> None:
        self.recorder.most = max(self.recorder.most, self.recorder.now)


class NoText:
    """Sequences without values."""

    def __init__(self, length: int) -> None:
        self.length = length

    def batch(self, indices: Sequence[int]) -> Tensor:
        return torch.empty(len(indices), self.length + 1, dtype=torch.int64, device="meta")


def dryrun(model: type[LanguageModel], rank: int) -> DryRun:
    """Executes one rank's part of a step of the largest batch.

    Raises TrainError where there is no such rank, or the package is for one rank.
    """
    config, parallel = model.config, model.config.parallel
    ranks = parallel.pipeline * parallel.replicas * parallel.expert
    if not 0 <= rank < ranks:
        raise TrainError(f"there is no rank {rank:,} of {ranks:,}: they count from 0")
    settings, plans = Settings.of(config), stages_of(model).STAGES
    with fake_ranks(rank, ranks) as world:
        mesh = RankMesh.of(config, plans, world)
        run = DryRun(rank, ranks, mesh.pipeline, parallel.micro_batches[-1])
        recorder = Recorder(run)
        text: Any = NoText(settings.sequence_length)
        groups = ProcessGroups(training=world, control=world)
        with recorder:
            trainer = make_trainer(
                model, torch.device("meta"), 0, settings, text, groups, mesh, recorder.waits
            )
            assert isinstance(trainer, MeshTrainer)
            trainer.execution = partial(Replay, recorder, defaultdict(Chunks))
            with without_values(balance_exchanges(trainer.model, recorder)):
                _step(trainer, recorder)
    run.sent = dict(recorder.sent)
    return run


def rows(model: type[LanguageModel], rank: int) -> Iterator[DryRun]:
    """One rank of each pipeline rank, at the place of `rank` among the data ranks of a stage.

    Raises TrainError as `dryrun` does.
    """
    parallel = model.config.parallel
    data = parallel.replicas * parallel.expert
    for pipeline in range(parallel.pipeline):
        yield dryrun(
            model, rank if rank >= data * parallel.pipeline else pipeline * data + rank % data
        )


def unmatched(found: Sequence[DryRun]) -> Iterator[str]:
    """A line for each message that one row sends and the other does not receive as it is.

    Between two rows messages have to be sent and received in one order, and be as large.
    """
    for sender in found:
        for receiver in found:
            there, here = sender.pipeline, receiver.pipeline
            sent = [t for t in sender.transfers if (t.kind, t.other) == ("send", here)]
            expected = [t for t in receiver.transfers if (t.kind, t.other) == ("receive", there)]
            if len(sent) != len(expected):
                counts = f"{len(sent)} messages to row {here}, which receives {len(expected)}"
                yield f"row {there} sends {counts}"
            for one, other in zip(sent, expected, strict=False):
                if (one.number, one.bytes) != (other.number, other.bytes):
                    yield (
                        f"row {there} sends message {one.number} of {one.bytes:,} bytes to row "
                        f"{here}, which receives message {other.number} of {other.bytes:,}"
                    )


def _step(trainer: MeshTrainer, recorder: Recorder) -> None:
    """A step, and what is held before, in and after it."""
    run, model = recorder.run, trainer.model
    for tensor in (*model.parameters(), *model.buffers()):
        recorder.hold(tensor)
    start = recorder.now
    run.weights = _stored(*model.parameters(), *model.buffers())
    run.optimizer = start - run.weights
    batch = run.micro_batches * (trainer.settings.micro_batch or 1) * trainer.ranks
    sums = trainer._gradients(batch, 0)
    trainer._reduce(sums)
    gradients = (w.gradient for w in trainer.optimizer.weights)
    run.gradients = _stored(*(one for one in gradients if one is not None))
    trainer.optimizer.step(1, 1e-4, trainer._squares())
    loads = [b.load for b in trainer.balances.values() if b.load is not None]
    kept = [one.gradients for one in trainer.optimizer.buckets if one.gradients is not None]
    run.fp8_copies = recorder.now - start - _stored(sums, *loads, *kept)
    run.activations = recorder.most - start - run.fp8_copies - run.gradients


def _stored(*tensors: Tensor) -> int:
    """Bytes of the memory in which tensors are, each once."""
    stored = {t.untyped_storage()._cdata: t for t in tensors}
    return sum(t.untyped_storage().nbytes() for t in stored.values())


@contextmanager
def fake_ranks(rank: int, size: int) -> Iterator[ProcessGroup]:
    """A group of `size` ranks in which this process is `rank`, and nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        assert GroupMember.WORLD is not None
        yield GroupMember.WORLD
    finally:
        destroy_process_group()
