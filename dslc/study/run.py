"""Running what a study has planned: each run in a process of its own, and resumable."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.study import Study
from dslc.study.plan import StudyRun
from runtime.files import replace_text
from runtime.train.interrupt import run_lock, stop_signals
from runtime.train.settings import TrainError

RESULT = "result.json"
POLL = 0.2
"""Seconds from one look at the processes to the next."""
PATIENCE = 60.0
"""Seconds that a run of a study that was killed gets to save its state."""
_END_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux."""


@dataclass(frozen=True)
class Result:
    """What a finished run reached on held-out text, in how many seconds of training."""

    loss: float
    bits_per_byte: float
    acceptance: tuple[float, ...]
    max_vio: float | None
    seconds: float
    spec: str

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"acceptance": list(self.acceptance)}


def read_result(run: StudyRun) -> Result | None:
    """The result of a run that has finished; None for any other.

    Raises `DiagnosticError` (E613) where the run was made from another spec than the study has.
    """
    try:
        content = json.loads((run.folder / RESULT).read_text(encoding="utf-8"))
        found = Result(**{**content, "acceptance": tuple(content["acceptance"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        raise _error(f"{run.folder / RESULT} cannot be read", "delete the run's folder") from None
    if found.spec != run.planned.spec.read_text(encoding="utf-8"):
        raise _error(
            f"{run.folder} was trained from another spec than the study has now",
            "choose another --out, or delete the run's folder",
        )
    return found


def _error(message: str, help: str) -> DiagnosticError:
    return DiagnosticError([Diagnostic("E613", message, help=help)])


class Runner:
    """Starts runs, as many at a time as `jobs`, each with its share of the cores."""

    def __init__(self, study: Study, jobs: int) -> None:
        self.study, self.jobs = study, jobs
        self.threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        self.going: dict[StudyRun, subprocess.Popen[bytes]] = {}
        self.signals: list[int] = []

    def all(self, runs: Sequence[StudyRun]) -> Iterator[tuple[StudyRun, Result | None]]:
        """Each run as it ends, with its result, or None where it failed.

        SIGINT or SIGTERM ends it early: what runs saves a checkpoint and is waited for.
        """
        waiting = list(runs)
        # Not by KeyboardInterrupt: raised in a hook that Python runs around a fork, it is lost.
        with stop_signals() as self.signals:
            try:
                while (waiting or self.going) and not self.signals:
                    while waiting and len(self.going) < self.jobs:
                        run = waiting.pop(0)
                        self.going[run] = self._start(run)
                    ended = [run for run, job in self.going.items() if job.poll() is not None]
                    for run in ended:
                        status = self.going.pop(run).returncode
                        yield run, _record(run) if status == 0 else None
                    if not ended:
                        time.sleep(POLL)
            finally:
                for process in self.going.values():
                    process.send_signal(signal.SIGTERM)
                for process in self.going.values():
                    process.wait()

    def _start(self, run: StudyRun) -> subprocess.Popen[bytes]:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        _wait_for_end(run)
        with log_of(run).open("ab") as log:
            return subprocess.Popen(
                self.command(run),
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # The terminal's Ctrl-C reaches the study alone, which ends its runs in order.
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def command(self, run: StudyRun) -> list[str]:
        """The command line of a run, which also resumes it."""
        file = self.study.file
        data = [part for one in file.data for part in ("--data", str(self.study.path(one)))]
        tokenizer = ["--tokenizer", str(self.study.path(file.tokenizer))] if file.tokenizer else []
        variant = run.planned.configuration.variant
        return [
            sys.executable, "-m", "dslc", "train", str(run.planned.spec),
            "--out", str(run.folder), "--seed", str(run.seed),
            *data, *tokenizer, *(["--variant", variant] if variant else []),
        ]  # fmt: skip


def log_of(run: StudyRun) -> Path:
    """The file with all that a run prints."""
    return run.folder.with_name(f"{run.folder.name}.log")


def _wait_for_end(run: StudyRun) -> None:
    """Waits for the process that a killed study left, while it saves."""
    deadline = time.monotonic() + PATIENCE
    while run.folder.exists() and time.monotonic() < deadline:
        try:
            with run_lock(run.folder):
                return
        except TrainError:
            time.sleep(POLL)


def _end_with_parent() -> None:
    """In the child: when a study is killed, its trainings save and end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGTERM)


def _record(run: StudyRun) -> Result | None:
    """Writes the result of a run that has ended well. None if it evaluated nothing."""
    records = read_records(run.folder)
    steps = [one for one in records if "main" in one]
    tests = [one["held_out"] for one in records if "held_out" in one]
    if not steps or not tests:
        return None
    last = steps[-max(1, len(steps) // 10) :]
    vio = [use["max_vio"] for one in last for use in one["experts"].values()]
    result = Result(
        loss=tests[-1]["loss"],
        bits_per_byte=tests[-1]["bits_per_byte"],
        acceptance=tuple(tests[-1]["acceptance"]),
        max_vio=sum(vio) / len(vio) if vio else None,
        seconds=sum(one["seconds"] for one in steps),
        spec=run.planned.spec.read_text(encoding="utf-8"),
    )
    replace_text(run.folder / RESULT, json.dumps(result.to_json(), indent=2) + "\n")
    return result


def read_records(folder: Path) -> list[Mapping[str, Any]]:
    """The records of metrics.jsonl; none where there is no such file."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]
