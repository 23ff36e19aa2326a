"""Which passes make which program. The lists are the description; nothing else orders passes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from compiler.graph.core import Program, copy_program
from compiler.graph.equal import equal
from compiler.graph.verify import verify
from compiler.lower import lower
from compiler.passes.absorb import ABSORB
from compiler.passes.base import Pass
from compiler.passes.cache import DROP_CACHE, INSERT_CACHE
from compiler.passes.fuse_experts import FUSE_EXPERTS
from compiler.passes.select_outputs import select_outputs
from compiler.passes.simplify import SIMPLIFY
from compiler.rewrite import Miss
from dsl.load import Description

PIPELINES: Mapping[str, tuple[Pass, ...]] = {
    # Scores of every position, from whole sequences.
    "forward": (select_outputs("logits", "mtp_logits"), DROP_CACHE, SIMPLIFY, FUSE_EXPERTS),
    # What training minimises, and the load of the experts.
    "train": (
        select_outputs("total", "main", "mtp", "balance", "load"),
        DROP_CACHE,
        SIMPLIFY,
        FUSE_EXPERTS,
    ),
    # Scores after the last position of a prompt, or of the next part of one; fills the cache.
    "prefill": (select_outputs("logits"), SIMPLIFY, INSERT_CACHE, FUSE_EXPERTS),
    # The same for one token at a time, in the latent space.
    "decode": (select_outputs("logits"), SIMPLIFY, INSERT_CACHE, ABSORB, FUSE_EXPERTS, SIMPLIFY),
}


@dataclass(frozen=True)
class Step:
    """A program after a pass that changed it; `name` is `lower` or the pass.

    `misses` are the places where a rule of the pass did not apply, and why.
    """

    program_name: str
    name: str
    program: Program
    misses: tuple[Miss, ...] = ()


@dataclass(frozen=True)
class Compiled:
    """The lowered program, and the programs cut from it."""

    lowered: Program
    programs: Mapping[str, Program]
    steps: tuple[Step, ...]


def compile(description: Description, *, skip: Collection[str] = ()) -> Compiled:
    """Lowers a description and runs every pipeline; the verifier runs after each pass.

    `skip` names passes to leave out, for debugging. Raises `DiagnosticError`.
    """
    lowered = lower(description)
    verify(lowered)
    programs: dict[str, Program] = {}
    steps = [Step("all", "lower", lowered)]
    for name, passes in PIPELINES.items():
        for step in run(name, lowered, [p for p in passes if p.name not in skip], description):
            steps.append(step)
            programs[name] = step.program
    return Compiled(lowered, programs, tuple(steps))


def run(
    name: str, lowered: Program, passes: Sequence[Pass], description: Description
) -> Iterator[Step]:
    """The program after each pass that changed something, and after the last one in any case."""
    program = lowered
    for i, one in enumerate(passes):
        after = copy_program(program)
        misses = one.run(after, description)
        verify(after)
        if i == len(passes) - 1 or not equal(program, after):
            yield Step(name, one.name, after, tuple(misses))
        program = after


def after(description: Description, program: str, name: str) -> Program:
    """One program as it is once the pass `name` has run, for the last time if it runs twice.

    `lower` is the graph before all passes. Raises `DiagnosticError`, KeyError for no such pass.
    """
    made = lower(description)
    if name == "lower":
        return made
    passes = PIPELINES[program]
    last = max((i for i, one in enumerate(passes) if one.name == name), default=None)
    if last is None:
        raise KeyError(name)
    *_, step = run(program, made, passes[: last + 1], description)
    return step.program


def programs(description: Description) -> Mapping[str, Program]:
    """The finished programs, by name."""
    return compile(description).programs
