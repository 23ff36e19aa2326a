"""Random weights and inputs of a program, from its declared types."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from compiler.graph.core import Graph, Op, Program, Value
from compiler.graph.types import FLOATS, Type
from compiler.ops.base import dims_of
from runtime import functional as F
from tests.interpret.frame import DTYPES, Frame, State

SIZES = {"batch": 2, "seq": 7}
"""Of run-time dimensions, where a test has no wish."""


def random_weights(
    program: Program, seed: int = 0, dtype: torch.dtype | None = None, graph: str | None = None
) -> dict[str, Tensor]:
    """Weights by published name. Values follow from seed and name, whatever else the program holds.

    Results of linears keep about the size of what comes in; vectors vary around one.
    """
    weights: dict[str, Tensor] = {}
    for name, type in _weight_types(program, program.graphs[graph or program.root], ""):
        generator = torch.Generator().manual_seed(_digest(seed, name))
        shape = [d.size or 0 for d in type.dims]
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values = values / shape[-1] ** 0.5 if len(shape) > 1 else 1 + values / 5
        weights[name] = values.to(dtype or DTYPES[type.dtype])
    return weights


def _weight_types(program: Program, graph: Graph, prefix: str) -> Iterator[tuple[str, Type]]:
    for name, weight in graph.weights.items():
        for expert in range(weight.stack):
            yield prefix + name.replace("*", str(expert)), weight.type

    def calls(ops: Sequence[Op], layers: tuple[int, ...]) -> Iterator[tuple[str, Type]]:
        for op in ops:
            if op.kind == "call":
                scope = Frame(program, graph, {}, State(), None, prefix, layers).scope(op)
                yield from _weight_types(program, program.graphs[op.text("callee")], scope)
            layers_of: Sequence[tuple[int, ...]] = [()]
            if op.kind == "repeat":
                first = op.number("start")
                layers_of = [(n,) for n in range(first, first + op.number("count"))]
            for region in op.regions:
                for layer in layers_of:
                    yield from calls(region.ops, (*layers, *layer))

    yield from calls(graph.ops, ())


def random_inputs(
    program: Program,
    sizes: Mapping[str, int] = SIZES,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    graph: str | None = None,
) -> dict[str, Tensor]:
    """Arguments by name. Whole numbers are such as their readers take; some labels are -100.

    Values follow from seed and name.
    """
    inputs = {}
    called = program.graphs[graph or program.root]
    for value in called.args:
        generator = torch.Generator().manual_seed(_digest(seed, value.name))
        shape = [d.at(sizes) for d in value.type.dims]
        if value.type.dtype in FLOATS:
            made = torch.randn(shape, generator=generator, dtype=torch.float64)
            inputs[value.name] = made.to(dtype or DTYPES[value.type.dtype])
            continue
        readers = list(_readers(program, called, value))
        below = min([limit for _, limit in readers], default=8)
        made = torch.randint(below, shape, generator=generator)
        if any(kind == "cross_entropy" for kind, _ in readers):
            made[torch.rand(shape, generator=generator) < 1 / 5] = F.IGNORED_LABEL
        inputs[value.name] = made.to(DTYPES[value.type.dtype])
    return inputs


def _readers(program: Program, graph: Graph, value: Value) -> Iterator[tuple[str, int]]:
    """Operators that read a whole number, however it reaches them, and what it must be below."""
    for op in graph.walk():
        for at, operand in enumerate(op.operands):
            if operand is not value:
                continue
            if op.kind == "call":
                callee = program.graphs[op.text("callee")]
                yield from _readers(program, callee, callee.args[at])
            elif op.kind == "repeat":
                yield from _readers(program, graph, op.regions[0].args[at])
            elif op.kind.startswith("drop_"):
                yield from _readers(program, graph, op.result)
            else:
                yield op.kind, _limit(op, graph)


def _limit(op: Op, graph: Graph) -> int:
    match op.kind:
        case "embedding":
            return graph.weights[op.symbols[0]].type.dims[0].size or 0
        case "cross_entropy":
            return op.operands[0].type.last.size or 0
        case "permute" | "permute_quantized" | "expert_load":
            return dims_of(op.attrs["count"])[0].size or 0
        case "experts":
            return op.number("count")
    return 64  # positions


def _digest(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")
