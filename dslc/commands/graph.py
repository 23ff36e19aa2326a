"""`dslc graph`: the graph of a model or of one of its blocks."""

from __future__ import annotations

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


class ProgramName(StrEnum):
    """The programs that are derived from one lowered graph."""

    forward = "forward"
    train = "train"
    prefill = "prefill"
    decode = "decode"


def run(
    spec: SpecArgument,
    block: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only this block, e.g. MLA.", show_default=False),
    ] = None,
    program: Annotated[
        ProgramName, typer.Option(help="Which of the model's programs.")
    ] = ProgramName.forward,
    format: Annotated[GraphFormat, typer.Option(help="How to print it.")] = GraphFormat.text,
    sets: SetOption = None,
    variant: VariantOption = None,
) -> None:
    """Print the graph that a spec compiles to."""
    from compiler.pipeline import programs
    from dslc.report import reporting
    from dslc.specs import read

    with reporting(as_json=format is GraphFormat.json):
        chosen = programs(read(spec, sets, variant))[program.value]
        print(drawn(only(chosen, block) if block else chosen, format), end="")


def only(program: Program, block: str) -> Program:
    """The program that holds one block and no others. Raises `DiagnosticError` if none has it."""
    from compiler.graph.core import Program
    from dsl.diagnostic import Diagnostic, DiagnosticError
    from dsl.suggest import did_you_mean

    if block not in program.graphs:
        known = ", ".join(program.graphs)
        help = did_you_mean(block, program.graphs) or f"it has {known}"
        message = f"{program.name} has no block {block!r}"
        raise DiagnosticError([Diagnostic("E691", message, help=help)])
    return Program(program.name, block, {block: program.graphs[block]})


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
