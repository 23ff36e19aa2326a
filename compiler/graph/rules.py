"""What holds for an operator, a name or a dimension by itself, regardless of what is around it.

Each `need_..` raises `Broken` where it does not hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache

from compiler.graph.core import Attr, Op
from compiler.graph.types import BYTES, MESH_AXES, RUNTIME_DIMS, Dim, Type
from compiler.ops import Operator

SYMBOL = re.compile(r"([A-Za-z0-9_]+|\*)(\.([A-Za-z0-9_]+|\*))*")
_DIM = re.compile(r"[A-Za-z0-9_]+([*+][A-Za-z0-9_]+)*")
_MAX_INT = 2**63


class Broken(Exception):
    """An invariant that does not hold for the operator, or the graph, at hand."""

    def __init__(self, code: str, reason: str, help: str = "") -> None:
        super().__init__(reason)
        self.code, self.reason, self.help = code, reason, help


def no_end(end: str) -> None:
    """Raises `Broken`: a list of operators is empty, where at least `end` belongs."""
    raise Broken("E514", f"there is no `{end}`")


def is_identifier(name: str) -> bool:
    """Whether a name is one of a value, a graph or a cache: letters, digits and `_`."""
    return name.isascii() and name.isidentifier()


def need_symbol(name: str) -> None:
    """A name of a weight or a scope: words between dots, some of them `*`."""
    if not SYMBOL.fullmatch(name):
        raise Broken("E515", f"{name!r} is no name of a weight: words between dots", "rename it")


@cache
def need_type(type: Type) -> None:
    """A known element type, and dimensions and axes that can be."""
    if type.dtype not in BYTES:
        raise Broken("E513", f"there is no element type {type.dtype}")
    for dim in type.dims:
        need_dim(dim)
    need_axes(type.partial)


def need_dim(dim: Dim) -> None:
    """A size of at least 1, or the name of a run-time dimension, which may lack some items."""
    if not _DIM.fullmatch(dim.name):
        raise Broken("E513", f"{dim.name!r} is no name of a dimension")
    if dim.size is None and dim.name not in RUNTIME_DIMS:
        raise Broken("E513", f"dimension {dim.name} has no size")
    need_axes(dim.axes)
    if dim.offset < 0 or (dim.size is not None and (dim.size < 1 or dim.offset)):
        raise Broken("E513", f"dimension {dim} has an impossible size")


def need_axes(axes: tuple[str, ...]) -> None:
    """Axes of the mesh of ranks, each once, in the order of `MESH_AXES`."""
    if axes != tuple(axis for axis in MESH_AXES if axis in axes):
        known = ", ".join(MESH_AXES)
        raise Broken(
            "E513", f"spread over {', '.join(axes)}; a mesh has the axes {known}, in order"
        )


def need_counts(op: Op, operator: type[Operator]) -> None:
    """As many operands, weights and regions as the kind of operator declares."""
    wanted, weights = len(operator.operands), len(op.symbols)
    if not operator.variadic and len(op.operands) != wanted:
        words = ", ".join(operator.operands) or "none"
        raise Broken("E512", f"takes {wanted} operands ({words}), got {len(op.operands)}")
    least, most = _weights_taken(operator.symbols)
    if not least <= weights <= most:
        words = ", ".join(operator.symbols) or "none"
        raise Broken("E512", f"takes the weights ({words}), got {weights}")
    if weights > 1 and len(set(op.symbols)) < weights:
        raise Broken("E512", "takes a weight twice")
    if len(op.regions) != operator.regions:
        raise Broken("E512", f"takes {operator.regions} regions, got {len(op.regions)}")


@cache
def _weights_taken(symbols: tuple[str, ...]) -> tuple[int, float]:
    """The least and the most that an operator takes: `name?` may be left out, `name*` is many."""
    least = sum(not name.endswith("?") for name in symbols)
    return least, math.inf if any(name.endswith("*") for name in symbols) else len(symbols)


def need_attributes(attrs: Mapping[str, Attr], wanted: Mapping[str, type]) -> None:
    """Exactly the attributes that a kind of operator declares, each of its type; one whose name
    ends in `?` may be left out."""
    for name, value in attrs.items():
        declared = wanted.get(name) or wanted.get(f"{name}?")
        if declared is None:
            raise Broken("E512", f"knows no attribute {name}")
        if type(value) is not declared:
            raise Broken("E512", f"{name} is {value!r}, and not {declared.__name__}")
        if not _is_attribute(value):
            raise Broken("E512", f"{name} is {value!r}, which a graph cannot hold")
    for name in wanted:
        if name not in attrs and not name.endswith("?"):
            raise Broken("E512", f"attribute {name} is missing")


def _is_attribute(value: object) -> bool:
    """Whether the text of a graph can hold a value."""
    match value:
        case tuple():
            return all(_is_attribute(item) for item in value)
        case int():
            return abs(value) < _MAX_INT
        case float():
            return math.isfinite(value)
        case _:
            return isinstance(value, str)
