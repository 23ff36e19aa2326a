"""A program for tools: JSON, and the language of Graphviz."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from compiler.graph.core import Graph, Op, Program, Region, Value
from compiler.graph.types import Type


def to_json(program: Program) -> str:
    """All of a program: graphs, weights, operators with attributes, types, regions and places."""
    value = {
        "program": program.name,
        "root": program.root,
        "aliases": program.aliases,
        "graphs": [_graph(graph) for graph in program.graphs.values()],
    }
    return json.dumps(value, indent=1, ensure_ascii=False)


def _graph(graph: Graph) -> dict[str, Any]:
    return {
        "name": graph.name,
        "about": graph.about,
        "place": graph.span.location if graph.span else None,
        "args": [_value(v) for v in graph.args],
        "results": [
            {"name": name, "value": v.name}
            for name, v in zip(graph.result_names, graph.results, strict=True)
        ],
        "weights": [
            {
                "name": name,
                "type": _type(w.type),
                "init": w.init,
                "std": w.std,
                "value": w.value,
                "trainable": w.trainable,
                "stack": w.stack,
            }
            for name, w in graph.weights.items()
        ],
        "caches": [{"name": name, "type": _type(c.type)} for name, c in graph.caches.items()],
        "ops": [_op(op) for op in graph.ops],
    }


def _op(op: Op) -> dict[str, Any]:
    return {
        "kind": op.kind,
        "operands": [v.name for v in op.operands],
        "symbols": list(op.symbols),
        "attrs": op.attrs,
        "results": [_value(v) for v in op.results],
        "regions": [_region(region) for region in op.regions],
        "places": [span.location for span in op.spans],
    }


def _region(region: Region) -> dict[str, Any]:
    return {"args": [_value(v) for v in region.args], "ops": [_op(op) for op in region.ops]}


def _value(value: Value) -> dict[str, Any]:
    return {"name": value.name, "type": _type(value.type)}


def _type(type: Type) -> dict[str, Any]:
    dims = [{"name": d.name, "size": d.size, "offset": d.offset} for d in type.dims]
    return {"dtype": type.dtype, "dims": dims}


def to_dot(program: Program) -> str:
    """Graphviz text: a cluster for each graph and each region, an edge for each use of a value."""
    lines = [f"digraph {_quoted(program.name)} {{", "  node [shape=box, fontname=monospace];"]
    for i, graph in enumerate(program.graphs.values()):
        lines += _Dot(f"g{i}").graph(graph)
    return "\n".join([*lines, "}"]) + "\n"


class _Dot:
    """Lines of one graph. Names of nodes are the prefix of the graph and a number."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._count = 0
        self._nodes: dict[Value, str] = {}
        self._edges: list[str] = []

    def graph(self, graph: Graph) -> Iterator[str]:
        yield from self._cluster("  ", graph.name, graph.args, graph.ops)
        yield from self._edges

    def _cluster(
        self, indent: str, label: str, args: Sequence[Value], ops: Sequence[Op]
    ) -> Iterator[str]:
        name = f"cluster_{self._next()}"
        yield f"{indent}subgraph {name} {{"
        indent += "  "
        yield f"{indent}label={_quoted(label)};"
        for value in args:
            self._nodes[value] = self._next()
            yield f"{indent}{self._nodes[value]} [label={_quoted(str(value))}, style=dashed];"
        for op in ops:
            yield from self._op(indent, op)
        yield indent[2:] + "}"

    def _op(self, indent: str, op: Op) -> Iterator[str]:
        node = self._next()
        what = op.callee or op.kind
        label = "\n".join([what, *(f"@{symbol}" for symbol in op.symbols)])
        yield f"{indent}{node} [label={_quoted(label)}];"
        for value in op.operands:
            text = _quoted(f"{value} : {value.type}")
            self._edges.append(f"  {self._nodes[value]} -> {node} [tooltip={text}];")
        self._nodes.update((value, node) for value in op.results)
        for region in op.regions:
            yield from self._cluster(indent, op.kind, region.args, region.ops)
            first = self._nodes[region.args[0]] if region.args else None
            if first:
                self._edges.append(f"  {node} -> {first} [style=dashed];")

    def _next(self) -> str:
        self._count += 1
        return f"{self._prefix}_{self._count}"


def _quoted(text: str) -> str:
    """A string of the dot language; a backslash in it is only a backslash."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
