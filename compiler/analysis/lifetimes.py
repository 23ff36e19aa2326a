"""When the values of a graph live, how much memory they take at most, and which can share it.

Operators run in program order. A value lives from the operator that makes it to the last one that
reads it, or that reads a view of it; results and what is saved for the backward pass to the end.
Arguments and weights lie elsewhere: they are the caller's, and the module's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from compiler.graph.build import site_of
from compiler.graph.core import Graph, Op, Program, Value
from compiler.graph.text import print_op
from compiler.ops import OPS, Site


@dataclass(eq=False, slots=True)
class Life:
    """A value in memory, from operator `start` to operator `end`, both counted in."""

    value: Value
    bytes: int
    start: int
    end: int


@dataclass(eq=False, slots=True)
class Buffer:
    """Memory for values that do not live at the same time."""

    bytes: int
    lives: list[Life] = field(default_factory=list)


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one call of a graph. `peak` is at operator `at`, with what it calls."""

    graph: Graph
    lives: tuple[Life, ...]
    buffers: tuple[Buffer, ...]
    peak: int
    at: Op | None

    @property
    def shared(self) -> int:
        """Bytes of all buffers, without those of called graphs."""
        return sum(buffer.bytes for buffer in self.buffers)

    def __str__(self) -> str:
        width = max((len(str(life.value)) for life in self.lives), default=0)
        number = {life: i for i, b in enumerate(self.buffers) for life in b.lives}
        lines = [
            f"{x.value!s:{width}} {x.start:4}..{x.end:<4} {x.bytes:12,} bytes  buffer {number[x]}\n"
            for x in self.lives
        ]
        each = sum(life.bytes for life in self.lives)
        at = f" at {print_op(self.at)}" if self.at else ""
        return (
            f"memory of @{self.graph.name}\n{''.join(lines)}"
            f"each value by itself {each:,} bytes, in {len(self.buffers)} buffers "
            f"{self.shared:,}; peak {self.peak:,}{at}\n"
        )


def plan_memory(program: Program, name: str, sizes: Mapping[str, int]) -> MemoryPlan:
    """Lifetimes, peak and buffers of a graph, given the sizes of run-time dimensions."""
    graph = program.graphs[name]
    walk = _Walk(program, graph, dict(sizes))
    walk.run()
    lives = tuple(walk.lives.values())
    peak, at = 0, None
    for i, op in enumerate(walk.order):
        now = sum(x.bytes for x in lives if x.start <= i <= x.end) + walk.inside.get(i, 0)
        if now > peak:
            peak, at = now, op
    return MemoryPlan(graph, lives, tuple(color(lives)), peak, at)


def color(lives: Sequence[Life]) -> list[Buffer]:
    """Buffers for values, each the smallest free one that is large enough, or a new one.

    Interval colouring: with values of equal size as many buffers as ever live at once.
    """
    buffers: list[Buffer] = []
    for life in sorted(lives, key=lambda x: x.start):
        free = [b for b in buffers if b.lives[-1].end < life.start and b.bytes >= life.bytes]
        best = min(free, key=lambda b: b.bytes, default=None)
        if best is None:
            best = Buffer(life.bytes)
            buffers.append(best)
        best.lives.append(life)
    return buffers


class _Walk:
    """The operators of a graph in the order in which they run, layers of a loop once."""

    def __init__(self, program: Program, graph: Graph, sizes: dict[str, int]) -> None:
        self.program, self.graph, self.sizes = program, graph, sizes
        self.order: list[Op] = []
        self.lives: dict[Value, Life] = {}
        self.memory: dict[Value, Value] = {}  # where a view lies
        self.inside: dict[int, int] = {}  # what a call takes besides

    def run(self) -> None:
        self._ops(self.graph.ops)
        for value in (*self.graph.results, *self.graph.saved):
            self._read(value, len(self.order) - 1)

    def _ops(self, ops: Sequence[Op]) -> None:
        for op in ops:
            at = len(self.order)
            self.order.append(op)
            for value in op.operands:
                self._read(value, at)
            self.sizes |= OPS[op.kind].sizes(self._site(op), self.sizes)
            if op.regions:
                self._region(op)
            elif OPS[op.kind].view and not op.operands:
                pass  # a weight lies elsewhere
            elif OPS[op.kind].view:
                self.memory.update((v, self._where(op.operands[0])) for v in op.results)
            else:
                self._make(op.results, at)
            if op.callee:
                callee = plan_memory(self.program, op.callee, self.sizes)
                own = sum(v.type.bytes(self.sizes) for v in op.results)
                self.inside[at] = max(0, callee.peak - own)

    def _region(self, op: Op) -> None:
        """What a loop carries from one turn to the next changes places with what it is made of."""
        (region,) = op.regions
        first, before, outside = len(self.order), set(self.lives), set(self.memory)
        carried = len(op.operands) if op.kind.startswith("repeat") else 0
        self._make(op.results[carried:], len(self.order) - 1)
        for arg, operand in zip(region.args, op.operands, strict=False):
            self.memory[arg] = self._where(operand)
        self._make([a for a in region.args if a not in self.memory], len(self.order) - 1)
        self._ops(region.ops)
        end = len(self.order) - 1
        for inner in self.order[first:]:
            for value in inner.operands:
                # The next turn reads again what comes from outside.
                if value in before or (value in outside and self._where(value) in before):
                    self._read(value, end)
        for result, value in zip(op.results[:carried], region.yielded, strict=False):
            self.memory[result] = self._where(value)

    def _site(self, op: Op) -> Site:
        return site_of(op, self.graph, self.program.graphs)

    def _where(self, value: Value) -> Value:
        return self.memory.get(value, value)

    def _read(self, value: Value, at: int) -> None:
        life = self.lives.get(self._where(value))
        if life is not None:
            life.end = max(life.end, at)

    def _make(self, values: Sequence[Value], at: int) -> None:
        for value in values:
            self.lives[value] = Life(value, value.type.bytes(self.sizes), at, at)
