"""Dead code, identities such as x * 1, and common subexpressions are removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from compiler.graph.core import Graph, Op, Program, Value, op_lists
from compiler.ops import OPS
from compiler.passes.base import Pass
from compiler.rewrite import Miss
from dsl.load import Description

ENDS = ("yield", "return")

# Operators that agree in this give the same: kind, operands, weights, attributes.
Computation = tuple[str, tuple[Value, ...], tuple[str, ...], str]


def _run(program: Program, description: Description) -> Sequence[Miss]:
    changed = True
    while changed:
        changed = False
        _drop_graphs(program)
        pure = _purity(program)
        # Callers stand after callees, so that walking backwards one sweep settles most.
        for graph in reversed(program.graphs.values()):
            changed |= _drop_identities(graph)
            changed |= common_subexpression_elimination(graph)
            changed |= _drop_dead(graph, pure)
        for graph in program.graphs.values():
            changed |= _drop_results(graph, program)
            changed |= _drop_args(graph, program)
    for graph in program.graphs.values():
        graph.drop_unused_weights()
    return ()


SIMPLIFY = Pass(
    "simplify",
    "remove dead code, identities and common subexpressions",
    _run,
    ensures="every operator, argument, result, weight and graph is used; nothing is computed twice",
    essential=True,
)


def dead_code_elimination(program: Program) -> None:
    """Removes operators whose results are not read any more, in every graph."""
    pure = _purity(program)
    for graph in program.graphs.values():
        _drop_dead(graph, pure)


def _drop_identities(graph: Graph) -> bool:
    """x * 1 and x + 0, of a number or a tensor; and n * 0 of two numbers, as the balance loss of a
    model without experts, which would not be a sum over ranks as the other losses are."""
    zeros = {op.result for op in graph.walk() if op.kind == "constant" and op.attrs["value"] == 0}
    changed = False
    for ops in op_lists(graph):
        for op in list(ops):
            same = OPS[op.kind].unchanged(op, zeros)
            if same is not None:
                graph.replace_uses(op.result, same)
                ops.remove(op)
                changed = True
    return changed


def common_subexpression_elimination(graph: Graph) -> bool:
    """Lets one operator serve for those that compute the same later, there or in regions below.

    Whether anything changed. It then comes from all the places that those came from.
    """
    return _share(graph, graph.ops, {})


def _share(graph: Graph, ops: list[Op], above: Mapping[Computation, Op]) -> bool:
    known = dict(above)
    changed = False
    for op in list(ops):
        for region in op.regions:
            changed |= _share(graph, region.ops, known)
        if op.regions or not OPS[op.kind].pure:
            continue
        # `repr` distinguishes 1, 1.0 and True.
        computation = (op.kind, tuple(op.operands), op.symbols, repr(sorted(op.attrs.items())))
        first = known.setdefault(computation, op)
        if first is not op:
            for old, new in zip(op.results, first.results, strict=True):
                graph.replace_uses(old, new)
            first.spans = tuple(dict.fromkeys((*first.spans, *op.spans)))
            ops.remove(op)
            changed = True
    return changed


def _drop_dead(graph: Graph, pure: Mapping[str, bool]) -> bool:
    """Removes operators whose results are not read and that do nothing else."""
    changed = False
    for ops in op_lists(graph):
        read = graph.read()
        for op in reversed(list(ops)):
            changed |= _drop_stacked(op, read)
            if _removable(op, pure) and read.isdisjoint(op.results):
                ops.remove(op)
                changed = True
                read = graph.read()
    return changed


def _removable(op: Op, pure: Mapping[str, bool]) -> bool:
    if op.callee:
        return pure[op.callee]
    if op.kind == "repeat":
        return all(_removable(o, pure) for o in op.regions[0].ops[:-1])
    return OPS[op.kind].pure


def _purity(program: Program) -> dict[str, bool]:
    """Which graphs do nothing but compute their results; callees stand before callers."""
    pure: dict[str, bool] = {}
    for name, graph in program.graphs.items():
        pure[name] = all(_removable(op, pure) for op in graph.walk() if op.kind not in ENDS)
    return pure


def _drop_stacked(op: Op, read: Set[Value]) -> bool:
    """Removes results of a repeat, beyond the carried ones, that are not read."""
    if op.kind != "repeat":
        return False
    carried = len(op.operands)
    keep = [i for i, v in enumerate(op.results) if i < carried or v in read]
    if len(keep) == len(op.results):
        return False
    op.results = [op.results[i] for i in keep]
    end = op.regions[0].ops[-1]
    end.operands = [end.operands[i] for i in keep]
    return True


def _drop_results(graph: Graph, program: Program) -> bool:
    """Results of a graph that no caller reads."""
    if has_paired_gradient(graph, program):
        return False
    calls = list(program.calls_of(graph.name))
    used: set[int] = set()
    for caller, op in calls:
        read = caller.read()
        used |= {i for i, v in enumerate(op.results) if v in read}
    keep = [i for i in range(len(graph.results)) if i in used]
    if not calls or len(keep) == len(graph.results):
        return False
    graph.result_names = tuple(graph.result_names[i] for i in keep)
    graph.ops[-1].operands = [graph.results[i] for i in keep]
    for _, op in calls:
        op.results = [op.results[i] for i in keep]
    return True


def has_paired_gradient(graph: Graph, program: Program) -> bool:
    """Whether a graph and its gradients speak of one another's arguments by number."""
    return graph.name in program.derivatives or program.saver_of(graph.name) is not None


def _drop_args(graph: Graph, program: Program) -> bool:
    """Arguments of a graph that it does not read."""
    read = graph.read()
    keep = [i for i, v in enumerate(graph.args) if v in read]
    if has_paired_gradient(graph, program) or len(keep) == len(graph.args):
        return False
    graph.args = [graph.args[i] for i in keep]
    for _, op in program.calls_of(graph.name):
        op.operands = [op.operands[i] for i in keep]
    return True


def _drop_graphs(program: Program) -> None:
    reached: set[str] = set()

    def reach(name: str) -> None:
        if name not in reached:
            reached.add(name)
            for callee in program.graphs[name].calls():
                reach(callee)

    for root in program.roots:
        reach(root)
    program.graphs = {n: g for n, g in program.graphs.items() if n in reached}
