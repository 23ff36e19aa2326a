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
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Literal, Protocol

import torch.distributed as dist
from torch import Tensor

from .engine import Engine
from .request import Event, Sampling, Token
from .scheduler import Request


@dataclass(frozen=True)
class Handoff:
    """A request whose prompt is computed, and how many blocks of it follow."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    salt: bytes
    first: tuple[Token, ...]
    """The tokens that the prefill engine chose: one, or two where it had drafted."""
    blocks: int
    cached: int
    drafts: tuple[int, ...] = ()
    tails: Mapping[int, Tensor] = field(default_factory=dict)
    """What MTP modules need to go on; see `Request`."""
    ended: Event | None = None
    """Of a request that has ended with its first token: all that is to be said of it."""


@dataclass(frozen=True)
class BlockOf:
    """One block of a request's pages, as `Pages.read` gives it."""

    id: str
    index: int
    data: Tensor


Message = Handoff | BlockOf

ALIVE = 1.0
"""Seconds without a message after which one says so: the group has a time limit for each."""


class Transport(Protocol):
    """From one prefill engine to one decode engine. Messages may be lost, but for handoffs."""

    def send(self, message: Message) -> None:
        """Returns at once."""

    def receive(self) -> list[Message]:
        """What has arrived since the last time."""

    def close(self) -> None:
        """Nothing more is sent."""


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

    def close(self) -> None:
        pass


class Gloo:
    """Between two ranks of a group: one sends, the other receives, each in a thread of its own."""

    def __init__(self, group: dist.ProcessGroup, other: int, sends: bool) -> None:
        """`other` is the rank of the other engine among all."""
        self._group, self._other = group, other
        self._messages: SimpleQueue[Message | None] = SimpleQueue()
        self._failure: Exception | None = None
        self._thread = Thread(target=self._send if sends else self._receive, daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Raises RuntimeError where the other rank has ended."""
        self._check()
        self._messages.put(message)

    def receive(self) -> list[Message]:
        """Raises RuntimeError where the other rank has ended before it closed."""
        self._check()
        found: list[Message] = []
        while True:
            try:
                message = self._messages.get_nowait()
            except Empty:
                return found
            if message is not None:
                found.append(message)

    def close(self) -> None:
        self._messages.put(None)
        self._thread.join()

    def _send(self) -> None:
        try:
            more = True
            while more:
                try:
                    message: Message | Literal["alive"] | None = self._messages.get(timeout=ALIVE)
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
                found: list[Message | Literal["alive"] | None] = [None]
                dist.recv_object_list(found, self._other, self._group)
                if found[0] != "alive":
                    self._messages.put(found[0])
                more = found[0] is not None
        except Exception as error:
            self._failure = error

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"rank {self._other} has ended: {self._failure}")


class PrefillEngine:
    """Computes prompts. A request leaves it with its first token."""

    def __init__(self, engine: Engine, transport: Transport) -> None:
        self.engine, self.transport = engine, transport
        self._asked: dict[str, tuple[tuple[int, ...], Sampling, bytes]] = {}

    def add(self, id: str, prompt: Sequence[int], sampling: Sampling, salt: bytes = b"") -> None:
        """Raises ValueError as `Engine.add`."""
        self.engine.add(id, prompt, sampling, salt)
        self._asked[id] = tuple(prompt), sampling, salt

    def abort(self, id: str) -> None:
        self.engine.abort(id)

    @property
    def busy(self) -> bool:
        return self.engine.busy

    def step(self) -> None:
        """One step, after which requests with a token are on their way."""
        for event in self.engine.step():
            if event.finish is not None:
                prompt, sampling, salt = self._asked.pop(event.id)
                given = event.id, prompt, sampling, salt, event.tokens
                self.transport.send(Handoff(*given, 0, event.cached, ended=event))
                continue
            del self._asked[event.id]
            request, pages = self.engine.hand_over(event.id)
            given = event.id, request.prompt, request.sampling, request.salt, event.tokens
            drafts, tails = tuple(request.drafts), request.tails
            self.transport.send(Handoff(*given, len(pages), event.cached, drafts, tails))
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

    def __init__(self, engine: Engine, transport: Transport, seconds: float = 1.0) -> None:
        self.engine, self.transport, self.seconds = engine, transport, seconds
        self.recomputed = 0
        """Requests of which a block was lost."""
        self._arriving: dict[str, _Arriving] = {}

    def abort(self, id: str) -> None:
        """As `Engine.abort`, but that a request which is arriving ends without an event."""
        self._arriving.pop(id, None)
        self.engine.abort(id)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything, or something may arrive."""
        return bool(self._arriving) or self.engine.busy

    def step(self) -> list[Event]:
        """At most two events for each request: its first tokens, and what a step brought."""
        events = []
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

    def _begin(self, told: Handoff) -> Event:
        if told.ended is not None:
            return told.ended
        try:
            request = self.engine.check(told.id, told.prompt, told.sampling, told.salt)
        except ValueError as error:
            return Event(told.id, told.first, "error", str(error), told.cached)
        request.cached = told.cached
        request.drafts, request.tails = list(told.drafts), dict(told.tails)
        for token in told.first:
            request.output.append(token.id)
            if request.matcher is not None:
                request.matcher.consume(token.id)
        self._arriving[told.id] = _Arriving(request, told.blocks, time.monotonic() + self.seconds)
        return Event(told.id, told.first, cached=told.cached)

    def _go_on(self, one: _Arriving) -> bool:
        if len(one.pages) == one.wanted:
            return self.engine.take_over(one.request, [one.pages[i] for i in range(one.wanted)])
        if time.monotonic() < one.until:
            return False
        self.recomputed += 1
        one.request.drafts, one.request.tails = [], {}
        return self.engine.take_over(one.request, [])
