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
  dslc graph deepseek_v3 --program decode --after simplify   before the passes that follow
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
    after: Annotated[
        str | None,
        typer.Option(
            metavar="PASS",
            help="As it is after this pass; `dslc passes` lists them, `lower` is before all.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[GraphFormat, typer.Option(help="How to print it.")] = GraphFormat.text,
    sets: SetOption = None,
    variant: VariantOption = None,
) -> None:
    """Print the graph that a spec compiles to."""
    from compiler import pipeline
    from dslc.report import reporting
    from dslc.specs import read

    with reporting(as_json=format is GraphFormat.json):
        if program not in pipeline.PIPELINES:
            raise unknown("program", program, pipeline.PIPELINES)
        passes = ["lower", *dict.fromkeys(p.name for p in pipeline.PIPELINES[program])]
        if after is not None and after not in passes:
            raise unknown("pass", after, passes)
        made = pipeline.after(
            read(spec, sets, variant), program, after or pipeline.PIPELINES[program][-1].name
        )
        chosen = only(made, block) if block else made
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
