"""`dslc plan`: how a model is placed on a cluster, what that takes, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dslc.options import Format, FormatOption, SetOption, SpecArgument, VariantOption

if TYPE_CHECKING:
    from compiler.plan.plan import Plan, Planner
    from dsl.load import Description

EXAMPLES = """
\b
Examples:
  dslc plan deepseek_v3
  dslc plan deepseek_v3 --why                             largest tensors, similar layouts, the step
  dslc plan deepseek_v3 --set parallel.expert=32
  dslc plan my_model.yaml --cluster h100_8 --format json  the plan.json of builds
  dslc plan my_model.yaml --measured mine.measured.yaml   at the rates of `dslc calibrate`
  dslc plan my_model.yaml --measured runs/my_model        compared with what a run measured
  dslc plan deepseek_v3 --serve deepseek_day6             nodes and rates of a served model
  dslc plan deepseek_v3 --serve deepseek_day6 --load f.json   and how even redundant experts make it

\b
Exit status: 0 the plan fits, 1 it is impossible or does not fit.
"""

Row = tuple[str, ...]


def run(
    spec: SpecArgument,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Use this cluster instead of that of the spec.", show_default=False
        ),
    ] = None,
    serve: Annotated[
        str | None,
        typer.Option(
            metavar="TRAFFIC",
            help="Plan serving instead, for a traffic file or a shipped one (deepseek_day6).",
            show_default=False,
        ),
    ] = None,
    load: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --serve: tokens of each expert, as `dslc serve --record-load` writes them.",
            show_default=False,
        ),
    ] = None,
    why: Annotated[
        bool,
        typer.Option(
            "--why",
            help="Print the largest tensors, similar layouts, and what the step consists of.",
        ),
    ] = False,
    measured: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A calibration to predict with, or a run to compare with. One next to the cluster "
            "file (NAME.measured.yaml) is used without being named.",
            show_default=False,
        ),
    ] = None,
    sets: SetOption = None,
    variants: VariantOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Show memory, computation and communication of each rank of a cluster, and whether it fits.

    For a training step, by pipeline rank; with --serve, for steps of decoding and for prompts."""
    from dsl.diagnostic import Diagnostic, DiagnosticError
    from dslc.report import reporting
    from dslc.specs import read

    with reporting(as_json=format is Format.json):
        changes = [*(sets or ()), *([f"parallel.cluster={cluster}"] if cluster else ())]
        description = read(spec, changes, variants)
        if serve is not None:
            plan_serving(description, serve, load, format)
            return
        if load is not None:
            raise DiagnosticError([Diagnostic("E533", "--load is for --serve TRAFFIC")])
        plan_training(description, measured, format, why=why)


def plan_training(
    description: Description, measured: str | None, format: Format, *, why: bool
) -> None:
    """Prints the plan of a step. Raises `DiagnosticError`, also where it does not fit."""
    from compiler.plan.explain import misfit
    from compiler.plan.make import planner_of
    from compiler.plan.record import record
    from dsl.diagnostic import DiagnosticError
    from dslc import prediction
    from dslc.curves import read_metrics
    from dslc.report import print_json
    from dslc.stages import with_plan

    compiled, plan = with_plan(description)
    planner = planner_of(description, compiled)
    run = Path(measured) if measured is not None and prediction.is_run(measured) else None
    metrics = read_metrics(run) if run else None
    step = prediction.predictions(
        plan, description, compiled, None if run else measured, both=run is not None
    )
    if format is Format.json and plan.fits:
        found = record(description.spec.model, plan)
        if step.best is not None:
            found["prediction"] = prediction.record(step.best, step.name)
        print_json(found)
    elif format is Format.text:
        print(as_text(plan, description, step.words))
        if metrics is not None:
            print(f"\n{prediction.beside(step, plan, metrics)}")
        if why:
            print(f"\n{explained(plan, planner, description)}")
            if step.best is not None:
                print(f"\n{prediction.explained(step.best)}")
    if not plan.fits:
        raise DiagnosticError([misfit(plan, planner, description)])


def plan_serving(description: Description, name: str, load: Path | None, format: Format) -> None:
    """Prints what a served model takes and gives. Raises `DiagnosticError`."""
    from dataclasses import asdict

    from compiler.pipeline import compile
    from compiler.plan.serving import routed_experts, serve
    from dsl.diagnostic import Diagnostic, DiagnosticError
    from dsl.expert_load import read_load
    from dsl.traffic import read_traffic
    from dslc.balance import balances
    from dslc.report import print_json
    from dslc.serving import serving_text
    from dslc.stages import no_section

    cluster, model = description.cluster, description.spec.model
    if cluster is None:
        raise DiagnosticError([no_section(description)])
    traffic, compiled = read_traffic(name), compile(description)
    steps = compiled.steps_of("decode")
    absorbed = next(step.program for step in steps if step.name == "absorb")
    try:
        served = serve(compiled.lowered, compiled.programs["decode"], absorbed, cluster, traffic)
        experts = routed_experts(absorbed)
    except ValueError as error:
        raise DiagnosticError([Diagnostic("E533", str(error), description.span())]) from None
    found = []
    if load is not None:
        loads = read_load(load, experts.count)
        found = balances(loads.values(), traffic, cluster.gpus_per_node, experts.groups)
    if format is Format.json:
        values = {"model": model, "traffic": traffic.traffic, **asdict(served)}
        print_json(values | ({"balance": [asdict(one) for one in found]} if found else {}))
    else:
        print(serving_text(served, model, cluster, traffic, found))


def as_text(plan: Plan, description: Description, predicted: str = "") -> str:
    from compiler.plan.explain import CONVENTIONS
    from dslc.commands.show import table, wrapped

    stages = list(stage_rows(plan))
    work = list(work_rows(plan))
    head = list(layout_rows(plan, description.spec.model))
    if predicted:
        head.append(("predicted", predicted))
    parts = [
        table(head, "<<"),
        table(expert_rows(plan), "<>>>>>") if plan.exchanges else [],
        table(stages, "<<<" + ">" * (len(stages[0]) - 3)),
        table(work, "<" + ">" * (len(work[0]) - 1)),
        table(sent_rows(plan), "<>>>>"),
        ["How this is counted:", *wrapped(CONVENTIONS)],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def layout_rows(plan: Plan, model: str) -> Iterator[Row]:
    from dsl.units import format_count

    mesh, layout, cluster = plan.layout.mesh, plan.layout, plan.cluster
    yield ("model", model)
    size = f"{cluster.nodes} nodes of {cluster.gpus_per_node} GPUs"
    memory = f", {cluster.memory / 10**9:g} GB each" if cluster.memory else ""
    yield ("cluster", f"{cluster.cluster}: {size}{memory}")
    yield ("mesh", f"{mesh.pipeline} pipeline x {mesh.replicas} replicas x {mesh.expert} expert")
    done, fast = (sum(getattr(r.flops, what) for r in plan.ranks) for what in ("total", "fp8"))
    yield ("in FP8", f"{fast / done:.1%} of the FLOPs")
    ways = ", half of them in each direction" if layout.bidirectional else ""
    yield ("schedule", f"{layout.schedule}, {layout.micro_batches} micro-batches{ways}")
    length = plan.parallel.sequence_length
    yield ("micro-batch", f"{layout.micro_batch} x {length:,} tokens on each rank")
    zero = "sharded over the ranks that hold a weight" if layout.zero else "on every rank"
    yield ("optimizer", f"{zero} (ZeRO-{layout.zero})")
    if (step := plan.step_seconds()) is not None:
        rate = format_count(plan.parallel.batch * length / step)
        pace = f"{step:.2f} s or {rate} tokens/s at peak rates, with the bubble"
        yield ("step", f"{pace}, if communication is hidden")


def expert_rows(plan: Plan) -> Iterator[Row]:
    yield ("experts of", "total", "per rank", "nodes per token", "dispatch bytes", "combine bytes")
    for one in plan.exchanges:
        on_rank = one.experts // plan.layout.mesh.expert
        numbers = (one.experts, on_rank, one.nodes, one.dispatch, one.combine)
        yield (one.block, *(f"{n:,}" for n in numbers))


def stage_rows(plan: Plan) -> Iterator[Row]:
    """Memory by pipeline rank, in the unit of its peak."""
    from compiler.plan.memory import Kind
    from dsl.units import format_count

    kinds = [kind.words for kind in Kind]
    limit, (scale, unit) = plan.cluster.memory, unit_of(plan)
    yield ("rank", "stages", "layers", "parameters", *kinds, f"peak {unit}", "of GPU")
    for rank in plan.ranks:
        memory, stages = rank.memory, plan.layout.stages_of(rank.pipeline)
        yield (
            str(rank.pipeline),
            ", ".join(map(str, stages)),
            ", ".join(plan.layout.stages[stage].words for stage in stages),
            format_count(memory.parameters),
            *(f"{memory.of(kind) / scale:.2f}" for kind in Kind),
            f"{memory.peak / scale:.2f}",
            f"{memory.peak / limit:.0%}" if limit else "",
        )


def unit_of(plan: Plan) -> tuple[int, str]:
    """GB, or MB where all is small."""
    return (10**9, "GB") if plan.fullest.memory.peak >= 10**9 else (10**6, "MB")


def work_rows(plan: Plan) -> Iterator[Row]:
    """Computation and communication of one rank in a step, with times at peak rates."""
    from dsl.units import format_count

    scale, unit = unit_of(plan)
    yield (
        "rank",
        "FLOPs",
        *("messages intra", f"{unit} intra-node", "messages inter", f"{unit} inter-node"),
        *("s compute", "s memory", "s intra-node", "s inter-node"),
    )
    for rank in plan.ranks:
        seconds = plan.seconds(rank)
        yield (
            str(rank.pipeline),
            format_count(rank.flops.total),
            f"{sum(one.messages_inside for one in rank.sent):,}",
            f"{sum(one.bytes_inside for one in rank.sent) / scale:,.2f}",
            f"{sum(one.messages_across for one in rank.sent):,}",
            f"{sum(one.bytes_across for one in rank.sent) / scale:,.2f}",
            *(
                f"{seconds[name]:.2f}" if name in seconds else ""
                for name in ("compute", "memory", "inside", "across")
            ),
        )


def sent_rows(plan: Plan) -> Iterator[Row]:
    """The communication of the rank that sends most, by purpose."""
    busiest = max(plan.ranks, key=lambda rank: sum(one.bytes_across for one in rank.sent))
    scale, unit = unit_of(plan)
    sends = f"rank {busiest.pipeline} sends"
    yield (sends, "messages intra", f"{unit} intra-node", "messages inter", f"{unit} inter-node")
    for one in busiest.sent:
        yield (
            one.purpose,
            f"{one.messages_inside:,}",
            f"{one.bytes_inside / scale:,.2f}",
            f"{one.messages_across:,}",
            f"{one.bytes_across / scale:,.2f}",
        )


def explained(plan: Plan, planner: Planner, description: Description) -> str:
    """`--why`: the largest tensors of the fullest rank, and the nearest layouts."""
    from compiler.plan.explain import alternatives, gigabytes, spec_span
    from dslc.commands.show import table

    fullest, (scale, unit) = plan.fullest.memory, unit_of(plan)
    largest: list[Row] = [(unit, "kind", "equation", "spec", f"on rank {fullest.pipeline}")]
    for use in fullest.largest()[:12]:
        equation = use.span.location if use.span else ""
        spec = spec_span(use, description).location
        largest.append((f"{use.bytes / scale:.2f}", use.kind.words, equation, spec, use.name))
    near: list[Row] = [("similar layouts", "peak", "fits", "largest part of the fullest rank")]
    near += [
        (one.changes, gigabytes(one.peak), "yes" if one.fits else "no", one.reason)
        for one in alternatives(plan, planner)
    ]
    return "\n\n".join("\n".join(t) for t in (table(largest, "><<<<"), table(near, "<><<")))
