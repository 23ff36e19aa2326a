"""The folder `cpu/` of a build: one compiled step for a CPU, and what it binds."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from backends.cpp.emit import Emitter, Structure, size
from backends.cpp.statements import MADE, STATEMENTS
from backends.cpp.words import comment
from backends.render import render
from backends.torch.declare import joined_names
from backends.torch.methods import Methods
from backends.torch.records import docstring
from compiler.graph.core import Graph, Program
from compiler.graph.equal import equal_graphs
from compiler.pipeline import Compiled

WIDTH = 96
"""Columns of a statement, which is indented by four more."""


class Structures:
    """The structures of all programs; graphs that programs share are written once."""

    def __init__(self, compiled: Compiled, dtype: str) -> None:
        self.compiled = compiled
        self.dtype = dtype
        served = Methods(compiled)
        self.joined = {
            name: joined_names(graph, served.versions(name))
            for name, graph in compiled.lowered.graphs.items()
        }
        self.made: dict[str, Structure] = {}
        self._graphs: dict[str, tuple[Graph, tuple[str, ...]]] = {}

    def of(self, program: Program, graph: Graph, name: str = "") -> Structure:
        """The structure of a graph; of the root, under a name of its own."""
        callees = {callee: self.of(program, program.graphs[callee]) for callee in graph.calls()}
        called = tuple(structure.name for structure in callees.values())
        for known, (other, others) in self._graphs.items():
            if not name and called == others and equal_graphs(other, graph):
                return self.made[known]
        emitter = Emitter(graph, STATEMENTS, callees, self.joined[graph.name], self.dtype, MADE)
        # A block that programs differ in is written for each of them.
        number = sum(other.name == graph.name for other, _ in self._graphs.values())
        own = f"{graph.name}_{number + 1}" if number else graph.name
        structure = emitter.root(name) if name else emitter.structure(own)
        self._graphs[structure.name] = graph, called
        self.made[structure.name] = structure
        return structure


def cpu_package(
    compiled: Compiled, *, about: str, spec: str, version: str, dtype: str
) -> dict[str, str]:
    """Texts by path inside the build. Raises `Unsupported` for what C++ has no statement for."""
    structures = Structures(compiled, dtype)
    programs = {}
    for name in ("decode", *compiled.drafts):
        program = compiled.programs[name]
        structure = structures.of(program, program.main, f"{program.root}_{name}")
        programs[name] = (structure, _hidden(program.main))
    facts = {"spec": docstring(spec), "version": version}
    return {
        "cpu/__init__.py": render(
            "cpp/init.py.jinja",
            programs={
                name: {
                    "memory": structure.memory,
                    "hidden": hidden,
                    "angles": [dict(table) for table in structure.bindings.angles],
                    "caches": structure.bindings.caches,
                    "weights": structure.bindings.weights,
                    "products": structure.bindings.products,
                }
                for name, (structure, hidden) in programs.items()
            },
            **facts,
        ),
        "cpu/step.cpp": render(
            "cpp/step.cpp.jinja",
            about=comment(about or "A language model."),
            structures=[_record(s) for s in structures.made.values()],
            programs={name: structure.name for name, (structure, _) in programs.items()},
            **facts,
        ),
        **{f"cpu/{path.name}": path.read_text(encoding="utf-8") for path in _headers()},
    }


def _headers() -> list[Path]:
    """The operators, copied into every build."""
    return sorted(Path(__file__).parent.glob("*.h"))


def _hidden(root: Graph) -> int:
    """The width of the states that go to the head."""
    return next(size(op.operands[0].type.last) for op in root.ops if op.kind == "last_entry")


def _wrapped(line: str) -> list[str]:
    """A statement over several lines where it is too long for one."""
    return textwrap.wrap(
        line, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def _record(structure: Structure) -> Mapping[str, object]:
    return {
        "name": structure.name,
        "about": comment(structure.about or structure.name),
        "members": structure.members,
        "inits": [f"{m.name}({m.made})" for m in structure.members],
        "signature": ["const op::Step &s", "op::Arena arena", *structure.parameters],
        "lines": [part for line in structure.lines for part in _wrapped(line)],
    }
