"""Signals that stop a run, and the lock that keeps two processes from training it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .settings import TrainError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK, RECORD = ".lock", "run.json"


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Holds the lock of a run. Raises TrainError if another process that still lives holds it.

    A folder that was made for a run which then could not start is removed again.
    """
    made = not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK).open("w") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainError(f"another process is training {run}") from None
        try:
            yield
        except BaseException:
            if made and not (run / RECORD).exists():
                shutil.rmtree(run, ignore_errors=True)
            raise


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The SIGINT or SIGTERM received so far. A second one ends the process at once."""
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    for asked in (signal.SIGINT, signal.SIGTERM):
        before[asked] = signal.signal(asked, stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
