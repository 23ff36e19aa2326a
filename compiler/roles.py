"""The programs of a layout: one for each role, which is what some pipeline stages have in common.

Stages with equally many layers of the same kind run the same program; they differ in the number of
their first layer only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from compiler.graph.core import REPEATS, Program, copy_program
from compiler.graph.text import print_program
from compiler.graph.verify import verify
from compiler.parallel.layout import Layout, Stage
from compiler.passes.optimizer_step import shared_weights, step_program
from compiler.passes.split_backward import SPLIT_BACKWARD
from compiler.pipeline import rank_passes, run, shared_prefix
from dsl.load import Description


@dataclass(frozen=True)
class Role:
    """Stages that run the same programs, which are those of the first of them.

    `program` is that of a micro-batch, `joint` the same before weight gradients are split off, and
    `step` that of the end of a training step.
    """

    stages: tuple[Stage, ...]
    program: Program
    joint: Program
    step: Program

    @property
    def name(self) -> str:
        first, last = self.stages[0].index, self.stages[-1].index
        return f"{first:02d}" if first == last else f"{first:02d}-{last:02d}"

    def text(self, program: Program) -> str:
        """One of the two programs, and which layers it has in each of the stages."""
        lines = [
            f"// Stage {stage.index}: layers {stage.layers[0]} to {stage.layers[-1]}\n"
            if stage.layers
            else f"// Stage {stage.index}: no layers\n"
            for stage in self.stages
        ]
        return "".join(lines) + "\n" + print_program(program)

    def of(self, stage: Stage) -> Program:
        """The program of one of the stages, before weight gradients are split off."""
        first, program = self.stages[0], copy_program(self.joint)
        for graph in program.graphs.values():
            for op in graph.walk():
                if op.kind in REPEATS:
                    op.attrs["start"] = op.number("start") + stage.layers[0] - first.layers[0]
        return program


def roles(description: Description, lowered: Program, layout: Layout) -> Iterator[Role]:
    """The programs of all stages of training, each role once, in the order of the first stages.

    Raises `DiagnosticError` (E519) where the model cannot be cut.
    """
    uncut = shared_prefix("train", lowered, description)
    shared = shared_weights(uncut, layout)
    alike: dict[tuple[object, ...], list[Stage]] = {}
    for stage in layout.stages:
        alike.setdefault(_shape(stage, layout), []).append(stage)
    for stages in alike.values():
        passes = rank_passes("train", layout, stages[0].index)
        steps = list(run("train", uncut, passes, description))
        program = steps[-1].program
        joint = steps[-2].program if passes[-1] is SPLIT_BACKWARD else program
        end = step_program(program, layout, stages[0].index, shared)
        verify(end)
        yield Role(tuple(stages), program, joint, end)


def _shape(stage: Stage, layout: Layout) -> tuple[object, ...]:
    """What the program of a stage depends on, besides the indices of its layers."""
    earlier = [u.ops for s in layout.stages[: stage.index] for u in s.units]
    inside = {u.ops for u in stage.units if u.layer is not None}
    whole = all(u.layer is not None for u in stage.units) and len(inside) == 1
    # Only layers of one loop are alike wherever they stand.
    begins = stage.units[0].ops not in earlier
    return (begins, len(stage.units), stage.units[0].ops) if whole else (stage.index,)
