"""Programs of two ranks, started as torchrun does, without the second that it needs itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.places import ROOT

PATIENCE = 120
"""Seconds after which a test gives up."""


@dataclass(frozen=True)
class Ended:
    """The exit status of each rank, and what the first one printed."""

    statuses: list[int]
    out: str
    err: str


def two_ranks(folder: Path, *command: str) -> Ended:
    """Runs a script with its arguments in `folder`. For groups that it makes anew there is a
    SECOND_PORT."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("localhost", 0))
        other.bind(("localhost", 0))
        port, second = (str(free.getsockname()[1]) for free in (one, other))
    common = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    started = []
    for rank in ("0", "1"):
        own = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost"}
        own |= {"MASTER_PORT": port, "SECOND_PORT": second}
        started.append(
            subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                env={**common, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [one.communicate(timeout=PATIENCE) for one in started]
    finally:
        for one in started:
            one.kill()
    return Ended([one.returncode for one in started], *outputs[0])
