"""Which graphs are one class: those whose code differs in nothing but sizes of weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from backends.torch.names import class_name
from compiler.graph.core import Graph


@dataclass(frozen=True)
class Class:
    """A generated class: the graph that it is written from, and its arguments with their values.

    `arguments` has for each graph of the class the sizes by name of dimension.
    """

    graph: str
    arguments: Mapping[str, Mapping[str, int]]

    @property
    def parameters(self) -> Sequence[str]:
        """The names of the arguments of the constructor."""
        return tuple(self.arguments[self.graph])


def joined(
    classes: Sequence[Class], graph: Graph, graphs: Mapping[str, Graph], code: Code
) -> list[Class]:
    """The classes with one more graph: in the first that can write its code, or in a new one.

    `code` gives what a class with some arguments would be, written from a graph.
    """
    for i, one in enumerate(classes):
        sizes = _differing(graphs[one.graph], graph)
        if sizes is None or (len(one.arguments) > 1 and {*sizes} != {*one.parameters}):
            continue
        if code(one.graph, sizes) == code(graph.name, sizes):
            first = {dim: a for dim, (a, _) in sizes.items()}
            own = {dim: b for dim, (_, b) in sizes.items()}
            arguments = {**one.arguments, one.graph: first, graph.name: own}
            return [*classes[:i], Class(one.graph, arguments), *classes[i + 1 :]]
    return [*classes, Class(graph.name, {graph.name: {}})]


Code = Callable[[str, Iterable[str]], object]


def _differing(a: Graph, b: Graph) -> dict[str, tuple[int, int]] | None:
    """Sizes of weights by name of dimension in which graphs of one block differ."""
    if a.span != b.span or [*a.weights] != [*b.weights]:
        return None
    sizes = {
        x.name: (x.size or 0, y.size or 0)
        for one, other in zip(a.weights.values(), b.weights.values(), strict=True)
        for x, y in zip(one.type.dims, other.type.dims, strict=False)
        if x.name == y.name and x.size != y.size and x.name.isidentifier()
    }
    return sizes


def class_names(classes: Sequence[Class]) -> dict[str, str]:
    """By graph: the name of its graph, without numbers where that is unique."""
    short = [re.sub(r"_\d+(?=_|$)", "", one.graph) for one in classes]
    names: dict[str, str] = {}
    for one, name in zip(classes, short, strict=True):
        chosen = class_name(name if short.count(name) == 1 else one.graph)
        names |= dict.fromkeys(one.arguments, chosen)
    return names
