"""Programs of all ranks of a layout, run together in the interpreter."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compiler.graph.core import Graph, Program, Value
from compiler.graph.parse import parse_program
from compiler.graph.text import print_program
from compiler.graph.verify import spans_missing, verify
from compiler.lower import lower
from compiler.parallel.layout import Layout, Stage, placement, units
from compiler.parallel.mesh import Mesh
from compiler.passes.optimizer_step import shared_weights, step_program
from compiler.pipeline import rank_passes, shared_prefix
from compiler.pipeline import run as run_passes
from dsl.load import Description
from dsl.source import Source
from runtime import functional as F
from tests.interpret import State, run
from tests.interpret.comm import Rank, World


def uncut(of: Description) -> Program:
    """The train program where the passes of ranks begin to differ."""
    return shared_prefix("train", lower(of), of)


def layout(mesh: Mesh, of: Description, *cuts: int, schedule: str = "1f1b") -> Layout:
    """Stages that end before the units in `cuts`; without any, as even as it goes."""
    found = units(uncut(of).main)
    n = len(placement(schedule, mesh.pipeline)[0])
    cuts = cuts or tuple(len(found) * i // n for i in range(1, n))
    ends = [0, *cuts, len(found)]
    stages = tuple(Stage(i, found[ends[i] : ends[i + 1]]) for i in range(n))
    return Layout(mesh, schedule, stages, 1, 1, 1)


def rank_programs(of: Description, where: Layout, name: str = "train") -> list[Program]:
    """The program of each stage."""
    shared = shared_prefix(name, lower(of), of)
    programs = []
    for stage in where.stages:
        passes = rank_passes(name, where, stage.index)
        *_, step = run_passes(name, shared, passes, of)
        programs.append(step.program)
    return programs


def end_of(of: Description, where: Layout, stage: int, program: Program) -> Program:
    """The program that ends a step on the ranks of a stage; it is sound, and reads back."""
    end = step_program(program, where, stage, shared_weights(uncut(of), where))
    verify(end)
    assert not spans_missing(end)
    text = print_program(end)
    assert print_program(parse_program(Source("step.graph", text))) == text
    return end


def share(value: Value, tensor: Tensor, rank: Rank) -> Tensor:
    """What one rank has of an argument: its own sequences."""
    mesh = rank.world.mesh
    spread = any(dim.axes for dim in value.type.dims)
    here = rank.place.replica * mesh.expert + rank.place.expert
    return tensor.chunk(mesh.data)[here] if spread else tensor


def counts(program: Program, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The arguments that count labels, of all micro-batches."""
    return {
        name: sum((F.count_labels(one[labels]).double() for one in batches), torch.zeros(()))
        for name, labels in program.counts.items()
    }


def run_ranks(
    programs: list[Program],
    mesh: Mesh,
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    graph: str | None = None,
    dtype: torch.dtype | None = torch.float64,
    ends: Sequence[Program | None] = (),
) -> tuple[World, dict[str, Tensor]]:
    """The results of all ranks as one: summed where they are terms of a sum, joined elsewhere."""
    world = World(mesh)
    ends = ends or [None] * len(programs)

    def one(rank: Rank) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
        program, state = programs[rank.place.pipeline], State()
        called = program.graphs[graph or program.root]
        here, crosses = rank.place.pipeline, program.boundary
        given = {**inputs, **counts(program, [inputs])}
        own = {v.name: share(v, given[v.name], rank) for v in called.args if v.name in given}
        own |= {name: rank.receive(here - 1) for name in crosses.received}
        results = run(program, own, weights, graph=graph, rank=rank, state=state, dtype=dtype)
        by_name = dict(zip(called.result_names, results, strict=True))
        for name in crosses.sent:
            rank.send(here + 1, by_name[name])
        grads, renewed = gradients(program, weights, state, rank), dict(weights)
        end = ends[rank.place.pipeline]
        if end is not None:
            run(end, {}, renewed, rank=rank, state=state, dtype=dtype)
            factor = {"factor": torch.ones((), dtype=dtype)}
            run(end, factor, renewed, graph=end.update, rank=rank, state=state, dtype=dtype)
        return results, grads, {n: w for n, w in renewed.items() if w is not weights[n]}

    outcomes = world.run(one)
    whole: dict[str, Tensor] = {}
    for _, grads, renewed in outcomes:
        for name, weight in renewed.items():
            # Whoever holds a weight has the same new values.
            assert torch.equal(whole.setdefault(f"new {name}", weight), weight), name
        for name, grad in grads.items():
            key = f"gradient of {name}"
            whole[key] = whole[key] + grad if key in whole else grad
    for stage, program in enumerate(programs):
        group = world.ranks[stage * mesh.data].group(BOTH)
        called = program.graphs[graph or program.root]
        join(called, program.boundary.sent, [outcomes[rank][0] for rank in group], whole)
    return world, whole


def join(
    graph: Graph, sent: Collection[str], found: Sequence[Sequence[Tensor]], whole: dict[str, Tensor]
) -> None:
    """Adds to `whole` what the ranks of a stage found, but for what they sent to the next one."""
    for (name, value), parts in zip(named(graph).items(), zip(*found, strict=True), strict=True):
        if name in sent:
            continue
        if value.type.partial:
            part = torch.stack(parts).sum(0)
        else:
            part = torch.cat(parts) if value.type.axes else parts[0]
            assert value.type.axes or all(torch.equal(p, part) for p in parts)
        if name in whole:
            stacked = name.startswith("load")
            part = torch.cat([whole[name], part]) if stacked else whole[name] + part
        whole[name] = part


BOTH = ("replica", "expert")


def gradients(
    program: Program, weights: Mapping[str, Tensor], state: State, rank: Rank | None = None
) -> dict[str, Tensor]:
    """What the backward graph accumulates for the gradient 1 of the loss; none without one."""
    if program.backward:
        backward, crosses = program.graphs[program.backward], program.backward_boundary
        seeds = {v.name: torch.ones((), dtype=torch.float64) for v in backward.args}
        if rank is not None:
            here = rank.place.pipeline
            seeds |= {name: rank.receive(here + 1) for name in crosses.received}
        options: Any = {"rank": rank, "state": state, "dtype": torch.float64}
        results = run(program, seeds, weights, graph=backward.name, **options)
        for name, result in zip(backward.result_names, results, strict=True):
            if rank is not None and name in crosses.sent:
                rank.send(here - 1, result)
        if program.weights:
            run(program, {}, weights, graph=program.weights, **options)
    return state.grads


def named(graph: Graph) -> dict[str, Value]:
    """Results by name; those of the same name are told apart by how they are shaped."""
    found: dict[str, Value] = {}
    for name, value in zip(graph.result_names, graph.results, strict=True):
        stacked = any(dim.name == "layer" for dim in value.type.dims)
        key = f"{name}_of_layers" if stacked else name
        while key in found:
            key += "'"
        found[key] = value
    return found


MESHES = {
    "2 nodes x 2 ranks": Mesh(1, 1, 4, 2),
    "2 replicas": Mesh(1, 2, 2, 2),
    "replicas only": Mesh(1, 2, 1, 2),
    "4 nodes": Mesh(1, 1, 4, 1),
    "3 stages": Mesh(3, 1, 1, 1),
    "2 stages x 2 replicas x 2 experts": Mesh(2, 2, 2, 2),
}
