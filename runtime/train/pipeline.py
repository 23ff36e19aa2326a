"""Executes the row of the schedule of one pipeline rank, with torch.distributed.

`graph/schedule-N.json` of the package, for N micro-batches, has for each pipeline rank what it
computes, sends and receives, and numbers all messages. Each rank works through its row, whose
order excludes deadlocks though every send and receive blocks (`compiler/plan/transfers.py`). On a
GPU they block a stream of their own, and chunks that are paired take turns (`overlap.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed import ProcessGroup, recv, send

from ..config import Config
from ..saved import Deferred
from ..stage import Stage, StageLoss
from ..unit import deferring
from .overlap import Overlap
from .sequences import positions
from .waits import Waits


class Chunk(NamedTuple):
    """F, B, I or W of a stage on a micro-batch; I is its gradients of inputs, W of weights."""

    kind: str
    stage: int
    batch: int

    def __str__(self) -> str:
        return f"chunk {self.stage}{self.kind}{self.batch}"


class ChunkPair(NamedTuple):
    """Two chunks, each of which computes while the other's tokens are under way."""

    forward: Chunk
    backward: Chunk

    def __str__(self) -> str:
        return f"pair of {self.forward} and {self.backward}"


RowEntry = Chunk | ChunkPair | tuple[str, int]
"""Of a row: what is computed, or `send N` and `receive N`."""


class Message(NamedTuple):
    """What `stage` reads from another pipeline rank: activations (F) or gradients (B)."""

    kind: str
    stage: int
    batch: int
    sender: int
    receiver: int

    def __str__(self) -> str:
        what = "activations" if self.kind == "F" else "gradients"
        return f"{what} of micro-batch {self.batch} for stage {self.stage}"


def rounds(count: int, parallel: Config) -> list[int]:
    """The lengths of the schedules by which `count` micro-batches are executed, in order."""
    directions = len(parallel.stages)
    parts = -(-count // parallel.longest_schedule)
    each, more = divmod(count // directions, parts)
    return [(each + (i < more)) * directions for i in range(parts)]


@dataclass(frozen=True)
class Row:
    """What one pipeline rank does in a step, in order."""

    entries: tuple[RowEntry, ...]
    messages: tuple[Message, ...]

    @classmethod
    def read(cls, schedule: Path, rank: int) -> Row:
        values = json.loads(schedule.read_text(encoding="utf-8"))
        entries: list[RowEntry] = []
        for word in values["rows"][rank]:
            kind, _, number = word.partition(" ")
            if number:
                entries.append((kind, int(number)))
                continue
            chunks = [
                Chunk(letter, int(stage), int(batch))
                for stage, letter, batch in re.findall(r"(\d+)([FBIW])(\d+)", word)
            ]
            entries.append(ChunkPair(*chunks) if len(chunks) > 1 else chunks[0])
        return cls(tuple(entries), tuple(Message(*one) for one in values["messages"]))

    @classmethod
    def forward(cls, holders: Sequence[int], rank: int) -> Row:
        """One micro-batch through all stages, without gradients; `holders` are their ranks."""
        messages = [
            Message("F", stage, 0, sender, receiver)
            for stage, (sender, receiver) in enumerate(pairwise(holders), 1)
            if sender != receiver
        ]
        numbers = {message.stage: n for n, message in enumerate(messages)}
        entries: list[RowEntry] = []
        for stage in (s for s, holder in enumerate(holders) if holder == rank):
            entries += [("receive", numbers[stage])] if stage in numbers else []
            entries.append(Chunk("F", stage, 0))
            entries += [("send", numbers[stage + 1])] if stage + 1 in numbers else []
        return cls(tuple(entries), tuple(messages))


@dataclass(frozen=True)
class Held:
    """The stages of one rank, how many there are in all, and the ranks of its pipeline."""

    config: Config
    stages: Mapping[int, Stage]
    count: int
    column: Sequence[int]
    """The global rank of each pipeline rank with this rank's sequences."""
    group: ProcessGroup
    waits: Waits
    overlap: Overlap


class Chunked(NamedTuple):
    """What is kept of a stage's forward chunk until its gradients are computed.

    Not the values of what was sent: `ends` are their nodes in autograd's graph.
    """

    received: Sequence[Tensor]
    ends: Sequence[GradientEdge]
    like: Sequence[tuple[torch.Size, torch.dtype]]
    """Shapes and types of what was sent."""
    total: Tensor | None

    @classmethod
    def of(cls, received: Sequence[Tensor], loss: StageLoss) -> Chunked:
        ends = [get_gradient_edge(t) for t in loss.sent if t.requires_grad]
        like = [(t.shape, t.dtype) for t in loss.sent]
        return cls(received, ends, like, loss.total)


class Execution:
    """One step: everything that is under way between the chunks of a rank."""

    defers = True
    """Whether products of chunks I wait for their chunks W."""

    def __init__(self, row: Row, held: Held, batches: Sequence[Tensor], tokens_seen: int) -> None:
        self.row, self.held, self.batches, self.tokens_seen = row, held, batches, tokens_seen
        self.numbers = {message[:3]: n for n, message in enumerate(row.messages)}
        self.arrived: dict[tuple[str, int, int], Sequence[Tensor]] = {}
        self.made: dict[int, Sequence[Tensor]] = {}
        self.events: dict[tuple[str, int, int] | int, Any] = {}
        """Behind which the values of what arrived, or was made, are there."""
        self.saved: dict[tuple[int, int], Chunked] = {}
        self.deferred: dict[tuple[int, int], Deferred] = {}

    def transfer(self, entry: tuple[str, int]) -> None:
        """Sends or receives one message."""
        kind, number = entry
        message, overlap = self.row.messages[number], self.held.overlap
        if kind == "send":
            tensors = self.made.pop(number)
            sending = partial(self._transfer, kind, number, tensors)
            overlap.send(self.events.pop(number, None), sending, tensors)
        else:
            key = message[:3]
            self.arrived[key], self.events[key] = overlap.receive(partial(self._receive, number))

    def _receive(self, number: int) -> Sequence[Tensor]:
        tensors = self._buffers(self.row.messages[number])
        self._transfer("receive", number, tensors)
        return tensors

    def _transfer(self, kind: str, number: int, tensors: Sequence[Tensor]) -> None:
        message, group = self.row.messages[number], self.held.group
        other = self.held.column[message.receiver if kind == "send" else message.sender]
        with self.held.waits.waiting(f"{kind} {number}, {message}", [other]):
            for tensor in tensors:
                if kind == "send":
                    send(tensor, other, group=group)
                else:
                    recv(tensor, other, group=group)

    def _buffers(self, message: Message) -> Sequence[Tensor]:
        if message.kind == "F":
            tokens = self.batches[message.batch]
            return self.held.stages[message.stage].received(len(tokens), tokens.shape[1] - 1)
        like = self.saved[message.stage, message.batch].like
        device = self.batches[message.batch].device
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in like]

    def pair(self, pair: ChunkPair, share: float) -> StageLoss:
        """Both chunks, each of which computes while the other's tokens are under way."""
        with self.held.waits.computing(pair), deferring(self.held.overlap.deferred):
            loss, _ = self.held.overlap.both(
                partial(self.forward, pair.forward), partial(self.backward, pair.backward, share)
            )
        return loss

    def forward(self, chunk: Chunk) -> StageLoss:
        """Computes a stage on a micro-batch, and saves what its gradients need."""
        stage, tokens = self.held.stages[chunk.stage], self.batches[chunk.batch]
        received = tuple(t.requires_grad_() for t in self._taken(chunk))
        inputs = tokens[:, :-1]
        place = positions(inputs, self.held.config)
        with self.held.waits.computing(chunk):
            loss = stage.loss(inputs, tokens[:, 1:], received, place, self.tokens_seen)
        self.saved[chunk.stage, chunk.batch] = Chunked.of(received, loss)
        self._leave(Chunk("F", chunk.stage + 1, chunk.batch), [t.detach() for t in loss.sent])
        return loss

    def backward(self, chunk: Chunk, share: float) -> None:
        """Adds the gradients of a stage's terms, of which `share` counts, to those of weights.

        Of a chunk I, without products that are gradients of weights: `weights` adds them.
        """
        if chunk.kind == "I" and self.defers:
            place = chunk.stage, chunk.batch
            self.deferred[place] = Deferred()
            with deferring(self.deferred[place]):
                self._backward(chunk, share)
        else:
            self._backward(chunk, share)

    def weights(self, chunk: Chunk) -> None:
        """What the chunk I of the same stage and micro-batch has left."""
        with self.held.waits.computing(chunk):
            self.deferred.pop((chunk.stage, chunk.batch)).compute()

    def finish(self) -> None:
        """The end of the row. Raises RuntimeError where a gradient was not computed."""
        self.held.overlap.finish()
        if self.deferred:
            left = ", ".join(str(Chunk("I", *place)) for place in self.deferred)
            raise RuntimeError(f"the schedule has no chunk W for {left}: gradients are missing")

    def _backward(self, chunk: Chunk, share: float) -> None:
        received, sent, _, total = self.saved.pop((chunk.stage, chunk.batch))
        ends: list[Tensor | GradientEdge] = list(sent)
        gradients: list[Tensor | None] = list(self._taken(Chunk("B", *chunk[1:])))
        if total is not None and total.requires_grad:
            ends.append(total * share)
            gradients.append(None)
        with self.held.waits.computing(chunk):
            torch.autograd.backward(ends, gradients)  # type: ignore[arg-type]  # of both kinds
        found = [torch.zeros_like(t) if t.grad is None else t.grad for t in received]
        self._leave(Chunk("B", chunk.stage - 1, chunk.batch), found)

    def _taken(self, reader: Chunk) -> Sequence[Tensor]:
        """What a chunk reads; computing that is issued from now on finds its values there."""
        self.held.overlap.wait(self.events.pop(reader, None))
        return self.arrived.pop(reader, ())

    def _leave(self, reader: Chunk, tensors: Sequence[Tensor]) -> None:
        """Keeps tensors until they are sent, or until the next stage reads them on this rank."""
        if 0 <= reader.stage < self.held.count:
            number = self.numbers.get(reader)
            if number is None:
                self.arrived[reader] = tensors
            else:
                self.made[number] = [t.contiguous() for t in tensors]
                self.events[number] = self.held.overlap.mark()
