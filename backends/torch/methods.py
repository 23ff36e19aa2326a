"""Which method serves which graph of a model."""

from __future__ import annotations

from collections.abc import Iterator

from backends.torch.emit import Callee
from compiler.graph.core import Graph, Program
from compiler.graph.equal import equal_graphs
from compiler.pipeline import Compiled


def method_of(program: str) -> str:
    """What the method is called that serves a program."""
    return "loss" if program == "train" else program


class Methods:
    """How each graph of each program is reached.

    Programs stand in the order in which a class lists their methods; a graph that equals that of an
    earlier program is served by its method.

    A block with a derived backward pass has one method for scores and for training; other
    programs have methods of their own where their graphs differ from that of `forward`. `segments`
    are the parts of the outermost block between the blocks that it calls, `units` those blocks.
    """

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        self.train = compiled.programs["train"]
        self.blocks = {
            name: graph
            for name, graph in compiled.lowered.graphs.items()
            if name != compiled.lowered.root
        }
        called = list(self.train.main.calls())
        # Blocks that autograd sees as one function each: what the outermost block calls.
        self.units = [n for n in called if self.train.backward and n in self.blocks]
        self.segments = [n for n in called if n not in self.blocks]
        self.callees: dict[str, dict[str, Callee]] = {p: {} for p in compiled.programs}
        for name in self.blocks:
            self._choose_methods(name)
        self._choose_derived()

    def versions(self, block: str) -> Iterator[Graph]:
        """The graph of a block in each program, and its parts and their gradients."""
        for program in self.compiled.programs.values():
            yield from (g for g in program.graphs.values() if self.owner(program, g.name) == block)

    def owner(self, program: Program, graph: str) -> str:
        """The block whose weights a graph uses: what is no block is a part of the outermost one."""
        block = program.forward_of(graph)
        return block if block in self.blocks else self.compiled.lowered.root

    def derived(self, name: str) -> bool:
        return name in self.blocks and name in self.train.derivatives

    def _choose_methods(self, name: str) -> None:
        """The methods of a block by program; what equals an earlier one is served by it."""
        seen: list[tuple[str, Graph]] = []
        for program, whole in self.compiled.programs.items():
            graph = whole.graphs.get(name)
            if graph is None or (program == "train" and self.derived(name)):
                continue
            same = next((p for p, g in seen if self._same(p, g, program, graph)), None)
            self.callees[program][name] = self._callee(name, same or program, program)
            if same is None:
                seen.append((program, graph))

    def _callee(self, name: str, served_by: str, program: str) -> Callee:
        method = method_of(served_by)
        trailing = ("cache",) if name in _cached(self.compiled.programs[program]) else ()
        if method != "forward":
            return Callee(method, trailing)
        return Callee("", trailing, self.taken(name, program))

    def taken(self, name: str, program: str) -> tuple[bool, ...]:
        """Which results of the method that training shares a program's graph has."""
        if not self.derived(name):
            return ()
        left = list(self.compiled.programs[program].graphs[name].result_names)
        taken = []
        for result in self.train.graphs[name].result_names:
            taken.append(bool(left) and left[0] == result)
            left = left[taken[-1] :]
        return () if all(taken) else tuple(taken)

    def _same(self, program_a: str, a: Graph, program_b: str, b: Graph) -> bool:
        """Equal, and calling equal methods."""
        return equal_graphs(a, b) and all(
            self.callees[program_a][c].method == self.callees[program_b][c].method
            for c in a.calls()
        )

    def _choose_derived(self) -> None:
        """Methods in training, where a backward pass was derived."""
        for name, derivative in self.train.derivatives.items():
            block = name in self.blocks
            method, backward = ("", "backward") if block else self._segment_methods(name)
            self.callees["train"][name] = Callee(method, ("saved",))
            self.callees["train"][derivative.backward] = Callee(backward, ("saved", "grads"))
        for name in self.segments:
            method, _ = self._segment_methods(name)
            self.callees["train"].setdefault(name, Callee(method))

    def _segment_methods(self, graph: str) -> tuple[str, str]:
        """The methods of the outermost block that compute a part of it, and its gradients."""
        name = graph.removeprefix(f"{self.train.root}_")
        return name, f"{name}_backward"

    def has_own(self, name: str, program: str) -> bool:
        """Whether a program's graph of a block is served by a method written from it."""
        callee = self.callees[program].get(name)
        if callee is None:
            return False
        if self.derived(name):
            return program == "train" or callee.method == method_of(program)
        return (callee.method or "forward") == method_of(program)


def _cached(program: Program) -> list[str]:
    """Graphs that keep something, or call one that does; callees stand before callers."""
    found: list[str] = []
    for graph in program.graphs.values():
        if any(op.kind == "cache_append" for op in graph.walk()) or any(
            callee in found for callee in graph.calls()
        ):
            found.append(graph.name)
    return found
