"""What the forward pass saves for the backward pass, in bytes for one token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from compiler.analysis.costs import Costs, known_sizes
from compiler.graph.core import Graph, Program
from compiler.graph.types import Type
from compiler.ops.pointwise import POINTWISE

SEQUENCE = 4096  # tokens of the sequence over which is averaged


def sizes_of(graph: Graph, program: Program) -> dict[str, int]:
    """Run-time sizes of a graph for one sequence of `SEQUENCE` tokens."""
    return known_sizes(graph, program, {"batch": 1, "seq": SEQUENCE, "context": SEQUENCE})


def token_bytes(type: Type, sizes: Mapping[str, int]) -> Fraction:
    """Bytes for one token; none where the size does not depend on the tokens."""
    if all(d.size is not None for d in type.dims):
        return Fraction(0)
    return Fraction(type.bytes(sizes), SEQUENCE)


def saved_bytes_per_token(program: Program) -> Fraction:
    """What all graphs of a program save for one token."""
    runs = Costs(program).runs()
    return sum(
        (
            runs[name] * token_bytes(value.type, sizes_of(graph, program))
            for name, graph in program.graphs.items()
            if name in program.derivatives
            for value in graph.saved
        ),
        Fraction(0),
    )


# Operators that derivatives are never made of: in a backward graph they are recomputed.
_RECOMPUTED = ("rms_norm", "rms_norm_quantize", "add_rms_norm", "layer_norm", "swiglu",
          "swiglu_quantize", *(f.kind for f in POINTWISE), "softmax", "linear",
          "grouped_linear", "fp8_linear", "fp8_grouped_linear")  # fmt: skip


@dataclass(frozen=True)
class SavedBlock:
    """What one block saves for its backward pass: bytes of one token in each of `runs` runs.

    `recomputed` says how many operators of each kind run a second time instead.
    """

    block: str
    runs: int
    bytes: int
    recomputed: Mapping[str, int]


def saved_blocks(program: Program) -> list[SavedBlock]:
    """Every graph of a program that has a backward graph and saves something for each token."""
    runs = Costs(program).runs()
    found = []
    for name, graph in program.graphs.items():
        backward = program.backward_of(name)
        if backward is None:
            continue
        sizes = sizes_of(graph, program)
        total = sum((token_bytes(v.type, sizes) for v in graph.saved), Fraction(0))
        if total:
            recomputed = Counter(op.kind for op in backward.walk() if op.kind in _RECOMPUTED)
            counts = dict(sorted(recomputed.items()))
            found.append(SavedBlock(name, runs[name], round(total), counts))
    return found
