"""The engine's process: events, aborts, death, and that nothing is left of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runtime.serve.request import Event, Sampling
from runtime.serve.worker import Engine, Events, Refused, Unavailable, Worker
from tests.support.fake_engine import FAIL, FakeEngine, fails
from tests.support.places import ROOT

PROTOCOL: type[Engine] = FakeEngine


@asynccontextmanager
async def working(**settings: Any) -> AsyncIterator[Worker]:
    worker = Worker(partial(FakeEngine, **settings))
    await worker.start()
    try:
        yield worker
    finally:
        await worker.stop()


async def answer(events: Events) -> list[int]:
    ids: list[int] = []
    while True:
        event = await events.get()
        if isinstance(event, Exception):
            raise event
        ids += [token.id for token in event.tokens]
        if event.finish:
            return ids


async def idle(worker: Worker) -> dict[str, float]:
    """Numbers of an engine that has had time to forget all requests."""
    for _ in range(100):
        stats = await worker.stats(5)
        if not stats["running"]:
            break
        await asyncio.sleep(0.01)
    return stats


def test_requests_run_together_and_leave_nothing() -> None:
    async def run() -> None:
        async with working() as worker:
            assert (worker.max_model_len, worker.vocab_size) == (512, 512)
            queues = [Events() for _ in range(20)]
            for i, events in enumerate(queues):
                worker.submit(str(i), [i, i + 1], Sampling(3), b"", events)
            assert [await answer(events) for events in queues] == [[i, i + 1, i] for i in range(20)]
            stats = await idle(worker)
            assert stats["running"] == stats["waiting"] == worker.pending == 0
            assert stats["steps"] < 60, "they ran one after the other"

    asyncio.run(run())


def test_abort_ends_a_request_and_may_be_repeated() -> None:
    async def run() -> None:
        async with working(seconds=0.005) as worker:
            events = Events()
            worker.submit("a", [1], Sampling(500), b"", events)
            await events.get()
            for _ in range(3):
                worker.abort("a")
            worker.abort("never")
            assert (await idle(worker))["running"] == 0
            kept = events.qsize()
            worker.submit("b", [2], Sampling(2), b"", other := Events())
            assert await answer(other) == [2, 2]
            assert events.qsize() == kept, "events after the abort"
            worker.submit("c", [3], Sampling(500), b"", events)
            worker.abort_all()
            while (event := await events.get()) != Event("c", finish="abort"):
                assert isinstance(event, Event)
            assert (await idle(worker))["running"] == 0

    asyncio.run(run())


def test_what_the_engine_refuses_is_told_and_others_go_on() -> None:
    async def run() -> None:
        async with working() as worker:
            worker.submit("long", [1] * 301, Sampling(1), b"", long := Events())
            worker.submit("short", [1], Sampling(1), b"", short := Events())
            with pytest.raises(Refused, match="more blocks"):
                await answer(long)
            assert await answer(short) == [1] and worker.pending == 0

    asyncio.run(run())


@pytest.mark.parametrize("how", ["killed", "failed"])
def test_death_reaches_every_request_at_once(how: str) -> None:
    async def run() -> None:
        async with working(seconds=0.01) as worker:
            told: list[str | None] = []
            worker.on_death = lambda: told.append(worker.death)
            queues = [Events() for _ in range(10)]
            for i, events in enumerate(queues):
                worker.submit(str(i), [1], Sampling(500), b"", events)
            await queues[0].get()
            started = time.monotonic()
            if how == "killed":
                assert worker.pid is not None
                os.kill(worker.pid, signal.SIGSTOP)
                asked = asyncio.ensure_future(worker.stats(10))
                os.kill(worker.pid, signal.SIGKILL)
                with pytest.raises(Unavailable, match="status -9"):
                    await asked
                reason = "status -9"
            else:
                worker.submit("bad", [FAIL], Sampling(5), b"", Events())
                reason = "RuntimeError: told to fail"
            for events in queues:
                with pytest.raises(Unavailable, match=reason):
                    await answer(events)
            assert time.monotonic() - started < 2
            with pytest.raises(Unavailable, match=reason):
                worker.submit("late", [1], Sampling(1), b"", Events())
            with pytest.raises(Unavailable, match=reason):
                await worker.stats(5)
            assert worker.pending == 0 and len(told) == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("kind", "message"),
    [(ValueError, "^too long$"), (RuntimeError, "^the engine failed: RuntimeError: too long$")],
)
def test_an_engine_that_cannot_be_made_is_told(
    kind: type[Exception], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    async def run() -> None:
        worker = Worker(partial(fails, kind, "too long"))
        with pytest.raises(Unavailable, match=message):
            await worker.start()
        await worker.stop()

    asyncio.run(run())
    assert ("Traceback" in capfd.readouterr().err) == (kind is RuntimeError)


@pytest.mark.slow
def test_a_held_up_engine_gives_no_answer_and_goes_on_afterwards() -> None:
    async def run() -> None:
        async with working() as worker:
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGSTOP)
            try:
                events = Events()
                # More than the pipe holds: the event loop must not wait for it.
                for i in range(40):
                    worker.submit(str(i), [1] * 300, Sampling(2), b"", events)
                with pytest.raises(Unavailable, match=r"did not answer within 0\.2 s"):
                    await worker.stats(0.2)
            finally:
                os.kill(worker.pid, signal.SIGCONT)
            assert await answer(events) and (await worker.stats(5))["prompt_tokens"] == 12000

    asyncio.run(run())


def test_stop_ends_the_process_even_if_it_is_held_up() -> None:
    async def run() -> int:
        async with working() as worker:
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGSTOP)
            await worker.stop(0.1)
            return worker.pid

    with pytest.raises(ProcessLookupError):
        os.kill(asyncio.run(run()), 0)


def test_a_signal_to_the_group_is_left_to_the_server() -> None:
    async def run() -> None:
        async with working() as worker:
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)
            worker.submit("a", [1], Sampling(2), b"", events := Events())
            assert await answer(events) == [1, 1]

    asyncio.run(run())


SERVER = """
import asyncio, functools, sys
from runtime.serve.request import Sampling
from runtime.serve.worker import Events, Worker
from tests.support.fake_engine import FakeEngine, sleeps

async def run(what):
    worker = Worker(sleeps if what == "being made" else functools.partial(FakeEngine, seconds=2))
    starting = asyncio.create_task(worker.start())
    while not (hasattr(worker, "_process") and worker.pid):
        await asyncio.sleep(0.01)
    if what != "being made":
        await starting
    if what == "busy":
        worker.submit("a", [1], Sampling(100), b"", Events())
    await asyncio.sleep(0.3)
    print(worker.pid, flush=True)
    await asyncio.sleep(60)

if __name__ == "__main__":
    asyncio.run(run(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["idle", "busy", "being made"])
def test_the_engine_ends_with_the_server(what: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, what], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        os.kill(pid, 0)
        server.kill()
        killed = time.monotonic()
        while Path(f"/proc/{pid}").exists() and not ended(pid):
            assert time.monotonic() - killed < 1.5, "the engine is still there"
            time.sleep(0.01)


def ended(pid: int) -> bool:
    """Whether nobody but its record is left of a process."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"
