"""`plan.json`: a plan as plain values, the same for the same inputs."""

from __future__ import annotations

from typing import Any

from compiler.parallel.layout import Layout
from compiler.plan.explain import CONVENTIONS, place
from compiler.plan.memory import Kind
from compiler.plan.placement import Placed
from compiler.plan.plan import Plan, Rank


def record(name: str, plan: Plan) -> dict[str, Any]:
    """All of a plan for `json.dumps`; sizes in bytes, shapes in elements."""
    step = plan.step_seconds()
    return {
        "model": name,
        "fits": plan.fits,
        "cluster": plan.cluster.model_dump(),
        "parallel": plan.parallel.model_dump(),
        "mesh": _mesh(plan.layout),
        "stages": [
            {
                "stage": stage.index,
                "layers": list(stage.layers),
                "pipeline_ranks": list(plan.layout.holders(stage.index)),
                "in_flight": plan.layout.in_flight(stage.index),
            }
            for stage in plan.layout.stages
        ],
        "experts": [
            {
                "block": one.block,
                "experts": one.experts,
                "on_each_rank": one.experts // plan.layout.mesh.expert,
                "experts_of_a_token": one.k,
                "nodes_of_a_token": one.nodes,
                "dispatch_bytes": one.dispatch,
                "combine_bytes": one.combine,
                "gradient_bytes": one.gradient,
            }
            for one in plan.exchanges
        ],
        "step_seconds": None if step is None else round(step, 6),
        "ranks": [_rank(plan, rank) for rank in plan.ranks],
        "weights": [_weight(one) for one in plan.placed],
        "conventions": list(CONVENTIONS),
    }


def _mesh(layout: Layout) -> dict[str, Any]:
    mesh = layout.mesh
    return {
        "pipeline": mesh.pipeline,
        "replicas": mesh.replicas,
        "expert": mesh.expert,
        "ranks": mesh.size,
        "ranks_of_a_node": mesh.node_size,
        "rank": "(pipeline * replicas + replica) * expert + expert_rank",
        "micro_batches": layout.micro_batches,
    }


def _rank(plan: Plan, rank: Rank) -> dict[str, Any]:
    memory, mesh = rank.memory, plan.layout.mesh
    first = mesh.rank(rank.pipeline, 0, 0)
    return {
        "pipeline_rank": rank.pipeline,
        "ranks": [first, first + mesh.data - 1],
        "nodes": [mesh.node(first), mesh.node(first + mesh.data - 1)],
        "stages": list(plan.layout.stages_of(rank.pipeline)),
        "parameters": memory.parameters,
        "memory_bytes": {kind.value: memory.of(kind) for kind in Kind},
        "peak_bytes": memory.peak,
        "largest": [
            {
                "kind": use.kind.value,
                "name": use.name,
                "bytes": use.bytes,
                "line": place(use.span) if use.span else "",
            }
            for use in memory.largest()[:8]
        ],
        "flops": rank.flops.total,
        "fp8_flops": rank.flops.fp8,
        "sent": [
            {
                "purpose": one.purpose,
                "inside": {"messages": one.messages_inside, "bytes": one.bytes_inside},
                "across": {"messages": one.messages_across, "bytes": one.bytes_across},
            }
            for one in rank.sent
        ],
        "seconds": {name: round(value, 6) for name, value in plan.seconds(rank).items()},
    }


def _weight(one: Placed) -> dict[str, Any]:
    return {
        "name": one.name,
        "shape": [d.size or 0 for d in one.held.type.dims],
        "dtype": one.held.type.dtype,
        "parameters": one.elements,
        "pipeline_ranks": list(one.pipelines),
        "on_each_rank": one.on_rank,
        "copies": one.copies,
    }
