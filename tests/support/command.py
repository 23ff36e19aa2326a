"""What a command run in this process did; the fixture `dslc` of tests/conftest.py runs it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


def typed(dslc: Run, command: str) -> str:
    """What a line of a shell prints, of `dslc` in this process or of `python` in one of its own."""
    program, *arguments = shlex.split(command)
    if program == "dslc":
        outcome = dslc(*arguments)
        return outcome.out + outcome.err
    assert program == "python"
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr
