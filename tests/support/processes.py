"""Ranks as processes: of one command, or such that stay and load Python and torch once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

from tests.support.places import ROOT

# What each process does: a run for each line that it reads, and a line when that has ended.
RANK = """
import contextlib, importlib, io, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import torch
for line in sys.stdin:
    told = json.loads(line)
    os.environ.update(told["environment"])
    name, folder = told["package"], told["folder"]
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]  # another build may have the name
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        package = importlib.import_module(name)
        if told["call"]:
            module, _, function = told["call"].partition(":")
            found = getattr(importlib.import_module(module), function)(package)
            sys.path.remove(folder)
            print(json.dumps([0, found]), file=answers, flush=True)
            continue
        command = importlib.import_module(name + ".runtime.train.command")
        status = command.main(package.Model, told["arguments"])
    sys.path.remove(folder)
    print(json.dumps([status, error.getvalue()]), file=answers, flush=True)
"""
PATIENCE = 120
"""Seconds after which a run is given up: those of tests take less than twenty."""


def environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun tells each rank. They meet at a port of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    every = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    every |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{**every, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def started(
    command: Sequence[str], ranks: int = 2, *, path: Path = ROOT, folder: Path | None = None
) -> list[subprocess.Popen[str]]:
    """Every rank of a command of Python, without the second that torchrun itself needs."""
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(path), **own},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for own in environments(ranks)
    ]  # fmt: skip


def ended(ranks: Sequence[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    """What each rank prints until it ends, soon: output and errors."""
    try:
        return [rank.communicate(timeout=PATIENCE) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


class Processes:
    """`count` of them; a run takes as many as it has ranks."""

    def __init__(self, count: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", RANK],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for _ in range(count)
        ]  # fmt: skip
        self.answers: list[Queue[str]] = [Queue() for _ in range(count)]
        for process, answers in zip(self.processes, self.answers, strict=True):
            Thread(target=_read, args=(process, answers), daemon=True).start()

    def train(self, package: Any, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A run to its end: status and messages of rank 0, and what went wrong on any."""
        found = self._all(package, ranks, arguments)
        status = max(one for one, _ in found)
        return subprocess.CompletedProcess(arguments, status, stderr=found[0][1])

    def call(self, package: Any, ranks: int, function: str) -> list[Any]:
        """What `module:function` of the package gives in each rank."""
        return [found for _, found in self._all(package, ranks, (), function)]

    def _all(
        self, package: Any, ranks: int, arguments: Sequence[str], call: str = ""
    ) -> list[list[Any]]:
        told = {
            "package": package.__name__,
            "folder": str(Path(package.__file__).parents[1]),
            "arguments": arguments,
            "call": call,
        }
        for environment, process in zip(environments(ranks), self.processes, strict=False):
            assert process.stdin is not None
            process.stdin.write(json.dumps({**told, "environment": environment}) + "\n")
            process.stdin.flush()
        try:
            return [json.loads(one.get(timeout=PATIENCE)) for one in self.answers[:ranks]]
        except (Empty, ValueError):
            self.end()
            raise AssertionError(f"a rank of {package.__name__} ended or waits") from None

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def _read(process: subprocess.Popen[str], answers: Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put("")


@contextmanager
def processes(count: int) -> Iterator[Processes]:
    found = Processes(count)
    try:
        yield found
    finally:
        found.end()
