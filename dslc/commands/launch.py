"""`dslc launch`: job files that train a model on its cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dslc.options import SetOption, SpecArgument, VariantOption

EXAMPLES = """\
\b
Examples:
  dslc launch deepseek_v3 --slurm --spare 2
  dslc launch deepseek_v3 --kubernetes --image registry/torch:2.13 -o job.yaml
"""


def run(
    spec: SpecArgument,
    slurm: Annotated[bool, typer.Option("--slurm", help="A script for sbatch.")] = False,
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes", help="A service and a job for kubectl.")
    ] = False,
    spare: Annotated[
        int, typer.Option(help="Nodes that wait to take another's place.", min=0, metavar="N")
    ] = 0,
    restarts: Annotated[
        int, typer.Option(help="How often ranks start again.", min=0, metavar="N")
    ] = 10,
    image: Annotated[
        str | None,
        typer.Option(help="Image with Python and torch, for --kubernetes.", show_default=False),
    ] = None,
    claim: Annotated[
        str, typer.Option(help="Claim of the volume with build, data and runs.")
    ] = "shared",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The file; MODEL.slurm.sh or MODEL.kubernetes.yaml."),
    ] = None,
    sets: SetOption = None,
    variant: VariantOption = None,
) -> None:
    """Write a job that trains on the cluster of `parallel`.

    A file that exists is never overwritten."""
    from backends.launch import jobs
    from dslc.commands.init import write_new
    from dslc.report import reporting
    from dslc.specs import read, shown
    from dslc.stages import with_plan

    if slurm == kubernetes:
        raise typer.BadParameter("give one of --slurm and --kubernetes")
    if kubernetes and image is None:
        raise typer.BadParameter("--kubernetes needs --image, with Python and torch in it")
    with reporting():
        description = read(spec, sets, variant)
        _, plan = with_plan(description)
        model, source = description.spec.model, str(spec)
        if slurm:
            path = output or Path(f"{model}.slurm.sh")
            text = jobs.slurm(plan, model, source, spare, restarts)
        else:
            path = output or Path(f"{model}.kubernetes.yaml")
            text = jobs.kubernetes(plan, model, source, spare, restarts, image or "", claim)
        write_new(path, text)
    size = f"{plan.cluster.nodes + spare:,} nodes of {plan.cluster.gpus_per_node}"
    print(f"wrote {shown(path)}: {size}; next: dslc build {source} -o build/{model}")
    if not plan.fits:
        print("warning: the plan does not fit: dslc plan says why", file=sys.stderr)
