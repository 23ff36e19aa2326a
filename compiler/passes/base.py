"""What a pass is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compiler.graph.core import Program


@dataclass(frozen=True)
class Pass:
    """A rewrite of a whole program, in place.

    `purpose` is one line for people; `requires` says what must hold before, `ensures` what holds
    after it, beyond what the verifier checks after every pass.
    """

    name: str
    purpose: str
    run: Callable[[Program], None]
    requires: str = "nothing"
    ensures: str = ""
