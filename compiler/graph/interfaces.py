"""Whether the graphs of a program fit one another as the program says that they do.

Which graphs give the gradients of which, what is saved between them, what crosses the boundary of
a pipeline stage, and which graphs end a step. The graphs by themselves are sound by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from compiler.graph.core import Derivative, Graph, Program, Step
from compiler.graph.text import print_derivative
from compiler.graph.types import FLOATS, Type
from dsl.diagnostic import Diagnostic


def interface_problems(program: Program) -> list[Diagnostic]:
    """What is wrong between the graphs of a program (E516, E518)."""
    chains = list(_chains(program))
    missing = [
        Diagnostic("E516", f"{_line(forward, link)}: there is no graph @{name}")
        for forward, link, names in chains
        for name in names
        if name not in program.graphs
    ]
    if missing:
        return missing
    problems = [*_links(program, chains), *_saved(program, chains)]
    return problems or [
        Diagnostic("E518", f"program @{program.name}: {reason}", program.main.span)
        for reason in _boundary(program)
    ]


# What a program says of a forward graph, and the graphs of which each saves what the next reads.
_Chain = tuple[str, Derivative | Step, Sequence[str]]


def _chains(program: Program) -> Iterator[_Chain]:
    for name, one in program.derivatives.items():
        yield name, one, [n for n in (name, one.backward, one.weights) if n]
    for name, step in program.steps.items():
        yield name, step, (step.reduce, step.update)


def _line(name: str, link: Derivative | Step) -> str:
    """As the text of a program has it."""
    if isinstance(link, Step):
        return f"step @{name} = @{link.reduce}, @{link.update}"
    return f"derivative @{name} = {print_derivative(link)}"


def _links(program: Program, chains: Sequence[_Chain]) -> Iterator[Diagnostic]:
    """Interfaces that do not correspond, and what is saved otherwise than it is read."""
    for forward, link, names in chains:
        graphs = [program.graphs[name] for name in names]
        fits = _unstep(*graphs) if isinstance(link, Step) else _unfit(link, *graphs)
        for reason in [*fits, *_unread(graphs)]:
            yield Diagnostic("E518", f"{_line(forward, link)}: {reason}", graphs[0].span)


def _unstep(reduce: Graph, update: Graph) -> Iterator[str]:
    if reduce.args:
        yield f"@{reduce.name} takes something"
    if [v.type for v in update.args] != [Type("f32")] or update.results:
        yield f"@{update.name} takes or gives anything but the factor of gradients"


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


def _unread(graphs: Sequence[Graph]) -> Iterator[str]:
    """Where a graph reads something else than the one before it saves."""
    for saver, reader in pairwise(graphs):
        saved = [v.type for v in saver.saved]
        read = [v.type for v in reader.ops[0].results] if _reads_saved(reader) else []
        if saved != read:
            reads = f"@{reader.name} reads ({_listed(read)})"
            yield f"{reads}, and @{saver.name} saves ({_listed(saved)})"


def _reads_saved(graph: Graph) -> bool:
    return graph.ops[0].kind == "saved"


def _saved(program: Program, chains: Sequence[_Chain]) -> Iterator[Diagnostic]:
    """Nothing is saved without a reader, or read without having been saved."""
    savers = {name for *_, names in chains for name in names[:-1]}
    readers = {name for *_, names in chains for name in names[1:]}
    for name, graph in program.graphs.items():
        if graph.saved and name not in savers:
            yield Diagnostic("E518", f"graph @{name} saves what no graph reads", graph.span)
        if _reads_saved(graph) and name not in readers:
            yield Diagnostic("E518", f"graph @{name} reads what no graph saves", graph.span)


def _boundary(program: Program) -> Iterator[str]:
    """Arguments and results that it names are there, and gradients cross it the other way."""
    boundary, main = program.boundary, program.main
    arguments = {v.name: v.type for v in main.args}
    results = dict(zip(main.result_names, (v.type for v in main.results), strict=True))
    named = (*boundary.received, *program.counts, *program.counts.values())
    wrong = [f"argument {name}" for name in named if name not in arguments]
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
