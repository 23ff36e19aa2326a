"""`dslc calibrate`: how fast a cluster is, for `dslc plan`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dslc.options import DeviceOption, SetOption, SpecArgument, VariantOption

EXAMPLES = """\
\b
Examples:
  dslc calibrate my_model.yaml                                     one process
  torchrun --nproc-per-node 8 -m dslc calibrate my_model.yaml -o clusters/mine.measured.yaml
  torchrun --nproc-per-node 2 -m dslc calibrate my_model.yaml --seconds 0.01
  dslc plan my_model.yaml --measured clusters/mine.measured.yaml
"""


def run(
    spec: SpecArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The file; CLUSTER.measured.yaml here. Next to the cluster file `dslc plan` "
            "finds it.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(help="About how long each figure is measured.", min=0.0, metavar="S"),
    ] = 1.0,
    megabytes: Annotated[
        int, typer.Option(help="The largest message that is sent.", min=1, metavar="MB")
    ] = 1024,
    device: DeviceOption = None,
    sets: SetOption = None,
    variant: VariantOption = None,
) -> None:
    """Measure this machine or cluster at the sizes of a plan, for `dslc plan` to predict with.

    Products, attention, memory; with several ranks of torchrun, messages and collectives."""
    from backends import VERSION
    from compiler.plan.measurable import measurable
    from compiler.roles import roles
    from dslc.calibration import calibration_text
    from dslc.commands.init import write_new
    from dslc.report import reporting
    from dslc.specs import read
    from dslc.stages import with_plan
    from dslc.trained import failing

    with reporting():
        description = read(spec, sets, variant)
        compiled, plan = with_plan(description)
        figures = measurable(plan, list(roles(description, compiled.lowered, plan.layout)))
    with failing():
        from runtime.train.calibrate import calibrate
        from runtime.train.device import select_device
        from runtime.train.doctor import versions
        from runtime.train.ranks import init_process_groups

        place = select_device(device)
        with init_process_groups() as ranks:

            def said(what: str) -> None:
                if ranks.is_rank0:
                    print(f"measuring {what}", file=sys.stderr, flush=True)

            expert, limit = plan.layout.mesh.expert, megabytes * 10**6
            measured = calibrate(figures, expert, limit, ranks, place, seconds, said)
            size, first = ranks.world_size, ranks.is_rank0
    if first:
        cluster = plan.cluster.cluster
        found = versions(place)
        where = (
            f"Measured by dslc {VERSION} for {description.spec.model} on {size} ranks, "
            f"{found['device']}, torch {found['torch']}"
        )
        path = output or Path(f"{cluster}.measured.yaml")
        with reporting():
            write_new(path, calibration_text(cluster, where, measured))
        print(f"wrote {path}")
