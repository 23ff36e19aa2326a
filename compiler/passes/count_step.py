"""Counts of labels become arguments: of the whole step, where a rank has one micro-batch at hand.

A loss is a sum over labels divided by their number. Labels are known before a step begins, so that
their number on all ranks is summed once, ahead of it; then nothing on the critical path waits for
other ranks, and losses of micro-batches and ranks add up to that of the step, however it is cut.
"""

from __future__ import annotations

from collections.abc import Sequence

from compiler.graph.core import Program, Value
from compiler.passes.base import Pass
from compiler.rewrite import Miss
from dsl.load import Description


def _run(program: Program, description: Description) -> Sequence[Miss]:
    main = program.main
    misses = []
    for op in [op for op in main.ops if op.kind == "count_labels"]:
        (labels,) = op.operands
        if labels not in main.args:
            misses.append(Miss("counts what is no argument", op))
            continue
        count = Value(op.result.name, op.result.type)
        main.replace_uses(op.result, count)
        main.ops.remove(op)
        main.args.append(count)
        program.counts[count.name] = labels.name
    return misses


COUNT_STEP = Pass(
    "count_step",
    "numbers of labels as arguments, those of the whole step",
    _run,
    ensures="losses of micro-batches and ranks add up to that of a step",
    essential=True,
)
