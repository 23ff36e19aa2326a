"""`stages.py` of a build: a class for each pipeline stage, cut from the program of training.

The blocks that a stage calls are those of `model.py`; only the outermost block is cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from backends.render import render
from backends.torch.declare import TORCH_DTYPES, stored_name
from backends.torch.emit import Emitter
from backends.torch.layout import CallText, lay_out
from backends.torch.model import Emission, defaults
from backends.torch.records import Method, docstring, tuple_text
from compiler.graph.core import Graph, Program, Value, copy_program
from compiler.ops.loss import MEANS
from compiler.parallel.layout import Layout
from compiler.pipeline import Compiled
from compiler.roles import Role
from dsl.load import Description


@dataclass(frozen=True)
class ExpertClass:
    """A block of the model whose experts are spread over ranks: its methods are those of a rank."""

    name: str
    methods: list[Method]


@dataclass(frozen=True)
class StageClass:
    """A class of `stages.py`."""

    name: str
    about: str
    received: list[str]
    loss: list[str]
    parts: list[Method]


def stages_py(
    description: Description,
    compiled: Compiled,
    layout: Layout,
    roles: Sequence[Role],
    *,
    spec: str,
    version: str,
    dtype: str,
    params: Mapping[str, object],
    kernels: bool = False,
) -> str | None:
    """Text of `stages.py`. Gradients are computed by autograd, a stage at a time.

    None where passes were left out, so that the layers of `model.py` serve no stage.
    Raises `DiagnosticError` (E519) where the model cannot be cut.
    """
    classes: list[StageClass] = []
    table: list[tuple[int, tuple[str, int, CallText]]] = []
    constants: dict[str, None] = {}
    spread: dict[str, ExpertClass] = {}
    experts = layout.mesh.expert
    for role in roles:
        program = copy_program(role.joint)
        programs = {**compiled.programs, "train": program}
        emit = Emission(replace(compiled, programs=programs), dtype, params)
        if program.root not in program.derivatives:
            return None
        if not _same_units(compiled.programs["train"], program, emit):
            return None
        classes.append(_class(role, program, emit, experts))
        spread |= {one.name: one for one in _spread(program, emit, experts)}
        constants |= dict.fromkeys(emit.constants())
        for stage in role.stages:
            held = list(_held(role.of(stage), emit))
            first = stage.layers[0] if stage.layers else 0
            names = tuple(("", f'"{name}"') for name in held)
            call = CallText("(", names, ",)" if len(names) == 1 else ")")
            table += [(stage.index, (classes[-1].name, first, call))]
    facts = {"stages": classes, "constants": list(constants), "spread": list(spread.values())}
    text = repr(facts)
    lines = []
    for _, (name, first, call) in sorted(table, key=lambda row: row[0]):
        given = (("", name), ("", str(first)), ("", call))
        lines += lay_out("", CallText("StagePlan(", given), suffix=",")
    return render(
        "torch/stages.py.jinja",
        model=description.spec.model,
        spec=docstring(spec),
        version=version,
        kernels=kernels,
        uses_e5m6=bool(re.search(r"\be5m6\.", text)),
        uses_fp8=bool(re.search(r"\bfp8\.", text)),
        uses_g=bool(re.search(r"\bG\.", text)),
        uses_torch="torch." in text,
        uses_extern=bool(re.search(r"\bE\.", text)),
        table=lines,
        **facts,
    )


def _same_units(whole: Program, cut: Program, emit: Emission) -> bool:
    """Whether a stage calls the model's layers, and they their experts, as the model does.

    Inside they may differ: what is recomputed in a layer is chosen for all of the model.
    """
    return all(
        name in whole.derivatives
        and _signature(whole.graphs[name]) == _signature(cut.graphs[name])
        and replace(whole.derivatives[name], backward="") == replace(
            cut.derivatives[name], backward="")
        for name in [*emit.units, *(graph.name for graph in _dispatching(cut, emit))]
    )  # fmt: skip


def _dispatching(program: Program, emit: Emission) -> Iterator[Graph]:
    for name, graph in program.graphs.items():
        if name in emit.blocks and any(op.kind == "dispatch" for op in graph.walk()):
            yield graph


def _spread(program: Program, emit: Emission, experts: int) -> Iterator[ExpertClass]:
    """The blocks around experts, with methods that send tokens to other ranks."""
    for graph in _dispatching(program, emit):
        for half in (graph, program.graphs[program.derivatives[graph.name].backward]):
            _terms_of_micro_batch(half, experts)
        one = next(one for one in emit.classes if graph.name in one.arguments)
        own = emit.sizes.within({name: f"self.{name}" for name in one.parameters})
        context = emit.context("train", graph.name, own)
        methods = list(emit.training_methods(graph.name, graph, context))
        yield ExpertClass(emit.names[one.graph], methods)


def _terms_of_micro_batch(graph: Graph, experts: int) -> None:
    """Balance losses as terms of one micro-batch on all `experts` ranks, instead of a whole step.

    A trainer may give micro-batches any share of a step. `partition` has divided them.
    """
    by = {v: op.kind for op in graph.walk() for v in op.results}
    into = {v: op.kind for op in graph.walk() for v in op.operands}
    for op in graph.walk():
        if op.kind == "scale" and (
            by.get(op.operands[0]) in MEANS
            or into.get(op.result, "").removesuffix("_grad") in MEANS
        ):
            op.attrs["by"] = 1 / experts


def _signature(graph: Graph) -> tuple[object, ...]:
    results = zip(graph.result_names, graph.results, strict=True)
    values = [*((v.name, v.type) for v in graph.args), *((name, v.type) for name, v in results)]
    return tuple((name, type.dtype, [(d.name, d.size) for d in type.dims]) for name, type in values)


def _class(role: Role, program: Program, emit: Emission, experts: int) -> StageClass:
    main = program.main
    first = "self.first" if len(role.stages) > 1 else ""
    context = replace(emit.context("train", main.name), first_layer=first)
    emitter = Emitter(main, context)
    boundary = program.boundary
    assert _crossing_gradients(program) == (boundary.received, boundary.sent), main.name
    by_name = {value.name: value for value in main.args}
    entering = [by_name[name] for name in boundary.received]
    ranks = f" * {experts}" if experts > 1 else ""
    lines = [
        f"{emitter.names[v]} = F.count_labels({label}){ranks}" for v, label in _counts(program)
    ]
    lines += defaults(main, "train")
    if entering:
        lines.append(f"{tuple_text([emitter.names[v] for v in entering])} = received")
    lines += emitter.body()
    names_of: dict[str, list[str]] = {}
    for name, result in zip(main.result_names, emitter.results(), strict=True):
        names_of.setdefault(name, []).append(result)
    sent = [names_of[name][-1] for name in boundary.sent]
    fields = [("sent=", tuple_text(sent))] if sent else []
    fields += [(f"{n}=", names_of[n][0]) for n in ("total", "main", "balance") if n in names_of]
    fields += [(f"{n}=", tuple_text(names_of[n])) for n in ("mtp", "load") if n in names_of]
    return StageClass(
        name=f"Stage_{role.name.replace('-', '_')}",
        about=_about(role),
        received=[f"return {tuple_text([_empty(v, emit) for v in entering])}"],
        loss=[*lines, *lay_out("return ", CallText("StageLoss(", tuple(fields)))],
        parts=[emit.segment_method(graph) for graph in emit.segment_graphs()],
    )


def _crossing_gradients(program: Program) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """For which arguments and results of a stage gradients cross its ends: sent and received."""
    main, derivative = program.main, program.derivatives[program.root]
    backward, crosses = program.graphs[derivative.backward], program.backward_boundary
    arguments = zip(backward.result_names, derivative.arguments, strict=True)
    results = zip(backward.args, derivative.results, strict=False)  # lifted arguments follow
    sent = {name: main.args[i].name for name, i in arguments}
    received = {value.name: main.result_names[i] for value, i in results}
    return tuple(sent[n] for n in crosses.sent), tuple(received[n] for n in crosses.received)


def _counts(program: Program) -> Iterator[tuple[Value, str]]:
    for value in program.main.args:
        if value.name in program.counts:
            yield value, program.counts[value.name]


def _about(role: Role) -> str:
    first, last = role.stages[0], role.stages[-1]
    if len(role.stages) > 1:
        return (
            f"Stages {first.index} to {last.index}: {len(first.layers)} layers each, "
            f"{first.layers[0]} to {last.layers[-1]}."
        )
    layers = first.layers
    numbers = f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else ""
    numbers = numbers or (f"layer {layers[0]}" if layers else "no layers")
    before = "the embedding, " if first.units[0].layer is None and layers else ""
    after = ", and what follows the layers" if first.units[-1].layer is None else ""
    return f"Stage {first.index}: {before}{numbers}{after}."


def _empty(value: Value, emit: Emission) -> str:
    """The expression of a tensor of a value's type."""
    sizes = []
    for dim in value.type.dims:
        base, _, less = dim.name.partition("-")
        if dim.size is None and base == "seq" and less.isdigit():
            sizes.append(f"seq - {less}")
        else:
            sizes.append(dim.name if dim.size is None else emit.sizes.of(dim))
    dtype = TORCH_DTYPES.get(value.type.dtype)
    return f"self.empty({', '.join(sizes)}{f', dtype={dtype}' if dtype else ''})"


def _held(program: Program, emit: Emission) -> Iterator[str]:
    """The modules of the model that a stage uses, in order."""
    found: dict[str, None] = {}
    for graph in [program.main, *(program.graphs[name] for name in emit.served.segments)]:
        joined = emit.joined[emit.compiled.lowered.root]
        for weight in graph.weights:
            found[stored_name(weight, joined).rpartition(".")[0]] = None
        found |= dict.fromkeys(_scopes(graph))
    yield from found


def _scopes(graph: Graph) -> Iterator[str]:
    for op in graph.ops:
        if op.kind == "call" and op.text("scope"):
            yield op.text("scope")
        elif op.kind == "repeat":
            for inner in op.regions[0].ops:
                if inner.kind == "call":
                    scope = inner.text("scope").removesuffix(".*")
                    yield from (f"{scope}.{i}" for i in op.layers)
