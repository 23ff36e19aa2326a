"""Running a graph: its values, its scope, and the effects that outlast it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compiler.graph.core import Graph, Op, Program, Value
from compiler.graph.types import FLOATS
from tests.interpret.comm import Rank
from tests.interpret.operators import RUN

DTYPES = {
    "u8": torch.uint8,
    "f8e4m3": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "i32": torch.int32,
    "i64": torch.int64,
    "bool": torch.bool,
}


@dataclass
class State:
    """What operators with an effect read and write, by full name: scope, graph and entry."""

    cache: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[str, Sequence[Tensor]] = field(default_factory=dict)
    grads: dict[str, Tensor] = field(default_factory=dict)


def run(
    program: Program,
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    graph: str | None = None,
    state: State | None = None,
    dtype: torch.dtype | None = None,
    rank: Rank | None = None,
) -> list[Tensor]:
    """The results of `graph` (of the root, if None), in the order of its `result_names`.

    `inputs` are its arguments by name; `weights` have published names, seen from that graph. The
    program of one `rank` of several takes from them what is that rank's.
    """
    called = program.graphs[graph or program.root]
    frame = Frame(program, called, weights, state or State(), dtype, rank=rank)
    return frame.run([inputs[v.name] for v in called.args])


@dataclass
class Frame:
    """One graph while it runs: its scope, its values so far, the layers and expert at hand."""

    program: Program
    graph: Graph
    parameters: Mapping[str, Tensor]
    state: State
    dtype: torch.dtype | None = None
    prefix: str = ""  # of names of weights: "" or the scope and a point
    layers: tuple[int, ...] = ()
    expert: int | None = None
    rank: Rank | None = None
    values: dict[Value, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def run(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        return self.region(self.graph.args, self.graph.ops, arguments)

    def region(
        self, args: Sequence[Value], ops: Sequence[Op], arguments: Sequence[Tensor]
    ) -> list[Tensor]:
        """Runs a list of operators that ends with `yield` or `return`; what that one reads."""
        self.set(args, arguments)
        for op in ops[:-1]:
            made = RUN[op.kind](self, op, *(self.values[v] for v in op.operands))
            self.set(op.results, [made] if isinstance(made, Tensor) else made)
        return [self.values[v] for v in ops[-1].operands]

    def set(self, values: Sequence[Value], tensors: Sequence[Tensor]) -> None:
        for value, tensor in zip(values, tensors, strict=True):
            if self.dtype and value.type.dtype in FLOATS:
                tensor = tensor.to(self.dtype)  # tables and counts are always made in float32
            self.check(value, tensor)
            self.values[value] = tensor

    def check(self, value: Value, tensor: Tensor) -> None:
        """That the recorded type tells the truth."""
        dims, shape = value.type.dims, tuple(tensor.shape)
        for dim, size in zip(dims, shape, strict=False):
            if dim.name in ("batch", "seq"):
                self.sizes.setdefault(dim.name, size + dim.offset)
        known = {d.name: s + d.offset for d, s in zip(dims, shape, strict=False)}
        sizes = {**known, **self.sizes}
        same = len(dims) == len(shape) and all(
            d.at(sizes) == size for d, size in zip(dims, shape, strict=True)
        )
        if not same or tensor.dtype != self.torch_dtype(value.type.dtype):
            made = f"{tensor.dtype} {list(shape)}"
            raise AssertionError(f"{self.graph.name}: {value} : {value.type} is {made}")

    def torch_dtype(self, name: str) -> torch.dtype:
        return self.dtype if self.dtype and name in FLOATS else DTYPES[name]

    def names(self, symbol: str) -> list[str]:
        """Published names of a weight: one for each expert, unless one of them is at hand."""
        weight = self.graph.weights[symbol]
        experts = range(weight.stack) if self.expert is None else [self.expert]
        first = self.rank.place.expert * weight.stack if self.rank and weight.axis else 0
        return [self.prefix + symbol.replace("*", str(first + expert)) for expert in experts]

    def weight(self, symbol: str) -> Tensor:
        """A weight; that of the expert at hand, or outside of an expert all of them, stacked."""
        parts = [self.parameters[name] for name in self.names(symbol)]
        return torch.stack(parts) if "*" in symbol and self.expert is None else parts[0]

    def scope(self, op: Op) -> str:
        """The prefix of names under a call: each `*` is the layer of a repeat around it."""
        scope = op.text("scope")
        for layer in self.layers:
            scope = scope.replace("*", str(layer), 1)
        return f"{self.prefix}{scope}." if scope else self.prefix
