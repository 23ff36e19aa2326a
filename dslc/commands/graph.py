"""`dslc graph`: the graph of a model or of one of its blocks."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dslc.options import SetOption, SkipOption, SpecArgument, UntilOption, VariantOption

if TYPE_CHECKING:
    from compiler.graph.core import Program

EXAMPLES = """
\b
Examples:
  dslc graph deepseek_v3                               the whole graph, as text
  dslc graph deepseek_v3 --block MLA                   one block
  dslc graph deepseek_v3 --block MLA --program decode  the program of decoding
  dslc graph deepseek_v3 --program decode --after simplify   before the passes after simplify
  dslc graph deepseek_v3 --program decode --skip absorb      without one of them
  dslc graph deepseek_v3 --program draft               the first MTP module, as it drafts
  dslc graph deepseek_v3 --program train --stage 3           the part of pipeline stage 3
  dslc graph deepseek_v3 --format svg > v3.svg         a picture
  dslc graph deepseek_v3 --html                        an HTML page that steps through all passes
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
        str,
        typer.Option(
            metavar="NAME",
            help="Which program: forward, train, prefill, decode; draft, draft_2, .. of MTP "
            "modules.",
        ),
    ] = "forward",
    after: Annotated[
        str | None,
        typer.Option(
            metavar="PASS",
            help="The graph after this pass; `dslc passes` lists them, `lower` is the first.",
            show_default=False,
        ),
    ] = None,
    stage: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="The part of this pipeline stage, by `parallel:` of the spec.",
            show_default=False,
        ),
    ] = None,
    skip: SkipOption = None,
    until: UntilOption = None,
    format: Annotated[GraphFormat, typer.Option(help="Output format.")] = GraphFormat.text,
    html: Annotated[
        bool,
        typer.Option(
            "--html",
            help="Write an HTML page that steps through the passes of all programs.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="The page to write; MODEL.html by default."
        ),
    ] = None,
    sets: SetOption = None,
    variants: VariantOption = None,
) -> None:
    """Print the graph that a spec compiles to, or write a page that shows the passes."""
    from dsl.diagnostic import DiagnosticError
    from dslc.passes import check, unknown
    from dslc.report import reporting
    from dslc.specs import read
    from dslc.stages import compiled_for

    if output and not html:
        raise typer.BadParameter("-o needs --html; redirect other formats with >")
    with reporting(as_json=format is GraphFormat.json):
        check(skip, until)
        description = read(spec, sets, variants)
        compiled, name = compiled_for(description, program, stage, skip or (), until)
        names = [step.name for step in compiled.steps_of(name)]
        if after is not None and after not in names:
            raise DiagnosticError([unknown("pass", after, dict.fromkeys(names))])
        at = max(i for i, one in enumerate(names) if one == (after or names[-1]))
        made = compiled.steps_of(name)[at].program
        chosen = only(made, block) if block else made
        if html:
            from dslc.page import write

            # Without a pass or a block it starts at the first step.
            first = f"{name}-{at if after or block else 0}"
            write(description, compiled, output, f"{first}/{block}" if block else first)
        else:
            print(drawn(chosen, format), end="")


def only(program: Program, block: str) -> Program:
    """The program that holds one block and no others. Raises `DiagnosticError` if none has it."""
    from compiler.graph.core import Program
    from dsl.diagnostic import DiagnosticError
    from dslc.passes import unknown

    if block not in program.graphs:
        raise DiagnosticError([unknown("block", block, program.graphs)])
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
