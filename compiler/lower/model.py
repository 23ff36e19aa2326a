"""The front door: a description to a program of graphs, one for each distinct block."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress

from compiler.graph.core import Program
from compiler.lower.bind import BlockRef, BlockRun, Bound, Const, SlotValue
from compiler.lower.contract import ARGUMENTS, argument_problems, output_problems
from compiler.lower.frame import start
from compiler.lower.graph_names import graph_names
from compiler.lower.precision import set_precision
from compiler.lower.settings import silent_losses, unknown_mask, unused_blocks, unused_params
from compiler.lower.state import Lowering, TooLarge
from dsl.load import Description
from dsl.schema import BlockUse
from dsl.source import Span


def lower(description: Description) -> Program:
    """The program that holds everything the model can compute; programs to run are cut from it.

    Raises `DiagnosticError` with every problem: parameters that are missing or unused, requirements
    of blocks, dimensions that do not meet.
    """
    low = Lowering(description)
    with suppress(TooLarge):
        _lower(low)
    low.problems.raise_if_any()
    _rename(low)
    low.problems.extend(set_precision(description, low.program))
    low.problems.raise_if_any()
    return low.program


def _lower(low: Lowering) -> None:
    description, problems = low.description, low.problems
    bound = _outermost(low)
    if bound is not None:
        _lower_outermost(low, bound)
        problems.extend(silent_losses(description, low.program))
    # Something may be unused because of another mistake.
    if not problems:
        problems.extend(unused_blocks(description))
        problems.extend(unknown_mask(description))
    if not problems:
        problems.extend(unused_params(description, low.binder.used))


def _outermost(low: Lowering) -> Bound | None:
    """The outermost block, with what the spec puts in its slots."""
    description = low.description
    architecture, at = description.spec.architecture, description.span
    layers = tuple(
        BlockRun(_use(description, g.block, g.slots, at("architecture", "layers", i)), g.repeat)
        for i, g in enumerate(architecture.layers)
    )
    slots: dict[str, SlotValue] = {"layers": layers, "mtp": ()}
    mtp = architecture.mtp
    if mtp.depth:
        ref = _use(description, mtp.block, mtp.slots, at("architecture", "mtp"))
        slots["mtp"] = (BlockRun(ref, mtp.depth),)
    ref = _use(description, architecture.block, {}, at("architecture", "block"))
    mask = Const(description.spec.train.document_mask, at("train", "document_mask"))
    asked = any(p.name.value == "document_mask" for p in ref.block.params)
    return low.binder.bind(ref, {"document_mask": mask} if asked else {}, slots)


def _use(
    description: Description, use: BlockUse, slots: Mapping[str, BlockUse], span: Span
) -> BlockRef:
    arguments = {n: Const(v.value, _written(use, n, v.span)) for n, v in use.arguments.items()}
    inner = {name: _use(description, s, {}, s.span or span) for name, s in slots.items()}
    return BlockRef(description.blocks[use.name], use.span or span, arguments, inner)


def _lower_outermost(low: Lowering, bound: Bound) -> None:
    block = bound.block
    name = low.program.root = block.name.value
    low.bounds[name] = bound
    types = [low.type(a.type, bound, None) for a in block.arguments]
    low.problems.extend(argument_problems(block, types))
    arguments = [a.name.value for a in block.arguments]
    types = [ARGUMENTS.get(a, t) for a, t in zip(arguments, types, strict=True)]
    frame = start(low, name, bound, types)
    frame.run()
    if frame.returns is not None:
        low.problems.error(
            "E238",
            "the outermost block of a model has outputs and returns nothing",
            frame.returns.span,
            "is not used",
            help="write `output logits = ..`",
        )
    if not low.problems:
        low.problems.extend(output_problems(block, frame.builder.ops, frame.outputs))
    graph = frame.finish([v for _, v in frame.outputs], [n.value for n, _ in frame.outputs])
    low.program.graphs[name] = graph


def _rename(low: Lowering) -> None:
    """Graphs are called by their block; the differing number or slot is added where it must."""
    final = graph_names(low.bounds)
    graphs = {}
    # Callees stand before callers, the root last.
    for old, graph in low.program.graphs.items():
        graph.name = final[old]
        graphs[graph.name] = graph
        for op in graph.walk():
            if op.callee:
                op.attrs["callee"] = final[op.callee]
    low.program.graphs = graphs


def _written(use: BlockUse, name: str, value: Span) -> Span:
    """The place of `name=value` in the use of a block."""
    if use.span is not None and use.span.source is value.source:
        before = value.source.text[use.span.start : value.start]
        if found := re.search(rf"\b{name}\s*=\s*$", before):
            return value.source.span(use.span.start + found.start(), value.end)
    return value
