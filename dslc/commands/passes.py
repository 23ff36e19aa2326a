"""`dslc passes`: what the compiler does to a graph, in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from dslc.options import SetOption, SkipOption, UntilOption, VariantOption

if TYPE_CHECKING:
    from compiler.pipeline import Compiled, PassResult
    from compiler.rewrite import Miss

EXAMPLES = """
\b
Examples:
  dslc passes                                                the passes of each program
  dslc passes deepseek_v3                                    what each pass changes in a model
  dslc graph deepseek_v3 --program decode --after absorb     the graph after a pass
"""


def run(
    spec: Annotated[
        str | None,
        typer.Argument(
            metavar="[SPEC]",
            help="Run the passes on this spec and show what each one changed.",
            show_default=False,
        ),
    ] = None,
    sets: SetOption = None,
    variants: VariantOption = None,
    skip: SkipOption = None,
    until: UntilOption = None,
) -> None:
    """List the passes with their conditions, or show what they change in a model."""
    from dslc.passes import check
    from dslc.report import reporting
    from dslc.specs import read

    if spec is None:
        print("\n\n".join("\n".join(part) for part in listed()))
        return
    from compiler.pipeline import compile

    with reporting():
        check(skip, until)
        compiled = compile(read(spec, sets, variants), skip=skip or (), until=until)
        print("\n".join(pass_table(compiled)))


def listed() -> Iterator[list[str]]:
    """The passes of each program, then each pass with its purpose and promises."""
    from dslc.passes import passes, pipelines

    yield [f"{p}: lower, {', '.join(one.name for one in all)}" for p, all in pipelines().items()]
    for name in passes():
        yield about(name)


def about(name: str) -> list[str]:
    """The description of one pass."""
    from dslc.passes import passes, programs_of

    one = passes()[name]
    return [
        f"{one.name}: {one.purpose}",
        f"  requires: {one.requires}",
        f"  ensures:  {one.ensures}",
        f"  runs for: {', '.join(programs_of(name))}{'' if one.essential else ' (--skip)'}",
    ]


def pass_table(compiled: Compiled) -> Iterator[str]:
    """What each pass changed in each program, and how long it took on this machine."""
    from dslc.commands.show import table

    rows: list[tuple[str, ...]] = [("program", "pass", "operators", "ms", "changes")]
    rows.append(_row("all", compiled.steps[0]))
    remarks = []
    for program in compiled.programs:
        for step in compiled.steps_of(program)[1:]:
            rows.append(_row(program, step))
            remarks += [f"{program}, {step.name}: {line}" for line in map(remark, step.misses)]
    yield from table(rows, "<<>><")
    if remarks:
        yield ""
        yield from remarks


def _row(program: str, step: PassResult) -> tuple[str, ...]:
    count = sum(1 for graph in step.program.graphs.values() for _ in graph.walk())
    what = "" if step.name == "lower" else step.summary
    return (program, step.name, str(count), f"{1000 * step.seconds:.1f}", what)


def remark(miss: Miss) -> str:
    """Why a rule left an operator unchanged, in one line."""
    from compiler.graph.text import print_op

    return f"{miss.block}: {print_op(miss.op)} unchanged: {miss.reason}"
