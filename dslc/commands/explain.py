"""`dslc explain`: what an error code means, what a pass does, or why it changed nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dslc.options import SetOption, VariantOption

if TYPE_CHECKING:
    from compiler.pipeline import Compiled, PassResult

EXAMPLES = """
\b
Examples:
  dslc explain E401
  dslc explain                                 every code with its title
  dslc explain absorb                          the purpose of a pass
  dslc explain absorb my_model.yaml --at GQA   what it changed in a block, or why nothing
"""
# One section a code: `## E401 title`.
CATALOG = Path(__file__).parent.parent / "errors.md"


def run(
    topic: Annotated[
        str | None,
        typer.Argument(
            metavar="[CODE|PASS]", help="A code such as E401, or a pass.", show_default=False
        ),
    ] = None,
    spec: Annotated[
        str | None,
        typer.Argument(
            metavar="[SPEC]", help="Show what the pass changes in this model.", show_default=False
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(metavar="BLOCK", help="Only the changes in this block.", show_default=False),
    ] = None,
    sets: SetOption = None,
    variants: VariantOption = None,
) -> None:
    """Explain an error code or a pass, or list all codes."""
    from dsl.diagnostic import Diagnostic, DiagnosticError
    from dslc.commands.passes import about
    from dslc.passes import passes
    from dslc.report import reporting
    from dslc.specs import read

    sections = catalog()
    with reporting():
        if topic is None:
            for known, (title, _) in sections.items():
                print(f"{known}  {title}")
        elif topic.upper() in sections:
            title, text = sections[topic.upper()]
            print(f"{topic.upper()}: {title}\n\n{text}")
        elif topic in passes():
            print("\n".join(about(topic)))
            if spec is not None:
                from compiler.pipeline import compile

                print("\n".join(done(compile(read(spec, sets, variants)), topic, at)))
        else:
            message = f"there is no error or pass {topic!r}"
            help = "`dslc explain` lists the errors, `dslc passes` the passes"
            raise DiagnosticError([Diagnostic("E691", message, help=help)])


def catalog() -> dict[str, tuple[str, str]]:
    """Title and text of every code, in order."""
    parts = re.split(r"^## (E\d{3}) (.+)\n", CATALOG.read_text(encoding="utf-8"), flags=re.M)
    found = zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    return {code: (title, text.strip()) for code, title, text in found}


def done(compiled: Compiled, name: str, block: str | None) -> Iterator[str]:
    """What a pass did to a model, or to one block of it. Raises `DiagnosticError`."""
    from dsl.diagnostic import DiagnosticError
    from dslc.passes import unknown

    blocks = compiled.lowered.graphs
    if block is not None and block not in blocks:
        raise DiagnosticError([unknown("block", block, blocks)])
    for program in compiled.programs:
        before, *steps = compiled.steps_of(program)
        for step in steps:
            if step.name == name:
                yield f"\n{program}: {step.summary}"
                yield from _places(before, step, block)
            before = step


def _places(before: PassResult, step: PassResult, block: str | None) -> Iterator[str]:
    """The blocks that changed, and the operators that a rule left unchanged, with the reason."""
    from compiler.graph.equal import equal_graphs
    from dslc.commands.passes import remark

    for name, graph in before.program.graphs.items():
        after = step.program.graphs.get(name)
        if block not in (None, name):
            continue
        if after is None:
            yield f"  {name}: removed"
        elif not equal_graphs(graph, after):
            yield f"  {name}: changed"
    for miss in step.misses:
        if block in (None, miss.block):
            yield f"  {remark(miss)}"
