"""Streams that are none, and whether what is issued on them could be executed out of order.

All is executed at once, as it is issued. Beside that each operator has a place on its stream, and
each stream a clock: for every stream, up to which of its operators what comes next is behind. An
operator that reads what another stream writes, and is not behind that, could come before it on a
GPU; so could one that writes what another still reads, or memory that was given back too early.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import local
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.places import TEXT

Clock = dict[str, int]
"""The last operator of each stream that something is behind."""


@dataclass
class StandInEvent:
    clock: Clock

    def query(self) -> bool:
        """Never over before somebody waits for it."""
        return False


@dataclass
class StandInStream:
    name: str
    clock: Clock = field(default_factory=dict)

    def record_event(self) -> StandInEvent:
        return StandInEvent(dict(self.clock))

    def wait_event(self, event: StandInEvent) -> None:
        for name, last in event.clock.items():
            self.clock[name] = max(last, self.clock.get(name, 0))

    def wait_stream(self, other: StandInStream) -> None:
        self.wait_event(other.record_event())


@dataclass
class Memory:
    """Where a tensor lies: the stream that has it, and who wrote and read it last."""

    stream: str
    written: Clock = field(default_factory=dict)
    read: Clock = field(default_factory=dict)


class Races:
    """Three streams, what was found on them, and where the host waited for one."""

    def __init__(self) -> None:
        self.computing = StandInStream("computing")
        self.exchanges = StandInStream("exchanges")
        self.messages = StandInStream("messages")
        self.found: list[str] = []
        self.host_waits: list[str] = []
        self.doing = ""
        self._current = local()
        self._memory: weakref.WeakKeyDictionary[Any, Memory] = weakref.WeakKeyDictionary()
        self._free: dict[str, list[Memory]] = {}

    def current(self) -> StandInStream:
        return getattr(self._current, "stream", self.computing)

    @contextmanager
    def entered(self, stream: StandInStream) -> Iterator[None]:
        before, self._current.stream = self.current(), stream
        try:
            yield
        finally:
            self._current.stream = before

    def streams(self, overlap: Any) -> Any:
        """Of a module `overlap`, what runs beside computing, on these streams."""
        found = overlap.SideStreams(self.exchanges, self.messages, self.current, self.entered)
        plain = found.exchange

        def exchange(function: Callable[..., Any], *given: Any) -> Any:
            return plain(partial(self._named, function), *given)

        found.exchange = exchange
        return found

    def _named(self, function: Callable[..., Any], *given: Any) -> Any:
        self.doing = function.__name__
        try:
            return function(*given)
        finally:
            self.doing = ""

    def executed(self, name: str, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        """An operator on the current stream, its operands and what it changes or makes."""
        stream = self.current()
        place = stream.clock[stream.name] = stream.clock.get(stream.name, 0) + 1
        for tensor in reads:
            memory = self._of(tensor, made=False)
            self._behind(name, "reads", memory.written)
            memory.read[stream.name] = place
        for tensor in writes:
            memory = self._of(tensor, made=True)
            self._behind(name, "writes", memory.written | memory.read)
            memory.written, memory.read = {stream.name: place}, {}

    def _behind(self, name: str, does: str, others: Clock) -> None:
        stream = self.current()
        for other, place in others.items():
            if stream.clock.get(other, 0) < place:
                self.found.append(f"{name}: {stream.name} {does} what {other} uses")

    def _of(self, tensor: Tensor, *, made: bool) -> Memory:
        storage = tensor.untyped_storage()
        known = self._memory.get(storage)
        if known is None:
            known = self._memory[storage] = Memory(self.current().name if made else "computing")
            weakref.finalize(storage, self._give_back, known)
            if made:  # maybe where others were that have been given back
                for before in self._free.pop(known.stream, []):
                    self._behind("memory", "takes", before.written | before.read)
        return known

    def _give_back(self, memory: Memory) -> None:
        self._free.setdefault(memory.stream, []).append(memory)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Where numbers become those of the host, it waits."""
        plain = torch.Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            self.host_waits.append(self.doing)
            return plain(tensor)

        torch.Tensor.tolist = tolist  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.Tensor.tolist = plain  # type: ignore[method-assign]


class Watch(TorchDispatchMode):
    """Tells all operators of the thread that enters it."""

    def __init__(self, races: Races) -> None:
        super().__init__()
        self.races = races

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # there is none: to skip it, torch would load it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        reads = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func.namespace == "c10d":
            writes = {"alltoall_base_": reads[:1], "send": []}.get(name, reads)
            reads = {"alltoall_base_": reads[1:2], "send": reads}.get(name, [])
        else:
            returns = [one.alias_info for one in func._schema.returns]
            if returns and all(one and not one.is_write for one in returns):
                return result  # a view
            if name in ("_local_scalar_dense", "nonzero"):
                self.races.host_waits.append(self.races.doing)
            writes = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.races.executed(name, reads, writes)
        return result


def raced(package: Any) -> dict[str, Any]:
    """A step of this process's rank as always, and one with streams: run by the ranks of
    `tests/support/processes.py`."""
    name = f"{package.__name__}.runtime.train"
    overlap, parallel, pipeline, ranks, settings, sequences, waits = (
        importlib.import_module(f"{name}.{one}")
        for one in ("overlap", "parallel", "pipeline", "ranks", "settings", "sequences", "waits")
    )
    races = Races()
    deferred = {"chunks I": 0, "pairs": 0}

    class Watched(pipeline.Execution):  # type: ignore[misc, name-defined]
        """Operators are those of chunks and messages, in whatever thread they are."""

        def transfer(self, entry: Any) -> None:
            with Watch(races):
                super().transfer(entry)

        def forward(self, chunk: Any) -> Any:
            with Watch(races):
                return super().forward(chunk)

        def backward(self, chunk: Any, share: float) -> None:
            with Watch(races):
                super().backward(chunk, share)

        def weights(self, chunk: Any) -> None:
            with Watch(races):
                super().weights(chunk)

    given = settings.Settings.of(package.config)
    text = torch.tensor(list(TEXT.read_bytes()[:3000]), dtype=torch.uint8)
    found = []
    with ranks.init_process_groups() as groups:
        mesh = parallel.make_mesh(package.Model, groups, torch.device("cpu"))
        side = races.streams(overlap)

        class Counted(overlap.Deferred):  # type: ignore[misc, name-defined]
            def add(self, *given: Any) -> None:
                deferred["pairs" if self is side.deferred else "chunks I"] += 1
                super().add(*given)

        side.deferred, pipeline.Deferred = Counted(), Counted
        for streams in (None, side):
            trainer = parallel.make_trainer(
                package.Model, torch.device("cpu"), 0, given,
                sequences.Sequences([text], given.sequence_length, 0), groups, mesh,
                waits.Waits(), streams,
            )  # fmt: skip
            if streams:
                trainer.execution = Watched
            with races.counted():
                trainer.step()
            found.append({name: one.clone() for name, one in trainer.model.named_parameters()})
    same = all(torch.equal(one, found[1][name]) for name, one in found[0].items())
    placed = races.computing.clock
    return {
        "same": same,
        "races": races.found,
        "host waits": races.host_waits,
        "clock": placed,
        **deferred,
    }
