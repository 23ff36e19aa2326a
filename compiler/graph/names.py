"""Names of weights in a checkpoint, without writing out every layer and every expert.

A graph names its own weights and, by the scopes of its calls, those of other graphs. A `*` is the
index of a layer or an expert and is kept as a range: `model.layers.3..60.mlp`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from compiler.graph.core import REPEATS, Graph, Op

Range = tuple[int, int]  # first and last
NamePart = str | Range

_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


@dataclass(frozen=True, slots=True)
class PublishedName:
    """A weight (`op` is None), or everything under the scope of a call, as its graph names it."""

    parts: tuple[NamePart, ...]
    op: Op | None = None

    @property
    def ranges(self) -> tuple[Range, ...]:
        return tuple(p for p in self.parts if not isinstance(p, str))

    def __str__(self) -> str:
        return ".".join(p if isinstance(p, str) else _words(p) for p in self.parts)


def names_of(graph: Graph) -> list[PublishedName]:
    """What a graph names itself: its weights, then the scopes of its calls in order."""
    weights = [PublishedName(parts_of(n, ((0, w.stack - 1),))) for n, w in graph.weights.items()]
    return weights + list(_scopes(graph.ops, ()))


@cache
def parts_of(name: str, stars: tuple[Range, ...] = ()) -> tuple[NamePart, ...]:
    """A dotted name in parts, each `*` replaced by the next range of `stars` while there is one."""
    left = iter(stars)

    def part(text: str) -> NamePart:
        if text == "*":
            return next(left, text)
        return (int(text), int(text)) if _NUMBER.fullmatch(text) else text

    return tuple(part(text) for text in name.split("."))


@cache
def _key(parts: tuple[NamePart, ...]) -> tuple[str, ...]:
    """The parts of a name with every number replaced by `*`."""
    return tuple(p if isinstance(p, str) else "*" for p in parts)


def clashes(names: Sequence[PublishedName]) -> Iterator[tuple[PublishedName, PublishedName]]:
    """Pairs in which one name is the beginning of the other one, or equal to it, for some layer.

    A block is a module and a dotted name a path of modules, so neither may be a part of the other.
    """
    same: dict[tuple[str, ...], list[PublishedName]] = {}
    for name in names:
        if not name.parts:  # a part of the same module, whose weights it shares
            continue
        same.setdefault(_key(name.parts), []).append(name)
    for key, group in same.items():
        group.sort(key=lambda n: n.ranges)
        shorter = [b for n in range(1, len(key)) for b in same.get(key[:n], ())]
        for i, a in enumerate(group):
            for b in group[i + 1 :]:
                if a.ranges and b.ranges[0][0] > a.ranges[0][1]:
                    break  # sorted: those that follow begin after the last layer of `a`
                if _meet(a, b):
                    yield a, b
            yield from ((b, a) for b in shorter if _meet(b, a))


def is_weight(name: str, root: str, names: Mapping[str, Sequence[PublishedName]]) -> bool:
    """Whether a full name is that of a weight, given what each graph names and no clashes."""

    def found(parts: tuple[NamePart, ...], graph: str) -> bool:
        for n in names[graph]:
            if len(n.parts) > len(parts) or not _meet(n, PublishedName(parts)):
                continue
            if n.op is None and len(n.parts) == len(parts):
                return True
            if n.op is not None and found(parts[len(n.parts) :], n.op.callee):
                return True
        return False

    return found(parts_of(name), root)


def _scopes(ops: Sequence[Op], layers: tuple[Range, ...]) -> Iterator[PublishedName]:
    for op in ops:
        if op.callee:
            scope = op.text("scope")
            yield PublishedName(parts_of(scope, layers) if scope else (), op)
        inside = layers
        if op.kind in REPEATS:
            inside = (*layers, (op.layers[0], op.layers[-1]))
        for region in op.regions:
            yield from _scopes(region.ops, inside)


def _meet(a: PublishedName, b: PublishedName) -> bool:
    """Whether two names agree in some layer as far as the shorter one goes."""
    return all(
        x == y if isinstance(x, str) or isinstance(y, str) else x[0] <= y[1] and y[0] <= x[1]
        for x, y in zip(a.parts, b.parts, strict=False)
    )


def _words(part: Range) -> str:
    return str(part[0]) if part[0] == part[1] else f"{part[0]}..{part[1]}"
