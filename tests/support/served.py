"""A server with an engine that repeats prompts, in a thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from runtime.serve.chat import PLAIN, PLAIN_STOPS, Chat, ChatTemplate
from runtime.serve.lifetime import Server, listen, run
from runtime.serve.server import make_app
from runtime.serve.service import Limits, ServedModel, Service
from runtime.serve.text import ByteVocabulary, Vocabulary
from runtime.serve.worker import Engine, Worker
from tests.support.fake_engine import FakeEngine

HTTP = httpx.Client(timeout=20)
END = 256
"""The end token."""


@dataclass
class Served:
    url: str
    service: Service
    server: Server
    thread: threading.Thread
    statuses: list[int]

    @property
    def pid(self) -> int:
        """Of the engine."""
        assert self.service.worker.pid is not None
        return self.service.worker.pid

    def stats(self) -> dict[str, float]:
        """Numbers of the engine by /metrics, without prefix."""
        found = {}
        for line in HTTP.get(f"{self.url}/metrics").text.splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith("dslc:"):
                found[name.removeprefix("dslc:")] = float(value)
        return found

    def ends(self) -> int:
        """Waits for the end of the server; its exit status."""
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.statuses[0]


def all_idle(served: Served) -> bool:
    """Whether the engine has no request any more, or comes to have none."""
    for _ in range(200):
        stats = served.stats()
        if stats["num_requests_running"] == stats["num_requests_waiting"] == 0:
            return served.service.worker.pending == 0
        time.sleep(0.01)
    return False


def byte_chat(vocabulary: Vocabulary, template: str = PLAIN) -> Chat:
    return Chat(ChatTemplate(template, {}, PLAIN_STOPS), vocabulary)


@contextmanager
def serving(
    make: Callable[[], Engine] | None = None,
    vocabulary: Vocabulary | None = None,
    chat: Chat | None = None,
    keys: Sequence[str] = (),
    limits: Limits | None = None,
    drain: float = 5.0,
    **engine: Any,
) -> Iterator[Served]:
    """`engine` are settings of `FakeEngine`; by default tokens are bytes."""
    known = vocabulary or ByteVocabulary()
    model = ServedModel("tiny", known, chat, frozenset({END}), "print")
    worker = Worker(make or partial(FakeEngine, **engine))
    service = Service(model, worker, limits or Limits())
    listener = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    begun = threading.Event()
    servers: list[Server] = []
    statuses: list[int] = []

    def ready(server: Server) -> None:
        servers.append(server)
        begun.set()

    def work() -> None:
        app = make_app(service, keys)
        statuses.append(asyncio.run(run(service, app, listener, drain, ready)))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert begun.wait(60)
    served = Served(url, service, servers[0], thread, statuses)
    try:
        yield served
    finally:
        served.server.stop()
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"
