"""Rewriting one operator at a time: a rule gives what takes its place, or says why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from compiler.graph.build import Builder, value_names
from compiler.graph.core import Attr, Graph, Op, Program, Value, list_of, op_lists, walk


@dataclass(frozen=True, slots=True)
class Miss:
    """Why a rule leaves an operator as it is; `dslc explain` prints it.

    `op` is what the rule stumbled over, in the graph `block`, which `rewrite` fills in.
    """

    reason: str
    op: Op
    block: str = ""


@dataclass
class Rewriter:
    """The neighbourhood of one operator, and the operators that shall take its place."""

    op: Op
    builder: Builder
    producers: dict[Value, Op]
    uses: dict[Value, list[Op]]
    matched: list[Op] = field(default_factory=list)

    def producer(self, value: Value, kind: str) -> Op | None:
        """The operator that makes `value` if it is of this kind; its spans join the rewrite's."""
        op = self.producers.get(value)
        if op is None or op.kind != kind:
            return None
        self.matched.append(op)
        return op

    def only_reader(self, value: Value, kind: str) -> Op | None:
        """The operator that alone reads `value`, if it is of this kind."""
        readers = self.uses.get(value, [])
        return readers[0] if [op.kind for op in readers] == [kind] else None

    def has_use_before(self, made: Op) -> bool:
        """Whether results of `made` are read in front of this place, or in another list than it.

        If so, what takes the place of both cannot stand here.
        """
        graph, after = self.builder.graph, False
        for op in graph.walk():
            after = after or op is self.op
            if not after and any(v in op.operands for v in made.results):
                return True
        return self.op not in graph.ops or made not in graph.ops

    def erase(self, op: Op, instead: Sequence[Value]) -> None:
        """Takes another operator out, whose results are those of what was added."""
        for old, new in zip(op.results, instead, strict=True):
            self.builder.graph.replace_uses(old, new)
        list_of(self.builder.graph, op).remove(op)

    def like(self, op: Op) -> Rewriter:
        """The same place for what comes from where another operator does."""
        return replace(self, op=op, matched=[])

    def add(
        self,
        kind: str,
        operands: Sequence[Value] = (),
        symbols: Sequence[str] = (),
        /,
        *,
        names: Sequence[str] = (),
        **attrs: Attr,
    ) -> list[Value]:
        """A new operator before the one that is replaced, from where the matched ones come."""
        spans = dict.fromkeys(s for o in [self.op, *self.matched] for s in o.spans)
        return self.builder.add(
            kind, operands, symbols, names=names, regions=(), spans=tuple(spans), **attrs
        )


Rule = Callable[[Rewriter], Sequence[Value] | Miss]


def rewrite(program: Program, kind: str, rule: Rule) -> list[Miss]:
    """Tries `rule` on every operator of `kind`, once. Returns where it did not apply, and why."""
    misses: list[Miss] = []
    for graph in program.graphs.values():
        links: _Links | None = None  # None: the graph has changed
        for ops in op_lists(graph):
            for op in [o for o in ops if o.kind == kind]:
                links = links or (graph.producers(), graph.uses(), value_names(graph))
                miss = _try(graph, program, ops, op, rule, links)
                if miss is None:
                    links = None
                else:
                    misses.append(replace(miss, block=graph.name))
    return misses


# The producers and the uses of values, and their names.
_Links = tuple[dict[Value, Op], dict[Value, list[Op]], set[str]]


def _try(
    graph: Graph, program: Program, ops: list[Op], op: Op, rule: Rule, links: _Links
) -> Miss | None:
    producers, uses, names = links
    builder = Builder(graph, program.graphs, names)
    builder.ops = []
    # If the rule applies these are gone, so that their names serve what takes their place.
    builder.names -= {v.name for o in walk([op]) for v in [*o.results, *_arguments(o)]}
    result = rule(Rewriter(op, builder, producers, uses))
    if isinstance(result, Miss):
        return result
    at = ops.index(op)
    ops[at : at + 1] = builder.ops
    for old, new in zip(op.results, result, strict=True):
        graph.replace_uses(old, new)
    return None


def _arguments(op: Op) -> list[Value]:
    return [v for region in op.regions for v in region.args]
