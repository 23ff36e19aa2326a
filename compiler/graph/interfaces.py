"""Whether the graphs of a program fit one another as the program says that they do.

Which graphs give the gradients of which, what is saved between them, what crosses the boundary of
a pipeline stage, and which graphs end a step. The graphs by themselves are sound by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from compiler.graph.core import Derivative, Graph, Program
from compiler.graph.text import print_derivative
from compiler.graph.types import FLOATS, Type
from dsl.diagnostic import Diagnostic


def interface_problems(program: Program) -> list[Diagnostic]:
    """What is wrong between the graphs of a program (E516, E518)."""
    missing = [
        Diagnostic("E516", f"{line}: there is no graph @{name}")
        for line, names in _named(program)
        for name in names
        if name and name not in program.graphs
    ]
    if missing:
        return missing
    problems = [*_derivatives(program), *_saved(program)]
    return problems or [
        Diagnostic("E518", f"boundary: {reason}", program.main.span)
        for reason in _boundary(program)
    ]


def _named(program: Program) -> Iterator[tuple[str, Sequence[str]]]:
    """Lines of a program, and the graphs that they name."""
    for name, derivative in program.derivatives.items():
        yield _line(name, derivative), (name, derivative.backward, derivative.weights)
    for name, step in program.steps.items():
        yield f"step @{name} = @{step}", (step,)


def _line(name: str, derivative: Derivative) -> str:
    return f"derivative @{name} = {print_derivative(derivative)}"


def _chain(program: Program, name: str) -> list[Graph]:
    """A forward graph, that of its gradients, and that of the gradients of its weights, if any."""
    derivative = program.derivatives[name]
    names = (name, derivative.backward, derivative.weights)
    return [program.graphs[graph] for graph in names if graph]


def _derivatives(program: Program) -> Iterator[Diagnostic]:
    for name, derivative in program.derivatives.items():
        for reason in _unfit(derivative, *_chain(program, name)):
            span = program.graphs[name].span
            yield Diagnostic("E518", f"{_line(name, derivative)}: {reason}", span)


def _unfit(derivative: Derivative, forward: Graph, backward: Graph, *late: Graph) -> Iterator[str]:
    """Where the interfaces of the graphs of a derivative do not correspond."""
    try:
        seeds = [forward.results[i].type.whole for i in derivative.results]
        lifted = [forward.args[i].type for i in derivative.lifted]
        gradients = [forward.args[i].type.whole for i in derivative.arguments]
    except IndexError:
        yield f"@{forward.name} has no argument or result of such a number"
        return
    sides = [
        ("takes", [*seeds, *lifted], [v.type for v in backward.args]),
        ("gives", gradients, [v.type.whole for v in backward.results]),
    ]
    for verb, expected, found in sides:
        if expected != found:
            yield f"@{backward.name} {verb} ({_listed(found)}), not ({_listed(expected)})"
    for graph in late:
        if graph.args or graph.results:
            yield f"@{graph.name} takes or gives something"
    for saver, reader in pairwise((forward, backward, *late)):
        saved = [v.type for v in saver.saved]
        read = [v.type for v in reader.ops[0].results] if _reads_saved(reader) else []
        if saved != read:
            reads = f"@{reader.name} reads ({_listed(read)})"
            yield f"{reads}, and @{saver.name} saves ({_listed(saved)})"


def _reads_saved(graph: Graph) -> bool:
    return graph.ops[0].kind == "saved"


def _saved(program: Program) -> Iterator[Diagnostic]:
    """Nothing is saved without a reader, or read without having been saved."""
    chains = [_chain(program, name) for name in program.derivatives]
    savers = {graph.name for chain in chains for graph in chain[:-1]}
    readers = {graph.name for chain in chains for graph in chain[1:]}
    for name, graph in program.graphs.items():
        if graph.saved and name not in savers:
            yield Diagnostic("E518", f"graph @{name} saves what no graph reads", graph.span)
        if _reads_saved(graph) and name not in readers:
            yield Diagnostic("E518", f"graph @{name} reads what no graph saves", graph.span)


def _boundary(program: Program) -> Iterator[str]:
    """It names arguments and results of the root, and their gradients cross it the other way."""
    boundary, main = program.boundary, program.main
    arguments = {v.name: v.type for v in main.args}
    results = dict(zip(main.result_names, (v.type for v in main.results), strict=True))
    wrong = [f"argument {name}" for name in boundary.received if name not in arguments]
    wrong += [f"single result {n}" for n in boundary.sent if main.result_names.count(n) != 1]
    if wrong:
        yield f"@{main.name} has no {wrong[0]}"
    elif program.backward:
        there = [arguments[n] for n in boundary.received], [results[n] for n in boundary.sent]
        back = program.backward_boundary
        for types, names in zip(there, (back.sent, back.received), strict=True):
            if len(names) != sum(type.dtype in FLOATS for type in types):
                yield f"of ({_listed(types)}) the gradients do not cross it the other way"


def _listed(types: Sequence[Type]) -> str:
    return ", ".join(map(str, types))
