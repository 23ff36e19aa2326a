"""`dslc graph`: the graph of a model or of one of its blocks."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from dslc.options import SetOption, SpecArgument, VariantOption

if TYPE_CHECKING:
    from compiler.graph.core import Program

EXAMPLES = """
\b
Examples:
  dslc graph deepseek_v3                               all of it, as text
  dslc graph deepseek_v3 --block MLA                   one block
  dslc graph deepseek_v3 --block MLA --program decode  what decoding computes
  dslc graph deepseek_v3 --format svg > v3.svg         a picture
"""


class GraphFormat(StrEnum):
    """`text` parses back; `dot` is Graphviz's language."""

    text = "text"
    json = "json"
    dot = "dot"
    svg = "svg"


def run(
    spec: SpecArgument,
    block: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only this block, e.g. MLA.", show_default=False),
    ] = None,
    program: Annotated[
        str, typer.Option(metavar="NAME", help="Which program: forward, train, prefill, decode.")
    ] = "forward",
    format: Annotated[GraphFormat, typer.Option(help="How to print it.")] = GraphFormat.text,
    sets: SetOption = None,
    variant: VariantOption = None,
) -> None:
    """Print the graph that a spec compiles to."""
    from compiler.pipeline import programs
    from dslc.report import reporting
    from dslc.specs import read

    with reporting(as_json=format is GraphFormat.json):
        made = programs(read(spec, sets, variant))
        if program not in made:
            raise unknown("program", program, made)
        chosen = only(made[program], block) if block else made[program]
        print(drawn(chosen, format), end="")


def only(program: Program, block: str) -> Program:
    """The program that holds one block and no others. Raises `DiagnosticError` if none has it."""
    from compiler.graph.core import Program

    if block not in program.graphs:
        raise unknown("block", block, program.graphs)
    return Program(program.name, block, {block: program.graphs[block]})


def unknown(what: str, name: str, known: Iterable[str]) -> Exception:
    from dsl.diagnostic import Diagnostic, DiagnosticError
    from dsl.suggest import did_you_mean

    help = did_you_mean(name, known) or f"there are {', '.join(known)}"
    return DiagnosticError([Diagnostic("E691", f"the model has no {what} {name!r}", help=help)])


def drawn(program: Program, format: GraphFormat) -> str:
    """The program in one of the formats, ending with one line end."""
    from compiler.graph import svg, text, view

    draw = {
        GraphFormat.text: text.print_program,
        GraphFormat.json: view.to_json,
        GraphFormat.dot: view.to_dot,
        GraphFormat.svg: svg.to_svg,
    }[format]
    return draw(program).rstrip("\n") + "\n"
