"""The invariants of a program, checked after every pass. `README.md` lists them.

What is wrong here is as a rule a mistake of dslc, not of the person who wrote a spec. A message
names one operator and one reason; its place is the source of the operator, or else its line in the
text of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compiler.graph.build import infer
from compiler.graph.core import REPEATS, Graph, Op, Program, Value, Weight
from compiler.graph.equal import changed_graphs
from compiler.graph.interfaces import interface_problems
from compiler.graph.names import PublishedName, clashes, is_weight, names_of
from compiler.graph.rules import (
    SYMBOL,
    Broken,
    is_identifier,
    need_attributes,
    need_axes,
    need_counts,
    need_symbol,
    need_type,
    no_end,
)
from compiler.graph.text import graph_lines, print_op
from compiler.ops import OPS, TypeMismatch
from compiler.ops.base import dims_of
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.source import Source, Span


def verify(program: Program, since: Program | None = None) -> set[str]:
    """Raises `DiagnosticError` (E51x) with every operator that breaks an invariant.

    `since` is the program when it was verified before: only graphs that are not as they were then
    are checked, and those that call one whose signature is another, and what holds of all graphs
    together. Returns the names of those that are not as they were, or are gone.
    """
    problems: list[Diagnostic] = []
    names = _Names(program)
    calls = {key: [*graph.calls()] for key, graph in program.graphs.items()}
    changed = {*program.graphs} if since is None else changed_graphs(since, program)
    other = {n for n in changed if since is None or not _same_signature(n, since, program)}
    for key, graph in program.graphs.items():
        if key not in changed and other.isdisjoint(calls[key]):
            continue
        check = _Check(program, graph)
        check.run(key)
        # Names mean something only where every operator is what it should be.
        problems += check.problems or check.clashes(names[key])
    problems += _recursion(program, calls) or ([] if problems else _outside(program, names))
    if problems:
        raise DiagnosticError(problems)
    return changed


def _same_signature(name: str, a: Program, b: Program) -> bool:
    old, new = (p.graphs.get(name) for p in (a, b))
    if old is None or new is None or not (old.ops and new.ops):
        return False
    return [v.type for v in (*old.args, *old.results)] == [
        v.type for v in (*new.args, *new.results)
    ]


class _Names(dict[str, Sequence[PublishedName]]):
    """What the graphs of a program name, found when it is looked up."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def __missing__(self, key: str) -> Sequence[PublishedName]:
        self[key] = names_of(self.program.graphs[key])
        return self[key]


def spans_missing(program: Program) -> list[str]:
    """Operators that do not say where they came from, a line each."""
    return [
        f"@{graph.name}: {print_op(op)}"
        for graph in program.graphs.values()
        for op in graph.walk()
        if not op.spans
    ]


@dataclass(frozen=True, slots=True)
class _Scope:
    """What is around an operator. `experts` is their number inside an expert, else None."""

    visible: set[Value]
    end: str = "return"  # the operator that ends the list
    repeats: int = 0
    experts: int | None = None
    outermost: bool = True


class _Check:
    """One graph being checked; every operator is, also after one that is broken."""

    def __init__(self, program: Program, graph: Graph) -> None:
        self.program = program
        self.graph = graph
        self.problems: list[Diagnostic] = []
        self.defined: set[Value] = set()
        self.names: set[str] = set()
        self.used: set[str] = set()
        self.cached: set[str] = set()

    def run(self, key: str) -> None:
        self._try(self._head, key)
        for name, weight in self.graph.weights.items():
            self._try(self._weight, name, weight)
        self._ops(self.graph.ops, _Scope(set(self.graph.args)))
        if not self.problems:
            self._try(self._unused)

    def clashes(self, names: Sequence[PublishedName]) -> list[Diagnostic]:
        return [
            self._diagnostic(
                Broken("E517", f"{a} and {b} name the same module or weight", "rename one"),
                b.op or a.op,
            )
            for a, b in clashes(names)
        ]

    # ---- places -----------------------------------------------------------------------------

    def _try(self, rule: Callable[..., None], *arguments: object) -> None:
        try:
            rule(*arguments)
        except Broken as broken:
            self.problems.append(self._diagnostic(broken, None))

    def _diagnostic(self, broken: Broken, op: Op | None) -> Diagnostic:
        subject = f"graph @{self.graph.name}" + (f", {print_op(op)}" if op else "")
        message = f"{subject}: {broken.reason}"
        return Diagnostic(broken.code, message, self._place(op), "here", help=broken.help)

    def _place(self, op: Op | None) -> Span:
        if op is not None and op.spans:
            return op.spans[0]
        if op is None and self.graph.span is not None:
            return self.graph.span
        lines = list(graph_lines(self.graph))
        source = Source(f"graph @{self.graph.name}", "\n".join(line for _, line in lines))
        at = next((i for i, (begins, _) in enumerate(lines) if op and begins is op), 0)
        start = sum(len(line) + 1 for _, line in lines[:at])
        return source.span(start, start + len(lines[at][1]))

    # ---- the graph itself -------------------------------------------------------------------

    def _head(self, key: str) -> None:
        graph = self.graph
        if key != graph.name or not is_identifier(key):
            raise Broken("E510", f"is kept under the name {key!r}")
        self._define(graph.args)
        for name in graph.result_names:
            if not is_identifier(name):
                raise Broken("E510", f"the name of a result is no identifier: {name!r}")
        if not graph.ops:
            no_end("return")
        results = graph.ops[-1].operands
        if len(results) != len(graph.result_names):
            names = ", ".join(graph.result_names)
            raise Broken("E510", f"returns {len(results)} values, but names {names or 'none'}")

    def _weight(self, name: str, weight: Weight) -> None:
        need_symbol(name)
        need_type(weight.type)
        if any(d.size is None for d in weight.type.dims):
            raise Broken("E515", f"weight @{name} has a size that is not known: {weight.type}")
        if weight.stack < 1 or (weight.stack > 1 and "*" not in name):
            raise Broken("E515", f"weight @{name} is stacked {weight.stack} times without a *")
        if weight.axis:
            need_axes((weight.axis,))
            if "*" not in name:
                raise Broken("E515", f"weight @{name} is spread over {weight.axis} without a *")

    def _unused(self) -> None:
        for name in self.graph.weights:
            if name not in self.used:
                raise Broken("E515", f"weight @{name} is used by no operator", "remove it")
        for name in self.graph.caches:
            if name not in self.cached:
                raise Broken("E518", f"cache @{name} is never written", "remove it")

    # ---- operators --------------------------------------------------------------------------

    def _ops(self, ops: Sequence[Op], scope: _Scope) -> None:
        for op in ops:
            try:
                self._op(op, scope, op is ops[-1])
            except Broken as broken:
                self.problems.append(self._diagnostic(broken, op))
            scope.visible.update(op.results)

    def _op(self, op: Op, scope: _Scope, last: bool) -> None:
        operator = OPS.get(op.kind)
        if operator is None:
            raise Broken("E512", f"there is no operator {op.kind}")
        if last and op.kind != scope.end:
            raise Broken("E514", f"stands last, where `{scope.end}` belongs")
        if not last and op.kind in ("yield", "return"):
            raise Broken("E514", "stands before other operators of its region")
        self._operands(op, scope)
        self._define(op.results)
        need_counts(op, operator)
        need_attributes(op.attrs, operator.attrs)
        self._symbols(op, scope)
        self._rules(op, scope)
        if self._regions(op, scope):
            self._results(op)

    def _operands(self, op: Op, scope: _Scope) -> None:
        for value in op.operands:
            if value not in scope.visible:
                raise Broken("E511", f"{value} {self._why_invisible(value)}")

    def _why_invisible(self, value: Value) -> str:
        if value in self.defined:
            return "is a value of a region, and is used outside of it"
        everywhere = {v for op in self.graph.walk() for v in op.results}
        everywhere |= {v for op in self.graph.walk() for r in op.regions for v in r.args}
        return "is used before it is defined" if value in everywhere else "is defined nowhere"

    def _define(self, values: Sequence[Value]) -> None:
        for value in values:
            if value in self.defined:
                raise Broken("E511", f"{value} is defined twice")
            self.defined.add(value)
            if not is_identifier(value.name):
                raise Broken("E511", f"the name of a value is no identifier: {value.name!r}")
            if value.name in self.names:
                raise Broken("E511", f"the name {value} is taken by another value")
            self.names.add(value.name)
            need_type(value.type)

    def _symbols(self, op: Op, scope: _Scope) -> None:
        if not op.symbols:
            return
        experts = scope.experts
        if op.kind in GROUPED:  # one product for all experts, outside of a region
            counted = op.operands[GROUPED[op.kind]].type
            experts = counted.dims[0].size if counted.dims else None
        elif op.attrs.get("experts"):
            experts = dims_of(op.attrs["experts"])[0].size
        for name in op.symbols:
            weight = self.graph.weights.get(name)
            if weight is None:
                raise Broken("E515", f"there is no weight @{name}")
            self.used.add(name)
            stars = name.split(".").count("*")
            if stars > 1 or (stars and experts is None):
                raise Broken("E515", f"@{name} belongs to an expert, and this is none")
            if stars and weight.stack != experts:
                reason = f"@{name} is there for {weight.stack} experts, of which there are"
                raise Broken("E515", f"{reason} {experts}")
            if op.kind in GROUPED and op.kind != "accumulate_grad" and not stars:
                raise Broken("E515", f"@{name} belongs to no expert")

    def _rules(self, op: Op, scope: _Scope) -> None:
        """What holds for one kind of operator only."""
        match op.kind:
            case "repeat" | "repeat_backward" | "experts":
                if op.number("count") < 1 or (op.kind in REPEATS and op.number("start") < 0):
                    raise Broken("E512", "counts at least 1, from a layer of at least 0")
            case "call":
                self._call(op, scope)
            case "cache_entry" | "cache_append":
                self._remembered(op, scope)
            case "save" | "saved":
                self._saved(op, scope)

    def _call(self, op: Op, scope: _Scope) -> None:
        callee, under = op.callee, op.text("scope")
        if callee not in self.program.graphs:
            raise Broken("E516", f"there is no graph @{callee}")
        if under:  # none: a part of the same module
            need_symbol(under)
        if scope.experts is not None:
            raise Broken("E516", "a block inside an expert has no name", "leave `name` out")
        stars = under.split(".").count("*")
        if stars != scope.repeats:
            reason = f"scope {under} has {stars} `*` for {scope.repeats} repeats around it"
            raise Broken("E517", reason, "let the name hold the index of each repeat around")

    def _remembered(self, op: Op, scope: _Scope) -> None:
        names = op.items("entries")
        if len(names) != len(op.operands):
            raise Broken("E518", f"has {len(names)} names for {len(op.operands)} values")
        if not scope.outermost:
            raise Broken("E518", "stands in a region; a cache belongs to a block")
        if op.kind == "cache_entry" and self.graph.caches:
            raise Broken("E518", "marks what its graph keeps in caches already")
        for name, value in zip(names, op.operands, strict=True):
            if name in self.cached or not is_identifier(str(name)):
                raise Broken("E518", f"the cache {name!r} has this name a second time, or no name")
            self.cached.add(str(name))
            if op.kind == "cache_append":
                kept = self.graph.caches.get(str(name))
                if kept is None or kept.type != value.type:
                    raise Broken("E518", f"there is no cache @{name} of {value.type}")

    def _saved(self, op: Op, scope: _Scope) -> None:
        if not scope.outermost:
            raise Broken("E518", "stands in a region; what is saved belongs to a block")
        if op.kind == "saved" and op is not self.graph.ops[0]:
            raise Broken("E518", "does not stand first in its graph")
        if next(o for o in self.graph.ops if o.kind == op.kind) is not op:
            raise Broken("E518", "is the second of its graph", "make them one")

    def _regions(self, op: Op, scope: _Scope) -> bool:
        """Checks what is inside; whether it is sound."""
        if not op.regions:
            return True
        found = len(self.problems)
        for region in op.regions:
            self._define(region.args)
            if not region.ops:
                no_end("yield")
            experts = op.number("count") if op.kind == "experts" else scope.experts
            repeats = scope.repeats + (op.kind in REPEATS)
            visible = scope.visible | set(region.args)
            self._ops(region.ops, _Scope(visible, "yield", repeats, experts, False))
        return len(self.problems) == found

    def _results(self, op: Op) -> None:
        try:
            types = infer(op, self.graph, self.program.graphs)
        except TypeMismatch as mismatch:
            raise Broken("E513", mismatch.message, mismatch.help) from None
        except (AssertionError, LookupError, ValueError):
            # Rules take shapes for granted that only a broken graph can lack.
            raise Broken("E513", "its operands and attributes make no sense together") from None
        recorded = tuple(v.type for v in op.results)
        if types != recorded:
            made, kept = (", ".join(map(str, t)) or "nothing" for t in (types, recorded))
            raise Broken("E513", f"makes {made}, and is recorded as {kept}")


# Operators on the weights of all experts at once, and the operand that counts the experts.
GROUPED = {
    "grouped_linear": 1,
    "grouped_linear_input_grad": 1,
    "grouped_parameter": 1,
    "accumulate_grad": 0,
}

# ---- rules about all graphs together -----------------------------------------------------------


def _recursion(program: Program, calls: Mapping[str, Sequence[str]]) -> list[Diagnostic]:
    """A graph that calls itself by way of others."""
    left = {name: [c for c in callees if c in program.graphs] for name, callees in calls.items()}
    while done := [name for name, callees in left.items() if not any(c in left for c in callees)]:
        for name in done:
            del left[name]
    if not left:
        return []
    path = [next(iter(left))]
    while path[-1] not in path[:-1]:
        path.append(next(c for c in left[path[-1]] if c in left))
    circle = " calls ".join(f"@{name}" for name in path[path.index(path[-1]) :])
    span = program.graphs[path[-1]].span
    return [Diagnostic("E516", f"{circle}: a graph cannot hold itself", span)]


def _outside(program: Program, names: Mapping[str, Sequence[PublishedName]]) -> list[Diagnostic]:
    """The root and the aliases, given sound graphs."""
    if program.root not in program.graphs or not is_identifier(program.name):
        known = ", ".join(program.graphs)
        message = f"program @{program.name} has no graph @{program.root} to begin with"
        return [Diagnostic("E510", message, help=f"it has {known or 'none'}")]
    problems = interface_problems(program)
    for copy, original in program.aliases.items():
        alias = f"alias @{copy} = @{original}"
        if not is_weight(original, program.root, names):
            problems.append(Diagnostic("E517", f"{alias}: there is no weight @{original}"))
        elif is_weight(copy, program.root, names) or not SYMBOL.fullmatch(copy):
            message = f"{alias}: @{copy} is a weight of its own, or no name"
            problems.append(Diagnostic("E517", message))
    return problems
