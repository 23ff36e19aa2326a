"""What the forward pass keeps for the backward pass, in bytes for one token."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from compiler.analysis.costs import Costs, known_sizes
from compiler.graph.core import Graph, Program
from compiler.graph.types import Type

SEQUENCE = 4096  # tokens of the sequence over which is averaged


def sizes_of(graph: Graph, program: Program) -> dict[str, int]:
    """Run-time sizes of a graph for one sequence of `SEQUENCE` tokens."""
    return known_sizes(graph, program, {"batch": 1, "seq": SEQUENCE, "context": SEQUENCE})


def token_bytes(type: Type, sizes: Mapping[str, int]) -> Fraction:
    """Bytes for one token; none where the size does not depend on the tokens."""
    if all(d.size is not None for d in type.dims):
        return Fraction(0)
    return Fraction(type.bytes(sizes), SEQUENCE)


def kept_bytes_per_token(program: Program) -> Fraction:
    """What all graphs of a program keep for one token."""
    runs = Costs(program).runs()
    return sum(
        (
            runs[name] * token_bytes(type, sizes_of(graph, program))
            for name, graph in program.graphs.items()
            if program.backward_of(name)
            for type in graph.kept.values()
        ),
        Fraction(0),
    )
