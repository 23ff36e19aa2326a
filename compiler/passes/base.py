"""What a pass is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compiler.graph.core import Program
from compiler.rewrite import Miss
from dsl.load import Description


@dataclass(frozen=True)
class Pass:
    """A rewrite of a whole program, in place.

    `run` may ask the description what the model's author chose, and gives the places where a rule
    did not apply, with the reason. `purpose` is one line for people; `requires` says what must hold
    before, `ensures` what holds after it, beyond what the verifier checks after every pass. An
    `essential` pass makes the program what it is; any other one may be left out (`--skip`).
    """

    name: str
    purpose: str
    run: Callable[[Program, Description], Sequence[Miss]]
    requires: str = "nothing"
    ensures: str = ""
    essential: bool = False
