"""Keep only some outputs of the outermost block; `simplify` then drops what made the others."""

from __future__ import annotations

from collections.abc import Sequence

from compiler.graph.core import Program
from compiler.passes.base import Pass
from compiler.rewrite import Miss
from dsl.load import Description


def select_outputs(*names: str) -> Pass:
    """Outputs in the order of `names`; those that a model does not have are passed over."""

    def run(program: Program, description: Description) -> Sequence[Miss]:
        main = program.main
        chosen = [
            (name, value)
            for wanted in names
            for name, value in zip(main.result_names, main.results, strict=True)
            if name == wanted
        ]
        main.result_names = tuple(name for name, _ in chosen)
        main.ops[-1].operands = [value for _, value in chosen]
        return ()

    return Pass(
        "select_outputs",
        "keep the outputs that a program is for",
        run,
        ensures="no other outputs",
        essential=True,
    )
