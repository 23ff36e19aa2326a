"""`dslc doctor`: checks the nodes of a cluster before a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dslc.options import DeviceOption, SetOption, VariantOption

if TYPE_CHECKING:
    from runtime.train.doctor import RankReport

EXAMPLES = """\
\b
Examples:
  dslc doctor --out runs                                     one process
  torchrun --nproc-per-node 8 -m dslc doctor my_model.yaml --out /shared/runs

\b
Exit status: 0 all is well, 1 there are problems, each in a line with its rank and host.
"""

Row = tuple[str, ...]


def run(
    spec: Annotated[
        str | None,
        typer.Argument(
            metavar="SPEC", help="A spec whose plan the ranks have to fit.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write to this folder, that of runs.", metavar="DIR", show_default=False),
    ] = None,
    slow: Annotated[
        float,
        typer.Option(
            help="Name ranks below this share of the median of the faster half.",
            min=0.0,
            max=1.0,
            metavar="SHARE",
        ),
    ] = 0.8,
    seconds: Annotated[
        float, typer.Option(help="About how long each figure is measured.", min=0.0, metavar="S")
    ] = 1.0,
    megabytes: Annotated[
        int,
        typer.Option(help="Size of a message; four times as much is written.", min=1, metavar="MB"),
    ] = 64,
    device: DeviceOption = None,
    sets: SetOption = None,
    variant: VariantOption = None,
) -> None:
    """Check ranks and hosts before a run, and name those that are slow or differ.

    Versions, memory, the rate of a standard product, messages between pairs, writing to disk."""
    from dslc.report import reporting
    from dslc.specs import read
    from dslc.stages import with_plan
    from dslc.trained import failing

    with reporting():
        plan = with_plan(read(spec, sets, variant))[1] if spec is not None else None
    with failing():
        from runtime.train.device import select_device
        from runtime.train.doctor import Checks, examine, problems, require_folder
        from runtime.train.ranks import init_process_groups

        size = megabytes << 20
        checks = Checks(
            slow, seconds, size, 4 * size,
            None if out is None else require_folder(out),
            None if plan is None else plan.fullest.memory.peak,
            None if plan is None else plan.layout.mesh.size,
        )  # fmt: skip
        place = select_device(device)
        with init_process_groups() as ranks:
            first = ranks.is_rank0

            def said(what: str) -> None:
                if first:
                    print(f"checking {what}", file=sys.stderr, flush=True)

            reports = examine(checks, ranks, place, said)
    found = list(problems(reports, checks))
    if first:
        print(as_text(reports))
        print("\n" + "\n".join(f"problem: {one}" for one in found) if found else "\nall is well")
        sys.stdout.flush()
    # One line for each problem is enough: the other ranks end in silence.
    raise typer.Exit(1 if found else 0)


def as_text(reports: Sequence[RankReport]) -> str:
    from dslc.commands.show import table

    hosts = dict.fromkeys(one.host for one in reports)
    where = ", ".join(list(hosts)[:4]) + (", .." if len(hosts) > 4 else "")
    head: list[Row] = [("ranks", f"{len(reports):,} on {where}")]
    head += list(reports[0].versions.items())
    rows = list(_rows(reports))
    parts = (table(head, "<<"), table(rows, "<<>>>>"))
    return "\n\n".join("\n".join(lines) for lines in parts)


def _rows(reports: Sequence[RankReport]) -> Iterator[Row]:
    """Every rank of up to 16, of more the 16 with the slowest product."""
    yield ("rank", "host", "product GFLOP/s", "messages MB/s", "disk MB/s", "memory GB")
    shown = sorted(reports, key=lambda one: one.product)[:16]
    for one in sorted(shown, key=lambda one: one.rank):
        numbers = (
            (one.product, 1e9), (one.pair, 1e6), (one.disk, 1e6), (one.memory, 1e9),
        )  # fmt: skip
        yield (
            str(one.rank),
            one.host,
            *("" if value is None else f"{value / unit:,.1f}" for value, unit in numbers),
        )
