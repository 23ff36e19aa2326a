"""Two programs side by side: what was added, removed, changed or moved, block by block.

Blocks are aligned by name, and where only the numbers in it differ, by what is left of the name;
lines by the value, weight or cache that they define, so that a renumbered line is no change.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from enum import StrEnum

from compiler.graph.core import Graph, Op, Program
from compiler.graph.text import (
    print_attributes,
    print_boundary,
    print_derivative,
    print_op,
    print_weight,
)

# Operators that say where something ends, not what is computed.
ENDS = ("yield", "return")


class Mark(StrEnum):
    """What became of a line or a block."""

    SAME = "same"
    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"
    MOVED = "moved"


@dataclass(frozen=True)
class DiffLine:
    """One line of a graph. `key` is what it defines, `inside` the key of the region around it.

    `was` is the text before; of a line that moved to another block, the block that it came from,
    or, where it was removed, the one that it went to. `op` is the operator that the line shows, in
    the graph that it is in.
    """

    key: str
    text: str
    inside: str = ""
    op: Op | None = None
    mark: Mark = Mark.SAME
    was: str = ""


@dataclass(frozen=True)
class Comparison:
    """A block before and after; `lines` of both, in the order of the one after."""

    name: str
    mark: Mark
    lines: tuple[DiffLine, ...]
    before: Graph | None
    after: Graph | None

    def counts(self) -> Counter[Mark]:
        """How many lines became what."""
        return Counter(line.mark for line in self.lines if line.mark is not Mark.SAME)


def compare(before: Program, after: Program) -> list[Comparison]:
    """Every block of both programs, callees first; those that are gone come last."""
    pairs = _aligned(before.graphs, after.graphs)
    found = [_compared(a, b, _lines(a, before), _lines(b, after)) for a, b in pairs]
    return _with_moves(found)


def compare_graphs(before: Graph | None, after: Graph | None) -> Comparison:
    """One block before and after; None where there is none."""
    old, new = (list(lines_of(graph)) if graph else [] for graph in (before, after))
    return _compared(before, after, old, new)


def _compared(
    before: Graph | None, after: Graph | None, old: list[DiffLine], new: list[DiffLine]
) -> Comparison:
    """Graphs with their lines."""
    if before is None and after is not None:
        added = tuple(replace(line, mark=Mark.ADDED) for line in new)
        return Comparison(after.name, Mark.ADDED, added, None, after)
    assert before is not None
    if after is None:
        removed = tuple(replace(line, mark=Mark.REMOVED) for line in old)
        return Comparison(before.name, Mark.REMOVED, removed, before, None)
    lines = tuple(_merged(old, new))
    mark = Mark.CHANGED if any(line.mark is not Mark.SAME for line in lines) else Mark.SAME
    return Comparison(after.name, mark, lines, before, after)


def _lines(graph: Graph | None, program: Program) -> list[DiffLine]:
    """Those of a graph, after the signature what the program says of it."""
    if graph is None:
        return []
    signature, *lines = lines_of(graph)
    derivative = program.derivatives.get(graph.name)
    said = {
        "derivative": print_derivative(derivative) if derivative else "",
        "boundary": print_boundary(program.boundary) if graph.name == program.root else "",
    }
    return [
        signature,
        *(DiffLine(key, f"{key} {text}") for key, text in said.items() if text),
        *lines,
    ]


def lines_of(graph: Graph) -> Iterator[DiffLine]:
    """The signature of a graph, its weights and caches, and its operators, regions flattened."""
    arguments = ", ".join(f"{v}: {v.type}" for v in graph.args)
    returned = graph.results if graph.ops else []
    results = ", ".join(
        f"{n}: {v.type}" for n, v in zip(graph.result_names, returned, strict=False)
    )
    yield DiffLine("graph", f"({arguments}) -> ({results})")
    for name, weight in graph.weights.items():
        yield DiffLine(f"@{name}", f"weight {print_weight(name, weight)}")
    for name, cache in graph.caches.items():
        yield DiffLine(f"cache @{name}", f"cache @{name} : {cache.type}")
    yield from _op_lines(graph.ops, "", Counter())


def _op_lines(ops: Sequence[Op], inside: str, seen: Counter[str]) -> Iterator[DiffLine]:
    for op in ops:
        # What defines nothing is known by its kind and its weights, and by the how manieth it is.
        key = str(op.results[0]) if op.results else " ".join([op.kind, inside, *op.symbols])
        seen[key] += 1
        if seen[key] > 1:
            key += f" {seen[key]}"
        yield DiffLine(key, print_line(op), inside, op)
        for i, region in enumerate(op.regions):
            name = f"{key} region {i}" if i else f"{key} region"
            arguments = ", ".join(f"{v}: {v.type}" for v in region.args)
            yield DiffLine(name, f"|{arguments}|", key)
            yield from _op_lines(region.ops, name, seen)


def print_line(op: Op) -> str:
    """An operator with attributes and types, without what is inside of it."""
    types = f" : {', '.join(str(v.type) for v in op.results)}" if op.results else ""
    return f"{print_op(op)}{print_attributes(op.attrs)}{types}"


def _aligned(
    before: Mapping[str, Graph], after: Mapping[str, Graph]
) -> Iterator[tuple[Graph | None, Graph | None]]:
    lost = [name for name in before if name not in after]
    new = [name for name in after if name not in before]
    partner: dict[str, str] = {}
    for stem in {_stem(name) for name in new}:
        # As many on each side: the first is the first, and so on.
        old, now = ([name for name in names if _stem(name) == stem] for names in (lost, new))
        if len(old) == len(now):
            partner.update(zip(now, old, strict=True))
    for name, graph in after.items():
        yield before.get(partner.get(name, name)), graph
    taken = set(partner.values())
    for name in lost:
        if name not in taken:
            yield before[name], None


def _stem(name: str) -> str:
    """A block's name without its numbers: `SwiGLU_18432` is `SwiGLU`."""
    return re.sub(r"_[0-9]+(?=_|$)", "", name)


def _merged(old: Sequence[DiffLine], new: Sequence[DiffLine]) -> Iterator[DiffLine]:
    """The lines of both in the order of `new`; what was removed keeps its place."""
    before = {line.key: line for line in old}
    after = {line.key for line in new}
    matcher = SequenceMatcher(None, [x.key for x in old], [x.key for x in new], autojunk=False)
    for _, i1, i2, j1, j2 in matcher.get_opcodes():
        in_place = {line.key for line in old[i1:i2]}
        yield from (replace(x, mark=Mark.REMOVED) for x in old[i1:i2] if x.key not in after)
        yield from (_marked(x, before.get(x.key), x.key in in_place) for x in new[j1:j2])


def _marked(line: DiffLine, old: DiffLine | None, in_place: bool) -> DiffLine:
    if old is None:
        return replace(line, mark=Mark.ADDED)
    if old.text != line.text:
        return replace(line, mark=Mark.CHANGED, was=old.text)
    if not in_place or old.inside != line.inside:
        return replace(line, mark=Mark.MOVED)
    return line


def _with_moves(found: Sequence[Comparison]) -> list[Comparison]:
    """What was removed in one block and added in another, otherwise equal, has moved."""
    moves = list(_moves(found))
    came = {to: home for home, to in moves}
    went = dict(moves)

    def settled(line: DiffLine, block: str) -> DiffLine:
        place = (block, line.key)
        if line.mark is Mark.ADDED and place in came:
            return replace(line, mark=Mark.MOVED, was=came[place][0])
        if line.mark is Mark.REMOVED and place in went:
            return replace(line, was=went[place][0])
        return line

    return [replace(b, lines=tuple(settled(x, b.name) for x in b.lines)) for b in found]


# The name of a block, and the key of a line in it.
_Place = tuple[str, str]


def _moves(found: Sequence[Comparison]) -> Iterator[tuple[_Place, _Place]]:
    """From where to where operators have moved between blocks."""
    gone: dict[tuple[object, ...], list[_Place]] = {}
    for place, op in _operators(found, Mark.REMOVED):
        gone.setdefault(_signature(op), []).append(place)
    for place, op in _operators(found, Mark.ADDED):
        homes = gone.get(_signature(op), [])
        home = next((one for one in homes if one[0] != place[0]), None)
        if home is not None:
            homes.remove(home)
            yield home, place


def _operators(found: Sequence[Comparison], mark: Mark) -> Iterator[tuple[_Place, Op]]:
    for block in found:
        for line in block.lines:
            if line.mark is mark and line.op is not None and line.op.kind not in ENDS:
                yield (block.name, line.key), line.op


def _signature(op: Op) -> tuple[object, ...]:
    """All of an operator but the names of its values."""
    types = tuple(v.type for v in op.results)
    return op.kind, op.symbols, repr(op.attrs), types, len(op.operands)
