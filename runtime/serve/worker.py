"""The engine in a process of its own, and the requests that wait for its events."""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Protocol

from .request import Event, Sampling

Stats = dict[str, float]
EXPERT_LOAD = "expert_load "
"""Before the name of a block with experts: load of the busiest rank over the mean of all."""


class Engine(Protocol):
    """What computes requests, all together, one step after the other."""

    max_model_len: int
    vocab_size: int

    def add(self, id: str, prompt: Sequence[int], sampling: Sampling, salt: bytes = b"") -> None:
        """Raises ValueError for a request that can never run."""

    def abort(self, id: str) -> None:
        """Ends a request without an event; nothing for one that has ended."""

    def step(self) -> list[Event]:
        """One step for all running requests."""

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""

    def stats(self) -> Stats:
        """Numbers of now (running, waiting, kv_cache_usage) and since the start."""

    @property
    def heartbeat(self) -> float | None:
        """Seconds after which it wants a step although it is not busy; None: never."""

    def close(self) -> None:
        """No further step."""


class Unavailable(Exception):
    """The engine has ended, or ends; nothing can be asked of it."""


class Refused(Exception):
    """The engine can never run this request."""


Events = asyncio.Queue[Event | Exception]
"""Of the requests that one client waits for."""


class Worker:
    """The process, seen from the event loop of the server; nothing here blocks it."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        """`make` runs in the new process; it is found there by its name."""
        self.max_model_len = self.vocab_size = 0
        self.death: str | None = None
        """Why the engine has ended; None while it lives."""
        self.on_death: Callable[[], None] = lambda: None
        self._waiting: dict[str, Events] = {}
        self._pings: dict[int, asyncio.Future[Stats]] = {}
        self._numbers = count()
        self._outgoing: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
        self._make = make

    async def start(self) -> None:
        """Returns when the engine is ready. Raises Unavailable if it cannot be made."""
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, self._make), daemon=True)
        self._process.start()
        theirs.close()  # so that reading ends when the process does
        # It takes no SIGTERM, which multiprocessing would send at exit and then wait for ever.
        atexit.register(self._process.kill)
        for loop in (self._read, self._write):
            threading.Thread(target=loop, daemon=True).start()
        await self._ready

    @property
    def pending(self) -> int:
        """Requests that have not ended."""
        return len(self._waiting)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def submit(
        self, id: str, prompt: Sequence[int], sampling: Sampling, salt: bytes, events: Events
    ) -> None:
        """Its events, and the exceptions Refused or Unavailable, come to `events`."""
        if self.death is not None:
            raise Unavailable(self.death)
        self._waiting[id] = events
        self._outgoing.put(("add", id, tuple(prompt), sampling, salt))

    def abort(self, id: str) -> None:
        """No more events; nothing for a request that has ended."""
        if self._waiting.pop(id, None) is not None:
            self._outgoing.put(("abort", id))

    def abort_all(self) -> None:
        """Ends all requests; they get an event that says so."""
        for id, events in list(self._waiting.items()):
            events.put_nowait(Event(id, finish="abort"))
            self.abort(id)

    async def stats(self, seconds: float) -> Stats:
        """Numbers of the engine. Raises Unavailable without an answer within `seconds`."""
        if self.death is not None:
            raise Unavailable(self.death)
        number = next(self._numbers)
        answer = self._pings[number] = self._loop.create_future()
        self._outgoing.put(("ping", number))
        try:
            return await asyncio.wait_for(answer, seconds)
        except TimeoutError:
            raise Unavailable(f"the engine did not answer within {seconds:g} s") from None
        finally:
            self._pings.pop(number, None)

    async def stop(self, seconds: float = 2.0) -> None:
        """Ends the process, by force if it takes longer than `seconds`."""
        self._outgoing.put(("stop",))
        await asyncio.to_thread(self._process.join, seconds)
        self._process.kill()
        await asyncio.to_thread(self._process.join)
        self._outgoing.put(None)
        atexit.unregister(self._process.kill)

    def _write(self) -> None:
        """A thread: the pipe is full while the engine is held up."""
        while (message := self._outgoing.get()) is not None:
            try:
                self._connection.send(message)
            except OSError:  # it has ended, as reading shows
                return

    def _read(self) -> None:
        """A thread: hands what the engine says to the event loop."""
        try:
            while True:
                self._later(self._received, self._connection.recv())
        except (EOFError, OSError):
            self._process.join(2)
            self._later(self._ended, f"the engine ended with status {self._process.exitcode}")

    def _later(self, call: Callable[[Any], None], argument: Any) -> None:
        with suppress(RuntimeError):  # the loop has closed: there is nobody to report to
            self._loop.call_soon_threadsafe(call, argument)

    def _received(self, message: tuple[Any, ...]) -> None:
        match message:
            case ("events", found):
                for event in found:
                    self._deliver(event.id, event, ended=event.finish is not None)
            case ("refused", id, text):
                self._deliver(id, Refused(text), ended=True)
            case ("pong", number, stats):
                if (answer := self._pings.get(number)) is not None and not answer.done():
                    answer.set_result(stats)
            case ("ready", max_model_len, vocab_size):
                self.max_model_len, self.vocab_size = max_model_len, vocab_size
                self._ready.set_result(None)
            case ("failed", text):
                self._ended(text)

    def _deliver(self, id: str, item: Event | Exception, ended: bool) -> None:
        events = self._waiting.get(id)
        if events is None:  # aborted meanwhile
            return
        if ended:
            del self._waiting[id]
        events.put_nowait(item)

    def _ended(self, reason: str) -> None:
        if self.death is not None:
            return
        self.death = reason
        for events in self._waiting.values():
            events.put_nowait(Unavailable(reason))
        self._waiting.clear()
        answers: list[asyncio.Future[Any]] = [self._ready, *self._pings.values()]
        for answer in answers:
            if not answer.done():
                answer.set_exception(Unavailable(reason))
        self.on_death()


def _run(connection: Connection, make: Callable[[], Engine]) -> None:
    """The process. It ends on request, when the engine fails, and with the server."""
    # A signal to the whole group is for the server, which lets requests end first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_server, daemon=True).start()
    with suppress(EOFError, OSError):  # the server is gone: there is nobody to report to
        try:
            engine = make()
        except ValueError as error:  # what was asked for does not fit
            connection.send(("failed", str(error)))
            return
        except Exception as error:
            connection.send(("failed", _failure(error)))
            return
        connection.send(("ready", engine.max_model_len, engine.vocab_size))
        while _messages(engine, connection):
            try:
                events = engine.step()
            except Exception as error:
                connection.send(("failed", _failure(error)))
                return
            if events:
                connection.send(("events", events))
        engine.close()


def _end_with_server() -> None:
    """At once, also while weights are loaded or a step is computed."""
    server = multiprocessing.parent_process()
    assert server is not None
    server.join()
    os._exit(1)


def _failure(error: Exception) -> str:
    """The message for clients; the log has more."""
    traceback.print_exception(error)
    return f"the engine failed: {type(error).__name__}: {error}"


def _messages(engine: Engine, connection: Connection) -> bool:
    """Takes what has come, and waits where there is nothing to do; false at the end."""
    while connection.poll() or not engine.busy:
        if not connection.poll(engine.heartbeat):
            break
        match connection.recv():
            case ("add", id, prompt, sampling, salt):
                try:
                    engine.add(id, prompt, sampling, salt)
                except ValueError as error:
                    connection.send(("refused", id, str(error)))
            case ("abort", id):
                engine.abort(id)
            case ("ping", number):
                connection.send(("pong", number, engine.stats()))
            case ("stop",):
                return False
    return True
