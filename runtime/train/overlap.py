"""What runs beside computing: exchanges of tokens, and messages along the pipeline.

On a GPU each kind has a stream of its own. Two chunks that the schedule pairs take turns: when the
tokens of one are under way, the other computes. Before either waits for its own, what there is of
gradients of weights is computed, which nothing waits for. A chunk alone waits for its tokens at
once, and hides nothing (DeepSeek-V3 report, section 3.2.1; `compiler/plan/overlap.py` counts just
this).

Tensors need no marks of the streams that use them. What an exchange reads is held until computing
waits for it. What it makes comes from the memory of its own stream, which the next one on that
stream may take again: that one begins behind all computing that was issued before, and while it is
issued no other is. Messages that are sent are held until they have gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from threading import Semaphore
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..exchange import Way
from ..saved import Deferred

First = TypeVar("First")
Second = TypeVar("Second")
Found = TypeVar("Found")


class Overlap(Protocol):
    """How a rank's chunks, exchanges and messages follow one another."""

    @property
    def deferred(self) -> Deferred | None:
        """Where the backward chunk of a pair leaves gradients of weights, if they fill gaps."""

    def spread(self, exchange: Any) -> Any:
        """The exchange by which chunks send tokens."""

    def both(
        self, forward: Callable[[], First], backward: Callable[[], Second]
    ) -> tuple[First, Second]:
        """What two chunks that are paired give."""

    def mark(self) -> Any:
        """An event behind all computing that has been issued."""

    def send(self, made: Any, sending: Callable[[], None], tensors: Sequence[Tensor]) -> None:
        """Sends tensors, which are there behind the event `made`."""

    def receive(self, receiving: Callable[[], Found]) -> tuple[Found, Any]:
        """What is received, and the event behind which it is there."""

    def wait(self, event: Any) -> None:
        """Computing that is issued from now on is behind an event."""

    def finish(self) -> None:
        """Computing that is issued from now on is behind all that was sent."""


class InOrder:
    """One after the other, on a device without streams."""

    deferred = None

    def spread(self, exchange: Any) -> Any:
        return exchange

    def both(
        self, forward: Callable[[], First], backward: Callable[[], Second]
    ) -> tuple[First, Second]:
        return forward(), backward()

    def mark(self) -> None:
        return None

    def send(self, made: None, sending: Callable[[], None], tensors: Sequence[Tensor]) -> None:
        sending()

    def receive(self, receiving: Callable[[], Found]) -> tuple[Found, None]:
        return receiving(), None

    def wait(self, event: None) -> None:
        pass

    def finish(self) -> None:
        pass


class Turns:
    """Two functions of which one runs at a time, until it gives the other its turn."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "second chunk")
        self._running: int | None = None  # which of the two; None while there are none
        self._failed = False

    def both(
        self, first: Callable[[], First], second: Callable[[], Second]
    ) -> tuple[First, Second]:
        """What both give; the first begins. Where one fails the other ends at its next turn."""
        self._turns, self._ended = (Semaphore(0), Semaphore(0)), [False, False]
        self._running, self._failed = 0, False

        def later() -> Second:
            self._turns[1].acquire()
            return self._run(second, 1)

        other = self._thread.submit(later)
        try:
            found = self._run(first, 0)
        except TurnsEnded:
            other.result()  # raises what the second one failed of
            raise
        finally:
            other.exception()  # waits for its end
            self._running = None
        return found, other.result()

    def _run(self, function: Callable[[], Found], own: int) -> Found:
        try:
            if self._failed:
                raise TurnsEnded
            return function()
        except BaseException:
            self._failed = True
            raise
        finally:
            self._ended[own], self._running = True, 1 - own
            self._turns[1 - own].release()

    def give(self) -> None:
        """Lets the other run until it gives the turn back, or has ended."""
        own = self._running
        if own is None or self._ended[1 - own]:
            return
        self._running = 1 - own
        self._turns[1 - own].release()
        self._turns[own].acquire()
        if self._failed:
            raise TurnsEnded


class TurnsEnded(Exception):
    """The other of two paired chunks has failed."""


@dataclass
class SideStreams:
    """Streams for exchanges and for messages; `current` is the one that computes.

    `entered` makes a stream the current one. What streams are is left to `torch.cuda`, or to those
    of `tests/support/races.py`.
    """

    exchanges: Any
    messages: Any
    current: Callable[[], Any] = torch.cuda.current_stream
    entered: Callable[[Any], AbstractContextManager[Any]] = torch.cuda.stream
    turns: Turns = field(default_factory=Turns)
    deferred: Deferred = field(default_factory=Deferred)
    _sent: list[tuple[Any, Sequence[Tensor]]] = field(default_factory=list)

    def spread(self, exchange: Any) -> SideExchange:
        return SideExchange(exchange, self)

    def both(
        self, forward: Callable[[], First], backward: Callable[[], Second]
    ) -> tuple[First, Second]:
        computes = self.current()

        def there() -> First:
            with self.entered(computes):
                return forward()

        # The backward chunk begins: gradients can go to the last experts almost at once.
        try:
            second, first = self.turns.both(backward, there)
            self.deferred.compute()
        finally:
            self.deferred.drop()
        return first, second

    def exchange(self, function: Callable[..., Found], *given: Any) -> Found:
        """What `function` gives, on the stream of exchanges, while the other chunk computes."""
        self.exchanges.wait_stream(self.current())
        with self.entered(self.exchanges):
            found = function(*given)
        done = self.exchanges.record_event()
        self.turns.give()
        self.deferred.compute()
        self.wait(done)
        return found

    def mark(self) -> Any:
        return self.current().record_event()

    def send(self, made: Any, sending: Callable[[], None], tensors: Sequence[Tensor]) -> None:
        self._sent = [one for one in self._sent if not one[0].query()]
        self.messages.wait_event(made)
        with self.entered(self.messages):
            sending()
        self._sent.append((self.messages.record_event(), tensors))

    def receive(self, receiving: Callable[[], Found]) -> tuple[Found, Any]:
        self.messages.wait_stream(self.current())
        with self.entered(self.messages):
            found = receiving()
        return found, self.messages.record_event()

    def wait(self, event: Any) -> None:
        if event is not None:
            self.current().wait_event(event)

    def finish(self) -> None:
        for done, _ in self._sent:
            self.wait(done)
        self._sent.clear()


@dataclass(frozen=True)
class SideExchange:
    """An exchange of tokens on a stream of its own, with what `exchange` promises."""

    one: Any
    streams: SideStreams

    def dispatch(self, *rows: Tensor) -> tuple[Tensor | Way, ...]:
        found: tuple[Tensor | Way, ...] = self.streams.exchange(self.one.dispatch, *rows)
        return found

    def dispatch_again(self, *given: Tensor | Way) -> Tensor | tuple[Tensor, ...]:
        found: Tensor | tuple[Tensor, ...] = self.streams.exchange(self.one.dispatch_again, *given)
        return found

    def combine(self, *given: Tensor | Way) -> Tensor | tuple[Tensor, ...]:
        found: Tensor | tuple[Tensor, ...] = self.streams.exchange(self.one.combine, *given)
        return found


def overlap_on(device: torch.device) -> Overlap:
    """What a device can do."""
    if device.type != "cuda":
        return InOrder()
    return SideStreams(torch.cuda.Stream(device), torch.cuda.Stream(device))
