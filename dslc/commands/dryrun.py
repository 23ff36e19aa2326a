"""`dslc dryrun`: one rank of a plan executed without data, against the plan."""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dslc.options import Format, FormatOption, SetOption, SpecArgument, VariantOption

if TYPE_CHECKING:
    from dslc.commands.show import Row

EXAMPLES = """\
\b
Examples:
  dslc dryrun deepseek_v3 --rank 0       of 2,048, on any machine
  dslc dryrun deepseek_v3 --rank 2047 --format json
  dslc dryrun deepseek_v3 --all-rows     one rank of each pipeline rank, and whether messages match
"""

PURPOSES = ("pipeline", "dispatch", "combine")

NOTES = (
    "A step of the largest batch, with torch's fake process group and tensors without values, and "
    "experts in balance. Activations: the most between two entries of the row, with messages on "
    "their way; the plan counts what a chunk takes inside apart.",
)


def run(
    spec: SpecArgument,
    rank: Annotated[int, typer.Option(help="Which rank, from 0.", metavar="R", min=0)] = 0,
    all_rows: Annotated[
        bool,
        typer.Option(
            "--all-rows",
            help="Execute one rank for each pipeline rank, and match what they send and receive.",
        ),
    ] = False,
    sets: SetOption = None,
    variant: VariantOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Execute one rank of a plan without data.

    Shows its memory and what it sends, as planned and as executed.
    """
    from backends.build import build
    from dsl.diagnostic import DiagnosticError
    from dslc.report import print_json, reporting
    from dslc.specs import read
    from dslc.stages import no_section
    from dslc.trained import using

    with tempfile.TemporaryDirectory() as folder:
        with reporting(as_json=format is Format.json):
            description = read(spec, sets, variant)
            if description.spec.parallel is None:
                raise DiagnosticError([no_section(description)])
            name = description.spec.model
            build(description, Path(folder) / name)
        with using(Path(folder), name) as (command, model):
            plan = json.loads((Path(folder) / name / "plan.json").read_text(encoding="utf-8"))
            if all_rows:
                raise typer.Exit(execute_rows(name, command, model, rank, plan, format))
            found = command.dryrun(model, rank)
    planned = plan["ranks"][found.pipeline]
    if format is Format.json:
        print_json({"model": name, **values_of(found), "planned": planned})
    else:
        print(as_text(name, found, planned))


def execute_rows(
    name: str, command: Any, model: Any, rank: int, plan: Mapping[str, Any], format: Format
) -> int:
    """One rank for each pipeline rank; the exit status, which is 1 if messages do not match."""
    from dslc.commands.show import table
    from dslc.report import print_json

    def done(one: Any) -> None:
        print(f"executed rank {one.rank:,} of {one.ranks:,}", file=sys.stderr, flush=True)

    found, wrong = command.dryrun_rows(model, rank, done)
    if format is Format.json:
        print_json({"model": name, "rows": [values_of(one) for one in found], "unmatched": wrong})
        return 1 if wrong else 0
    print("\n".join(table(list(row_rows(found, plan)), "<<>>>>>>")))
    messages = sum(one.kind == "send" for row in found for one in row.transfers)
    lines = wrong or [f"all {messages:,} messages are received in the order in which they are sent"]
    print("\n" + "\n".join(lines))
    return 1 if wrong else 0


def row_rows(found: Sequence[Any], plan: Mapping[str, Any]) -> Iterator[Row]:
    yield (
        *("row", "rank", "GB held, plan", "dry run", "messages", "GB along the pipeline"),
        *("GB dispatched", "GB combined"),
    )
    for one in found:
        planned = plan["ranks"][one.pipeline]["memory_bytes"]
        held = sum(size for kind, size in planned.items() if kind != "working")
        sizes = (one.sent[what].bytes if what in one.sent else 0 for what in PURPOSES)
        yield (
            str(one.pipeline),
            f"{one.rank:,}",
            f"{held / 1e9:.2f}",
            f"{one.peak / 1e9:.2f}",
            f"{len(one.transfers):,}",
            *(f"{size / 1e9:.2f}" for size in sizes),
        )


def values_of(found: Any) -> dict[str, Any]:
    """For JSON, without the list of messages."""
    values = dataclasses.asdict(found)
    del values["transfers"]
    return values


def as_text(model: str, found: Any, planned: Mapping[str, Any]) -> str:
    from dslc.commands.show import table, wrapped

    where = f"{found.rank:,} of {found.ranks:,}: pipeline rank {found.pipeline}"
    head: list[Row] = [("model", model), ("rank", where)]
    head.append(("step", f"{found.micro_batches} micro-batches"))
    parts = [
        table(head, "<<"),
        table(list(memory_rows(found, planned["memory_bytes"])), "<>>"),
        table(list(sent_rows(found, planned["sent"])), "<>>>>"),
        *(wrapped([note]) for note in NOTES),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts)


def memory_rows(found: Any, planned: Mapping[str, int]) -> Iterator[Row]:
    """Bytes by what they are for, planned and executed."""
    both = {
        "weights": (planned["weights"], found.weights),
        "FP8 copies": (planned["fp8_copies"], found.fp8_copies),
        "gradients": (planned["gradients"], found.gradients),
        "optimizer": (planned["master_weights"] + planned["moments"], found.optimizer),
        "activations": (planned["activations"], found.activations),
    }
    yield ("memory, bytes", "plan", "dry run")
    for name, values in both.items():
        yield (name, *(f"{value:,}" for value in values))
    yield ("all of them", *(f"{sum(values):,}" for values in zip(*both.values(), strict=True)))


def sent_rows(found: Any, planned: list[Mapping[str, Any]]) -> Iterator[Row]:
    yield ("sent", "messages, plan", "dry run", "bytes, plan", "dry run")
    for one in planned:
        messages, size = (
            sum(one[where][what] for where in ("inside", "across"))
            for what in ("messages", "bytes")
        )
        ours = found.sent.get(one["purpose"])
        numbers = (messages, ours.messages if ours else 0, size, ours.bytes if ours else 0)
        yield (one["purpose"], *(f"{number:,}" for number in numbers))
