"""What ranks send each other in one step: messages and bytes, inside nodes and across."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from compiler.graph.core import Graph, Op, Program, walk
from compiler.graph.types import BYTES, Type
from compiler.ops.quantize import runs
from compiler.parallel.layout import Layout, Unit, router_of
from compiler.plan.memory import GRADIENT_BYTES, SCALE_BYTES
from compiler.plan.placement import Placed, buckets

# Why ranks send, in the order in which tables list it.
# What says how many tokens a rank gets, and the number of an expert (`runtime/exchange.py`).
COUNT_BYTES, INDEX_BYTES = 8, 2

PURPOSES = ("dispatch", "combine", "pipeline", "gradients", "parameters")


@dataclass(frozen=True)
class ExpertTraffic:
    """The experts of one block: what a token costs on its way to them and back.

    `dispatch`, `combine` and `gradient` are bytes for a token and destination node: on its way to
    the experts, of what comes back, and of the gradient of that on the same way. `weights` and
    `choices` are those of the weights and the numbers of its experts; `nodes` is the most nodes
    that a token goes to, its own included, and `k` the experts that it goes to.
    """

    block: str
    experts: int
    k: int
    nodes: int
    dispatch: int
    combine: int
    gradient: int
    weights: int
    choices: int

    def ranks(self, inside: int) -> int:
        """To how many ranks a token goes, `inside` of which are on a node."""
        return self.nodes * min(-(-self.k // self.nodes), inside)

    @property
    def ways(self) -> Mapping[str, int]:
        """Bytes of a token there and back, forward and backward together.

        Weights come along, and their gradients go back. Gradients of tokens come back as results
        do: in the model's own element type.
        """
        there = self.dispatch + self.weights + self.choices + self.gradient
        return {"dispatch": there, "combine": 2 * self.combine + self.weights}

    @property
    def row(self) -> int:
        """The most bytes of a token that go together."""
        return max(self.dispatch + self.weights + self.choices, self.combine + self.weights)


@dataclass(frozen=True)
class Sent:
    """What a rank sends in a step, for one purpose; the mean of all that are alike."""

    purpose: str
    messages_inside: int
    bytes_inside: int
    messages_across: int
    bytes_across: int


def exchanges(program: Program, unit: Unit, layout: Layout) -> tuple[ExpertTraffic, ...]:
    """The routed experts inside a unit, in order."""
    main = program.main
    ops = list(walk([main.ops[i] for i in unit.ops]))
    return tuple(_exchanges(program, main, ops, layout))


def _exchanges(
    program: Program, graph: Graph, ops: Sequence[Op], layout: Layout
) -> Iterator[ExpertTraffic]:
    producers = graph.producers()
    for op in ops:
        if op.callee:
            callee = program.graphs[op.callee]
            yield from _exchanges(program, callee, list(callee.walk()), layout)
        elif op.kind == "experts":
            route = op.operands[1]
            experts, k = op.number("count"), route.type.last.size or 0
            nodes = layout.nodes_of_token(router_of(producers, route), k, experts)
            weights = k * BYTES[op.operands[2].type.dtype]
            size = expert_bytes(graph, op)
            yield ExpertTraffic(graph.name, experts, k, nodes, *size, weights, k * INDEX_BYTES)


def expert_bytes(graph: Graph, op: Op) -> tuple[int, int, int]:
    """Bytes of one token on its way to routed experts, of what comes back, and of its gradient."""
    (region,) = op.regions
    # A bias is added to as many rows as there are: what it is made of is read, too.
    readers = [o for o in region.ops if o.kind == "parameter" or region.args[0] in o.operands]
    makers = [o for o in region.ops if region.yielded[0] in o.results]
    x, y = op.operands[0].type, op.result.type
    return (
        token_bytes(x, fp8=_in_fp8(graph, readers)),
        token_bytes(y, fp8=False),
        token_bytes(y, fp8=_in_fp8(graph, makers)),
    )


def _in_fp8(graph: Graph, ops: Sequence[Op]) -> bool:
    """Whether operators are nothing but products in FP8, so that FP8 is all that they need."""
    fp8 = (all(graph.weights[name].fp8 for name in op.symbols) for op in ops)
    return all(op.kind == "linear" for op in ops) and all(fp8)


def token_bytes(tokens: Type, *, fp8: bool) -> int:
    """Bytes of one token [.., hidden] on the wire, with the scales of FP8 tiles of 128."""
    hidden = tokens.last.size or 0
    if not fp8 or tokens.dtype != "bf16":
        return hidden * BYTES[tokens.dtype]
    return hidden + SCALE_BYTES * runs(hidden)


def sent(
    layout: Layout,
    placed: Sequence[Placed],
    around: Mapping[range, tuple[ExpertTraffic, ...]],
    boundary: int,
    tokens: int,
    pipeline: int,
) -> tuple[Sent, ...]:
    """What each rank at `pipeline` sends in a step.

    `around` are the exchanges by the operators of a unit, `boundary` the bytes that a stage hands
    on for a micro-batch of `tokens` tokens.
    """
    own = [one for one in placed if pipeline in one.pipelines]
    found = [
        *_experts(layout, around, tokens, pipeline),
        _handed_on(layout, boundary, pipeline),
        _ring("gradients", layout, own, pipeline, GRADIENT_BYTES),
        _ring("parameters", layout, own, pipeline, None),
    ]
    return tuple(one for one in found if one.messages_inside + one.messages_across)


def _experts(
    layout: Layout, around: Mapping[range, tuple[ExpertTraffic, ...]], tokens: int, pipeline: int
) -> Iterator[Sent]:
    """Dispatch and combine, each forward and once more backward, with evenly spread routes.

    The backward pass dispatches the gradients of what came back, and combines those of the rows.

    A token goes once to each of its nodes, to the rank with the index of its own, and from there
    once to each rank that holds its experts; the way back is the same (report, section 3.2.2).
    Before tokens go forward, ranks say how many.
    """
    mesh = layout.mesh
    if mesh.expert == 1:
        return
    group = mesh.group(0, ("expert",))
    nodes = len({mesh.node(rank) for rank in group})
    inside = mesh.expert // nodes
    times = layout.micro_batches // len(layout.placement)
    units = [u for s in layout.stages_of(pipeline) for u in layout.stages[s].units]
    every = [one for unit in units for one in around[unit.ops]]
    for purpose, counts in (("dispatch", 1), ("combine", 0)):
        near = far = Fraction(0)
        for one in every:
            size = one.ways[purpose]
            far += size * one.nodes * Fraction(nodes - 1, nodes)
            near += size * one.ranks(inside) * Fraction(inside - 1, inside)
        calls = times * len(every)
        yield Sent(
            purpose,
            (2 + counts) * calls * (inside - 1),
            int(times * tokens * near) + counts * calls * COUNT_BYTES * (inside - 1),
            (2 + counts) * calls * (nodes - 1),
            int(times * tokens * far) + counts * calls * COUNT_BYTES * (nodes - 1),
        )


def _handed_on(layout: Layout, boundary: int, pipeline: int) -> Sent:
    """Activations to the next stage, gradients to the one before; under DualPipe both both ways."""
    mesh = layout.mesh
    here = mesh.group(mesh.rank(pipeline, 0, 0), ("replica", "expert"))
    each = layout.micro_batches // len(layout.placement)
    near = far = Fraction(0)
    for neighbour in (pipeline - 1, pipeline + 1):
        if 0 <= neighbour < mesh.pipeline:
            step = (neighbour - pipeline) * mesh.data
            leaving = sum(mesh.node(rank) != mesh.node(rank + step) for rank in here)
            count = each * len(layout.stages_of(pipeline))
            far += Fraction(count * leaving, mesh.data)
            near += Fraction(count * (mesh.data - leaving), mesh.data)
    return Sent("pipeline", int(near), int(near * boundary), int(far), int(far * boundary))


def _ring(
    purpose: str, layout: Layout, placed: Sequence[Placed], pipeline: int, width: int | None
) -> Sent:
    """A reduce-scatter, or an all-gather, over the ranks that hold the same elements.

    Each is a ring through the ranks in order: every rank sends all but one shard, and as many of
    the hops leave a node as there are nodes, if there are several. Without ZeRO the sums of
    gradients go around, too, so that no parameters have to.
    """
    inside = across = messages_inside = messages_across = 0
    rounds = 1 if layout.zero else (2 if purpose == "gradients" else 0)
    for bucket in buckets(placed):
        one, hops = bucket.placed[0], bucket.copies
        group = holders(layout, one.pipelines, one.held.routed, pipeline)
        nodes = len({layout.mesh.node(rank) for rank in group})
        leaving = Fraction(nodes if nodes > 1 else 0, hops)
        messages = rounds * (hops - 1)
        size = messages * bucket.slice * (width or BYTES[one.held.type.dtype])
        across += int(size * leaving)
        inside += size - int(size * leaving)
        messages_across += int(messages * leaving)
        messages_inside += messages - int(messages * leaving)
    return Sent(purpose, messages_inside, inside, messages_across, across)


def holders(
    layout: Layout, pipelines: Sequence[int], routed: bool, pipeline: int
) -> tuple[int, ...]:
    """The ranks that hold the same elements as the first rank at `pipeline`."""
    mesh = layout.mesh
    if pipeline not in pipelines:
        return ()
    axes = ("replica",) if routed else ("replica", "expert")
    return tuple(rank for at in pipelines for rank in mesh.group(mesh.rank(at, 0, 0), axes))
