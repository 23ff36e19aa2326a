"""Prompts and answers on different engines: one computes prompts and sends their pages, another
goes on from there.

What travels are a request with its first token, and the blocks of the KV cache of its prompt, each
by itself. If one does not arrive in time, the decode engine computes the prompt, which gives the
same bits, as after preemption.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Generic, Literal, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from .engine import Engine
from .request import Event, Sampling
from .scheduler import Request


@dataclass(frozen=True)
class Ask:
    """A request whose prompt another rank shall compute."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    salt: bytes


@dataclass(frozen=True)
class Handoff:
    """A request whose prompt is computed, and how many blocks of it follow."""

    asked: Ask
    event: Event
    """What the prefill engine says of it: its first token, or more where it had drafted, and its
    end if it has ended with them."""
    blocks: int = 0
    drafts: tuple[int, ...] = ()
    tails: Mapping[int, Tensor] = field(default_factory=dict)
    """What MTP modules need to go on; see `Request`."""


@dataclass(frozen=True)
class BlockOf:
    """One block of a request's pages, as `Pages.read` gives it."""

    id: str
    index: int
    data: Tensor


Message = Handoff | BlockOf


@dataclass(frozen=True)
class Abort:
    """That nobody wants such a request any more."""

    id: str


ALIVE = 0.3
"""Seconds without a message after which one says so: the group has a time limit for each."""


class Sink(Protocol):
    """Where a prefill engine sends to. Messages may be lost, but for handoffs."""

    def send(self, message: Message) -> None:
        """Returns at once."""


class Source(Protocol):
    """Where a decode engine receives from."""

    def receive(self) -> list[Message]:
        """What has arrived since the last time."""


class InProcess:
    """Both engines are in one process."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()

    def send(self, message: Message) -> None:
        self._messages.append(message)

    def receive(self) -> list[Message]:
        found = list(self._messages)
        self._messages.clear()
        return found


M = TypeVar("M", Message, Ask | Abort)


class Gloo(Generic[M]):
    """Between two ranks of a group: one sends, the other receives, each in a thread of its own."""

    closed = False
    """Of the receiver: whether the other has closed, and all that it sent was received."""

    def __init__(self, group: dist.ProcessGroup, other: int, sends: bool) -> None:
        """`other` is the rank of the other engine among all."""
        self._group, self._other = group, other
        self._messages: SimpleQueue[M | None] = SimpleQueue()
        self._failure: Exception | None = None
        self._thread = Thread(target=self._send if sends else self._receive, daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the other rank has ended before it closed, or hangs."""
        return self._failure is not None

    def send(self, message: M) -> None:
        """Raises RuntimeError where the other rank has ended."""
        self._check()
        self._messages.put(message)

    def receive(self) -> list[M]:
        """Raises RuntimeError where the other rank has ended before it closed."""
        self._check()
        found: list[M] = []
        while True:
            try:
                message = self._messages.get_nowait()
            except Empty:
                return found
            if message is None:
                self.closed = True
            else:
                found.append(message)

    def close(self) -> None:
        self._messages.put(None)
        self._thread.join()

    def _send(self) -> None:
        try:
            more = True
            while more:
                try:
                    message: M | Literal["alive"] | None = self._messages.get(timeout=ALIVE)
                except Empty:
                    message = "alive"
                dist.send_object_list([message], self._other, self._group)
                more = message is not None
        except Exception as error:
            self._failure = error

    def _receive(self) -> None:
        try:
            more = True
            while more:
                found: list[M | Literal["alive"] | None] = [None]
                dist.recv_object_list(found, self._other, self._group)
                (message,) = found
                if message != "alive":
                    self._messages.put(message)
                more = message is not None
        except Exception as error:
            self._failure = error

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"rank {self._other} has ended or hangs") from self._failure


class PrefillEngine:
    """Computes prompts. A request leaves it with its first token."""

    def __init__(self, engine: Engine, transport: Sink) -> None:
        self.engine, self.transport = engine, transport
        self._asked: dict[str, Ask] = {}

    def add(self, id: str, prompt: Sequence[int], sampling: Sampling, salt: bytes = b"") -> None:
        """Raises ValueError as `Engine.add`."""
        self.engine.add(id, prompt, sampling, salt)
        self._asked[id] = Ask(id, tuple(prompt), sampling, salt)

    def ask(self, asked: Ask) -> None:
        """The same for another rank, which is answered that the request cannot run."""
        try:
            self.add(asked.id, asked.prompt, asked.sampling, asked.salt)
        except ValueError as error:
            event = Event(asked.id, finish="error", message=str(error))
            self.transport.send(Handoff(asked, event))

    def abort(self, id: str) -> None:
        self.engine.abort(id)

    @property
    def busy(self) -> bool:
        return self.engine.busy

    def step(self) -> None:
        """One step, after which requests with a token are on their way."""
        for event in self.engine.step():
            asked = self._asked.pop(event.id)
            if event.finish is not None:
                self.transport.send(Handoff(asked, event))
                continue
            request, pages = self.engine.hand_over(event.id)
            drafts, tails = tuple(request.drafts), request.tails
            self.transport.send(Handoff(asked, event, len(pages), drafts, tails))
            for index, data in enumerate(pages):
                self.transport.send(BlockOf(event.id, index, data))


@dataclass
class _Arriving:
    """A request of which some blocks may be missing."""

    request: Request
    wanted: int
    until: float
    pages: dict[int, Tensor] = field(default_factory=dict)


class DecodeEngine:
    """Goes on with requests when all their blocks are there, or `seconds` after their first token,
    with what it computes itself."""

    def __init__(self, engine: Engine, transport: Source, seconds: float = 1.0) -> None:
        self.engine, self.transport, self.seconds = engine, transport, seconds
        self.recomputed = 0
        """Requests of which a block was lost."""
        self._arriving: dict[str, _Arriving] = {}
        self._ended: list[Event] = []

    @property
    def arriving(self) -> int:
        """Requests of which some blocks may be missing."""
        return len(self._arriving)

    def abort(self, id: str) -> None:
        """As `Engine.abort`."""
        if self._arriving.pop(id, None) is not None:
            self._ended.append(Event(id, finish="abort"))
        self.engine.abort(id)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything, or something may arrive."""
        return bool(self._arriving or self._ended) or self.engine.busy

    def step(self) -> list[Event]:
        """At most two events for each request: its first tokens, and what a step brought."""
        events, self._ended = self._ended, []
        for message in self.transport.receive():
            if isinstance(message, Handoff):
                events.append(self._begin(message))
            elif (found := self._arriving.get(message.id)) is not None:
                found.pages[message.index] = message.data
        for id, one in list(self._arriving.items()):
            try:
                if not self._go_on(one):
                    continue
            except ValueError as error:  # the engines do not fit
                events.append(Event(id, finish="error", message=str(error)))
            del self._arriving[id]
        return [*events, *self.engine.step()]

    def _begin(self, handoff: Handoff) -> Event:
        if handoff.event.finish is not None:
            return handoff.event
        try:
            asked = handoff.asked
            request = self.engine.check(asked.id, asked.prompt, asked.sampling, asked.salt)
        except ValueError as error:
            return replace(handoff.event, finish="error", message=str(error))
        request.cached = handoff.event.cached
        request.drafts, request.tails = list(handoff.drafts), dict(handoff.tails)
        for token in handoff.event.tokens:
            request.output.append(token.id)
            if request.matcher is not None:
                request.matcher.consume(token.id)
        until = time.monotonic() + self.seconds
        self._arriving[asked.id] = _Arriving(request, handoff.blocks, until)
        return handoff.event

    def _go_on(self, one: _Arriving) -> bool:
        if len(one.pages) == one.wanted:
            return self.engine.take_over(one.request, [one.pages[i] for i in range(one.wanted)])
        if time.monotonic() < one.until:
            return False
        self.recomputed += 1
        one.request.drafts, one.request.tails = [], {}
        return self.engine.take_over(one.request, [])
