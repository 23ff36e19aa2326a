"""The graph as text: one syntax for every operator, short enough to read.

    %c_q, .. = kind(%operand, @weight) <attribute=value> { |%argument: type| .. } : type, ..

Spans are printed on request as `loc "file":line:column`. `parse.py` reads it back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from compiler.graph.core import (
    Attr,
    Boundary,
    Derivative,
    Graph,
    Op,
    Program,
    Value,
    Weight,
)
from dsl.source import Span

INDENT = "  "
WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*([.*+][A-Za-z0-9_*]+)*")
RESERVED: dict[str, Attr] = {"true": True, "false": False, "inf": math.inf, "nan": math.nan}
# What a weight may say besides its type, and what it is when nothing is said.
WEIGHT: dict[str, Any] = {f.name: f.default for f in fields(Weight) if f.name != "type"}
# What a derivative may say besides its graphs.
CORRESPONDING = ("results", "lifted", "arguments")
# What a stage boundary says.
CROSSING = ("received", "sent")


def print_program(
    program: Program, locs: bool = False, printed: dict[Graph, str] | None = None
) -> str:
    """All of a program. `locs` adds the source places. `parse_program` reads it back.

    `printed` holds the texts of graphs that other programs share with this one.
    """
    printed = {} if printed is None else printed
    for graph in program.graphs.values():
        if graph not in printed:
            printed[graph] = print_graph(graph, locs)
    head = f"program @{program.name} root @{program.root}"
    links = "".join(f"{INDENT}{line}\n" for line in link_lines(program))
    head += f" {{\n{links}}}" if links else ""
    return "\n".join([f"{head}\n", *(printed[graph] for graph in program.graphs.values())])


def link_lines(program: Program) -> Iterator[str]:
    """What a program says of its graphs and weights together, a line each."""
    for copy, original in program.aliases.items():
        yield f"alias @{copy} = @{original}"
    for forward, derivative in program.derivatives.items():
        yield f"derivative @{forward} = {print_derivative(derivative)}"
    if program.boundary:
        yield f"boundary {print_boundary(program.boundary)}"
    for count, labels in program.counts.items():
        yield f"count @{count} = @{labels}"
    for forward, step in program.steps.items():
        yield f"step @{forward} = @{step.reduce}, @{step.update}"


def print_derivative(derivative: Derivative) -> str:
    graphs = ", ".join(f"@{name}" for name in (derivative.backward, derivative.weights) if name)
    return f"{graphs}{_print_fields(derivative, CORRESPONDING)}"


def print_boundary(boundary: Boundary) -> str:
    return _print_fields(boundary, CROSSING).strip()


def _print_fields(record: Derivative | Boundary, keys: Sequence[str]) -> str:
    values = {key: getattr(record, key) for key in keys}
    return print_attributes({key: value for key, value in values.items() if value})


def print_graph(graph: Graph, locs: bool = False) -> str:
    """One graph as it stands in the text of a program."""
    return "".join(f"{line}\n" for _, line in graph_lines(graph, locs))


def graph_lines(graph: Graph, locs: bool = False) -> Iterator[tuple[Op | None, str]]:
    """Lines of a graph, each with the operator that begins there. Broken graphs print as well."""
    if graph.about:
        for line in graph.about.split("\n"):
            yield None, f"// {_escaped(line)}" if line else "//"
    returned = graph.ops[-1].operands if graph.ops else []
    results = (f"{n}: {v.type}" for n, v in zip(graph.result_names, returned, strict=False))
    place = _places([graph.span] if locs and graph.span else [])
    yield None, f"graph @{graph.name}({_arguments(graph.args)}) -> ({', '.join(results)}){place} {{"
    for name, weight in graph.weights.items():
        yield None, f"{INDENT}weight {print_weight(name, weight)}"
    for name, remembered in graph.caches.items():
        yield None, f"{INDENT}cache @{name} : {remembered.type}"
    yield from _op_lines(graph.ops, INDENT, locs)
    yield None, "}"


def print_op(op: Op) -> str:
    """An operator in one line, for messages: without attributes, regions and types."""
    results = f"{', '.join(map(str, op.results))} = " if op.results else ""
    operands = [*map(str, op.operands), *(f"@{s}" for s in op.symbols)]
    return f"{results}{op.kind}({', '.join(operands)})"


def print_weight(name: str, weight: Weight) -> str:
    """A weight with what is not as usual of it."""
    told = {k: getattr(weight, k) for k, v in WEIGHT.items() if getattr(weight, k) != v}
    return f"@{name} : {weight.type}{print_attributes(told)}"


def _op_lines(ops: Sequence[Op], indent: str, locs: bool) -> Iterator[tuple[Op | None, str]]:
    for op in ops:
        line = f"{indent}{print_op(op)}{print_attributes(op.attrs)}"
        begins: Op | None = op
        for region in op.regions:
            arguments = f" |{_arguments(region.args)}|" if region.args else ""
            yield begins, f"{line} {{{arguments}"
            yield from _op_lines(region.ops, indent + INDENT, locs)
            begins, line = None, f"{indent}}}"
        types = f" : {', '.join(str(v.type) for v in op.results)}" if op.results else ""
        yield begins, f"{line}{types}{_places(op.spans if locs else [])}"


def _arguments(values: Sequence[Value]) -> str:
    return ", ".join(f"{v}: {v.type}" for v in values)


def _places(spans: Sequence[Span]) -> str:
    places = (f"{_quoted(s.source.name)}:{s.line}:{s.column}" for s in spans)
    return f" loc {' '.join(places)}" if spans else ""


def print_attributes(attrs: Mapping[str, Attr]) -> str:
    return f" <{', '.join(f'{k}={_literal(v)}' for k, v in attrs.items())}>" if attrs else ""


def _literal(value: Attr) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"({', '.join(_items(value))})"
    if isinstance(value, str):
        return value if _is_word(value) else _quoted(value)
    return repr(value)


def _items(values: tuple[Attr, ...]) -> Iterator[str]:
    i = 0
    while i < len(values):
        value, after = values[i], values[i + 1] if i + 1 < len(values) else None
        if isinstance(value, str) and _is_word(value) and type(after) is int:
            yield f"{value}={after}"
            i += 2
        else:
            yield _literal(value)
            i += 1


def _is_word(text: str) -> bool:
    return text not in RESERVED and WORD.fullmatch(text) is not None


def _quoted(text: str) -> str:
    return '"' + _escaped(text).replace('"', '\\"') + '"'


def _escaped(text: str) -> str:
    """One line of printable characters: text of a spec can neither end it nor steer a terminal."""
    return "".join(
        "\\\\" if c == "\\" else c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in text
    )
