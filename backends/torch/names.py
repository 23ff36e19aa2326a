"""Python names for values of a graph: the names of the equations, used again when free."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Callable, Iterator, Sequence

from compiler.graph.core import Graph, Op, Value

# Names that generated code uses for itself: in methods, and for classes.
_PYTHON = frozenset(keyword.kwlist) | frozenset(dir(builtins))
RESERVED = _PYTHON | {
    "self", "E", "F", "G", "fp8", "nn", "torch", "Tensor", "config", "p", "cache", "saved", "grads",
    "layer", "expert", "chosen", "Loss", "Output", "Gradients", "differentiable", "rope_table",
}  # fmt: skip
_GLOBALS = _PYTHON | {
    "E", "F", "G", "fp8", "nn", "torch", "Tensor", "config", "p", "Loss", "Output", "Block",
    "Cache", "HF_CONFIG", "Joined", "LanguageModel", "Model", "Stack", "Tensors", "annotations",
    "normal", "ones", "zeros", "SOURCE", "Gradients", "Grads", "Saved", "Unit", "differentiable",
    "partial",
    "rope_table",
}  # fmt: skip


# What distinguishes values of one name in a graph.
_NUMBER = re.compile(r"_\d+(?=_|$)")


def identifier(name: str) -> str:
    """A name for a value that shadows nothing which generated code needs."""
    return _apart(name, RESERVED)


def class_name(graph: str) -> str:
    """The class that is made of a graph."""
    return _apart(graph, _GLOBALS)


def _apart(name: str, reserved: frozenset[str]) -> str:
    """`name`, or with one more `_` where it is reserved; different names stay different."""
    return f"{name}_" if name.rstrip("_") in reserved else name


class Names:
    """A Python name for each value of a graph, given out in program order.

    A value takes the name of its equation, so that `x = x + ..` reads as in the block. While an
    earlier value of that name is still needed it is called by its role, and by a number where that
    is taken, too.
    """

    def __init__(self, graph: Graph) -> None:
        self._last_use: dict[Value, int] = {}
        self._done: dict[Op, int] = {}
        self._clock = 0
        self._measure(graph.ops)
        self._holder: dict[str, Value] = {}
        self._name: dict[Value, str] = {}
        self._kept: set[str] = set()
        bases = [identifier(_NUMBER.sub("", value.name)) for value in graph.args]
        for value, base in zip(graph.args, bases, strict=True):
            self.share(value, base if bases.count(base) == 1 else identifier(value.name))

    def _measure(self, ops: Sequence[Op]) -> None:
        """When each operator is done, and the last time at which each value is read."""
        for op in ops:
            inside: set[Value] = set()
            for region in op.regions:
                self._measure(region.ops)
                inside |= _outer_values(op)
            self._clock += 1
            self._done[op] = self._clock
            # What a region reads of the outside is read again in its next round.
            for value in [*op.operands, *inside]:
                self._last_use[value] = self._clock

    def __getitem__(self, value: Value) -> str:
        return self._name[value]

    def share(self, value: Value, name: str) -> str:
        """Lets `value` bear `name`, whoever had it: arguments, and what a loop carries."""
        self._name[value] = name
        self._holder[name] = value
        return name

    def give(self, value: Value, op: Op, *, beside_operands: bool = False) -> str:
        """A name for a result of `op`. The names of operands that are read last here are free.

        Not so `beside_operands`, where the result exists before the operands are read.
        """
        base = identifier(_NUMBER.sub("", value.name))
        now = self._done[op] - beside_operands

        def free(name: str) -> bool:
            holder = self._holder.get(name)
            if name in self._kept or holder in op.results:
                return False
            return holder is None or self._last_use.get(holder, 0) <= now

        names = (base, *(identifier(name) for name in _roles(base, value, op)))
        return self.share(value, next((n for n in names if free(n)), _first(base, free)))

    def keep(self, base: str) -> str:
        """A name for something that is no value of the graph; it is never used again."""
        base = identifier(base)
        name = _first(base, lambda n: n not in self._holder and n not in self._kept)
        self._kept.add(name)
        return name


# What the result of an operator is called after the name of its equation, where that is taken.
_ROLES = {
    "rms_norm": "normed",
    "flatten": "flat",
    "unflatten": "heads",
    "concat": "joined",
    "rotate": "rotated",
    "rotate_halves": "rotated",
    "cast": "cast",
    "linear": "projected",
    "add": "sum",
    "sum": "total",
    "drop_last": "shortened",
}


def _roles(base: str, value: Value, op: Op) -> Iterator[str]:
    """Other names for a result: by what the operator does."""
    if base.startswith("d_"):  # a gradient that another is added to: by the way it came
        yield f"{base}_{op.kind.removesuffix('_grad').removesuffix('_input')}"
    elif op.kind in ("add", "add_rms_norm") and value is op.results[0] and len(value.type.dims) > 1:
        yield from ("residual", "out")
    elif op.kind in _ROLES:
        yield f"{base}_{_ROLES[op.kind]}"


def _first(base: str, free: Callable[[str], bool]) -> str:
    """`base`, or `base_2`, `base_3`, .. : the first that is free."""
    name, n = base, 1
    while not free(name):
        n += 1
        name = f"{base}_{n}"
    return name


def _outer_values(op: Op) -> set[Value]:
    """Values that the regions of an operator read from outside."""
    made: set[Value] = set()
    read: set[Value] = set()

    def visit(ops: Sequence[Op]) -> None:
        for o in ops:
            read.update(o.operands)
            made.update(o.results)
            for region in o.regions:
                made.update(region.args)
                visit(region.ops)

    for region in op.regions:
        made.update(region.args)
        visit(region.ops)
    return read - made
