"""What a pass is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compiler.graph.core import Program


@dataclass(frozen=True)
class Pass:
    """A rewrite of a whole program, in place. `purpose` is one line for people."""

    name: str
    purpose: str
    run: Callable[[Program], None]
