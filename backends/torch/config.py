"""The numbers of a spec as `config.py` of a build."""

from __future__ import annotations

from typing import Any

from backends.render import render
from backends.torch.layout import CallText, lay_out
from backends.torch.records import docstring
from compiler.graph.core import Program
from compiler.parallel.layout import placement
from compiler.plan.make import step_counts
from compiler.plan.plan import Plan
from compiler.plan.ramp import longest
from compiler.published import kept_modules, published
from dsl.hf import KEPT, hf_config
from dsl.load import Description
from dsl.schema import BlockUse, Parallel, Phase, Schedule, Train, constant


def config_py(
    description: Description, lowered: Program, plan: Plan | None, *, version: str, spec: str
) -> str:
    """Text of `config.py`: the frozen spec, and what `save` writes as config.json."""
    hf = hf_config(description)
    kept = kept_modules(published(lowered)) if description.spec.precision.overrides else []
    hf |= {KEPT: kept} if kept else {}
    return render(
        "torch/config.py.jinja",
        version=version,
        spec=docstring(spec),
        config=lay_out("", literal(_numbers(description, plan)), suffix=""),
        hf_config=lay_out("HF_CONFIG = ", literal(hf)),
    )


def _numbers(description: Description, plan: Plan | None) -> dict[str, Any]:
    spec = description.spec
    layers = [
        {"repeat": g.repeat, "block": _use(g.block), **{n: _use(u) for n, u in g.slots.items()}}
        for g in spec.architecture.layers
    ]
    mtp = spec.architecture.mtp
    slots = {n: _use(u) for n, u in mtp.slots.items()} if mtp.depth else {}
    return {
        "model": spec.model,
        "about": spec.about,
        "params": {name: value.value for name, value in description.params.items()},
        "architecture": {
            "block": _use(spec.architecture.block),
            "layers": layers,
            "mtp": {"depth": mtp.depth, **slots},
        },
        "sequence": spec.sequence.model_dump(),
        "precision": spec.precision.model_dump(),
        "train": _training(spec.train, spec.parallel),
        "parallel": _parallel(description, plan) if plan else None,
    }


def _parallel(description: Description, plan: Plan) -> dict[str, Any]:
    """What the trainer reads of a plan."""
    layout, mesh, parallel = plan.layout, plan.layout.mesh, plan.parallel
    return {
        "pipeline": mesh.pipeline,
        "replicas": mesh.replicas,
        "expert": mesh.expert,
        "gpus_per_node": mesh.node_size,
        "zero": layout.zero,
        "schedule": layout.schedule,
        "exchange": parallel.exchange,
        "row_bytes": max((one.row for one in plan.exchanges), default=0),
        "micro_batches": step_counts(description, layout),
        "longest_schedule": longest(mesh.pipeline),
        "stages": placement(layout.schedule, mesh.pipeline),
        "flops_of_token": plan.flops_of_token,
        "peak_seconds_of_token": plan.peak_seconds_of_token,
    }


def _training(train: Train, parallel: Parallel | None) -> dict[str, Any]:
    """What the trainer reads; sizes that `train` leaves open are those of `parallel`."""
    length, batch, micro_batch = train.sequence_length, train.batch, train.micro_batch
    if parallel is not None:
        length = length or parallel.sequence_length
        batch = batch or constant(parallel.batch)
        micro_batch = micro_batch or parallel.micro_batch
    return {
        "initializer_range": train.initializer_range,
        "loss": {
            "mtp_weight": train.loss.mtp_weight,
            "balance_alpha": train.loss.balance_alpha,
        },
        "optimizer": train.optimizer.model_dump(),
        "learning_rate": train.learning_rate,
        "bias_update": train.bias_update,
        "sequence_length": length,
        "batch": batch,
        "micro_batch": micro_batch,
        "steps": train.steps,
        "tokens": train.tokens,
        "document_mask": train.document_mask,
        "fim": train.fim.model_dump() if train.fim else None,
        "ema": train.ema,
    }


def _use(use: BlockUse) -> dict[str, Any]:
    return {"block": use.name, "arguments": {n: v.value for n, v in use.arguments.items()}}


def literal(value: Any) -> CallText | str:
    """A value as Python text that evaluates to it; strings can never be anything but strings."""
    if isinstance(value, Schedule):
        phases = tuple(("", _phase(p)) for p in value.root)
        return CallText("Schedule((", phases, ",))" if len(phases) == 1 else "))")
    if isinstance(value, dict):
        return CallText(
            "{", tuple((f"{_quoted(str(k))}: ", literal(v)) for k, v in value.items()), "}"
        )
    if isinstance(value, tuple):
        items = tuple(("", literal(v)) for v in value)
        return CallText("(", items, ",)" if len(items) == 1 else ")")
    if isinstance(value, list):
        return CallText("[", tuple(("", literal(v)) for v in value), "]")
    if isinstance(value, str):
        return _quoted(value)
    assert value is None or isinstance(value, bool | int | float), type(value)
    return repr(value)


def _phase(phase: Phase) -> str:
    """What differs from the defaults of the runtime's `Phase`, which are the schema's."""
    given = phase.model_dump(exclude_defaults=True, exclude={"value"})
    parts = [repr(phase.value), *(f"{name}={literal(value)}" for name, value in given.items())]
    return f"Phase({', '.join(parts)})"


def _quoted(text: str) -> str:
    """An ASCII literal between double quotes."""
    body = ascii(text)[1:-1].replace("\\'", "'").replace('"', '\\"')
    return f'"{body}"'
