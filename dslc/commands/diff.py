"""`dslc diff`: what differs between two models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dslc.options import Format, FormatOption, SetOption, VariantOption

if TYPE_CHECKING:
    from compiler.graph.compare import DiffLine
    from dslc.difference import ChangedBlock, ChangedValue, ComparedNumber, Difference, Side

EXAMPLES = """
\b
Examples:
  dslc diff deepseek_v2_236b deepseek_v3
  dslc diff deepseek_v3 --set params.n_routed_experts=128   a spec and a change to it
  dslc diff ablation.yaml --variant half_as_deep
  dslc diff build/before build/after                        two builds, or a build and a spec
  dslc diff runs/mini runs/no_mtp                           two runs, and how they were started
  dslc diff a.yaml b.yaml --format json

\b
Exit status: 0 equal, 1 different. For wrong input it is 1 too, and standard output is empty; with
--format json the answer then has no `equal`, and its `ok` is false.
"""

STARTED = ("spec", "variants", "set", "data", "tokenizer", "weights", "held_out", "seed")
"""What run.json says of how a run was started."""


def run(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="A spec, the name of a shipped one, a build, or a run.",
            show_default=False,
        ),
    ],
    b: Annotated[
        str | None,
        typer.Argument(
            metavar="[B]", help="The other one; the same spec by default.", show_default=False
        ),
    ] = None,
    sets: SetOption = None,
    variants: VariantOption = None,
    sets_a: Annotated[
        list[str] | None,
        typer.Option(
            "--set-a",
            metavar="PATH=VALUE",
            help="Like --set, for A; --set and --variant are for B.",
            show_default=False,
        ),
    ] = None,
    variants_a: Annotated[
        list[str] | None,
        typer.Option(
            "--variant-a", metavar="NAME", help="Like --variant, for A.", show_default=False
        ),
    ] = None,
    format: FormatOption = Format.text,
) -> None:
    """Show what differs between two models: values, numbers, operators.

    FLOPs are those of `dslc show`."""
    from dsl.diagnostic import printable
    from dslc.difference import difference
    from dslc.report import print_json, reporting

    with reporting(as_json=format is Format.json):
        found = difference(
            side(a, sets_a or (), variants_a or ()),
            side(b if b is not None else a, sets or (), variants or ()),
        )
        if format is Format.json:
            print_json({"ok": True, "diagnostics": [], **found.to_json()})
        else:
            # A build may come from an untrusted source.
            print("\n\n".join("\n".join(map(printable, part)) for part in as_tables(found)))
    raise typer.Exit(0 if found.equal else 1)


def side(spec: str, sets: Sequence[str], variants: Sequence[str]) -> Side:
    """One of the two models. Raises `DiagnosticError`."""
    from backends.read import is_build, is_run, read_build, read_run
    from compiler.pipeline import compile
    from compiler.plan.make import make_plan
    from compiler.plan.record import record
    from dsl.diagnostic import Diagnostic, DiagnosticError
    from dsl.load import Resolved
    from dslc.difference import Side
    from dslc.specs import read

    changes = [*(f"--variant {one}" for one in variants), *(f"--set {one}" for one in sets)]
    folder = Path(spec)
    if is_build(folder) or is_run(folder):
        if changes:
            kind = "build" if is_build(folder) else "run"
            message = f"{spec} is a {kind}, which cannot be changed: {', '.join(changes)}"
            raise DiagnosticError([Diagnostic("E695", message, help="name its spec")])
        said = read_run(folder) if is_run(folder) else {}
        built = read_build(folder / said.get("model", ""))
        run = [Resolved(f"run.{n}", _text(said[n]), "run.json") for n in STARTED if n in said]
        return Side(spec, built.values, built.lowered, built.programs, built.plan, run)
    description = read(spec, sets, variants)
    compiled = compile(description)
    name = " ".join([spec, *changes])
    plan = make_plan(description, compiled)
    planned = record(description.spec.model, plan) if plan else None
    return Side(name, description.resolved(), compiled.lowered, compiled.programs, planned)


def _text(value: object) -> str:
    """A value of run.json as a table has it."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def as_tables(found: Difference) -> Iterator[list[str]]:
    """The tables, for people."""
    from dslc.commands.show import table

    yield [f"A  {found.a}", f"B  {found.b}"]
    if found.equal:
        yield ["They are equal."]
    if found.values:
        yield table([("value", "A", "B", "origin"), *map(_value_row, found.values)], "<<<<")
    rows = [("number", "A", "B", "difference"), *map(_number_row, found.numbers)]
    yield table(rows, "<>>>")
    for block in found.blocks:
        yield list(_block_lines(block))


def _value_row(value: ChangedValue) -> tuple[str, ...]:
    sides = (value.a, value.b)
    texts = ("" if one is None else one.value for one in sides)
    # Both origins, if they differ.
    origins = dict.fromkeys(one.origin for one in sides if one is not None)
    return (value.path, *texts, " -> ".join(origins))


def _number_row(number: ComparedNumber) -> tuple[str, ...]:
    a, b = number.a, number.b
    cells = ("" if n is None else f"{n:,}" for n in (a, b))
    if a is None or b is None or a == b:
        return (number.name, *cells, "" if a == b else "?")
    percent = f" ({100 * (b - a) / a:+.1f} %)" if a else ""
    return (number.name, *cells, f"{b - a:+,}{percent}")


def _block_lines(block: ChangedBlock) -> Iterator[str]:
    yield f"{block.name}: {block.mark}"
    for programs, lines in block.lines.items():
        yield f"  {', '.join(programs)}"
        for line in lines:
            yield from _line(line)


def _line(line: DiffLine) -> Iterator[str]:
    from compiler.graph.compare import Mark

    match line.mark:
        case Mark.CHANGED:
            yield f"    - {line.was}"
            yield f"    + {line.text}"
        case Mark.MOVED:
            yield f"    > {line.text}{f'  (from {line.was})' if line.was else ''}"
        case Mark.ADDED:
            yield f"    + {line.text}"
        case _:
            yield f"    - {line.text}{f'  (moved to {line.was})' if line.was else ''}"
