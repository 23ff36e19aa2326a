"""Which passes make which program. The lists are the description; nothing else orders passes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from compiler.graph.core import Program, copy_program
from compiler.graph.equal import equal_links
from compiler.graph.verify import verify
from compiler.lower import lower
from compiler.parallel.layout import Layout
from compiler.passes.absorb import ABSORB
from compiler.passes.base import Pass
from compiler.passes.cache import DROP_CACHE, INSERT_CACHE
from compiler.passes.count_step import COUNT_STEP
from compiler.passes.cut_stages import cut_stages
from compiler.passes.differentiate import DIFFERENTIATE
from compiler.passes.draft import cut_draft, modules
from compiler.passes.encode_saved import ENCODE_SAVED
from compiler.passes.fuse_casts import FUSE_CASTS
from compiler.passes.fuse_experts import FUSE_EXPERTS
from compiler.passes.fuse_gate import FUSE_GATE
from compiler.passes.fuse_layout import FUSE_LAYOUT
from compiler.passes.fuse_loss import FUSE_LOSS
from compiler.passes.fuse_pointwise import FUSE_POINTWISE
from compiler.passes.fuse_projections import FUSE_PROJECTIONS
from compiler.passes.hoist import HOIST
from compiler.passes.outline import OUTLINE
from compiler.passes.partition import partition
from compiler.passes.place_fp8 import PLACE_FP8
from compiler.passes.recompute import RECOMPUTE
from compiler.passes.select_outputs import select_outputs
from compiler.passes.simplify import SIMPLIFY
from compiler.passes.split_backward import SPLIT_BACKWARD
from compiler.rewrite import Miss
from dsl.load import Description

LOGITS = select_outputs("logits")

# Fewer operators, each of which does more.
FUSE = (HOIST, FUSE_EXPERTS, FUSE_GATE, FUSE_POINTWISE)
# FP8 casts follow all other operators of a program, and join them.
CAST = (SIMPLIFY, PLACE_FP8, FUSE_LAYOUT, FUSE_CASTS)
GRADIENTS = (SIMPLIFY, OUTLINE, DIFFERENTIATE, RECOMPUTE)

# `fuse_projections` comes first in all of them, so that all programs join the same weights.
PIPELINES: Mapping[str, tuple[Pass, ...]] = {
    # Scores of every position, from whole sequences.
    "forward": (
        FUSE_PROJECTIONS,
        select_outputs("logits", "mtp_logits"),
        DROP_CACHE,
        SIMPLIFY,
        *FUSE,
        *CAST,
    ),
    # What training minimises, and the load of the experts.
    "train": (
        FUSE_PROJECTIONS,
        select_outputs("total", "main", "mtp", "balance", "load"),
        DROP_CACHE,
        SIMPLIFY,
        *FUSE,
        FUSE_LOSS,
        *GRADIENTS,
        *CAST,
        ENCODE_SAVED,
    ),
    # Scores after the last position of a prompt, or of the next part of one; fills the cache.
    "prefill": (
        FUSE_PROJECTIONS,
        LOGITS,
        SIMPLIFY,
        INSERT_CACHE,
        *FUSE,
        *CAST,
    ),
    # The same for one token at a time, in the latent space.
    "decode": (
        FUSE_PROJECTIONS,
        LOGITS,
        SIMPLIFY,
        INSERT_CACHE,
        ABSORB,
        *FUSE,
        *CAST,
    ),
}


def draft_passes(depth: int) -> tuple[Pass, ...]:
    """Those of a further program for each MTP module, from 0: scores of a token after the next one,
    from states that the decode program or the module before had, and the tokens after them."""
    decode = PIPELINES["decode"]
    return (FUSE_PROJECTIONS, cut_draft(depth), *decode[decode.index(SIMPLIFY) :])


def draft_name(depth: int) -> str:
    """The program of an MTP module, from 0: `draft`, `draft_2`, ..."""
    return f"draft_{depth + 1}" if depth else "draft"


def program_passes(lowered: Program) -> dict[str, tuple[Pass, ...]]:
    """The passes of every program of a model: those of `PIPELINES`, and one for each MTP module."""
    drafts = {draft_name(i): draft_passes(i) for i in range(len(modules(lowered)))}
    return {**PIPELINES, **drafts}


def shared_passes(program: str) -> tuple[Pass, ...]:
    """The passes of a program that all ranks have in common; `rank_passes` follow."""
    passes = PIPELINES[program]
    return passes[: passes.index(SIMPLIFY) + 1]


def rank_passes(program: str, layout: Layout, stage: int) -> tuple[Pass, ...]:
    """What follows `shared_passes` for those ranks that hold a pipeline stage."""
    cut = (cut_stages(layout, stage), COUNT_STEP, partition(layout))
    rest = PIPELINES[program][len(shared_passes(program)) :]
    # Only 1F1B computes both kinds of gradients at once.
    split = () if layout.schedule == "1f1b" else (SPLIT_BACKWARD,)
    return (*cut, *rest, *split)


def shared_prefix(program: str, lowered: Program, description: Description) -> Program:
    """A program where those of single ranks begin to differ from it."""
    *_, step = run(program, lowered, shared_passes(program), description)
    return step.program


@dataclass(frozen=True)
class PassResult:
    """A program after one pass; `name` is that of the pass, or `lower`.

    `before` is the program that the pass was given; the two share the graphs that are equal.
    `misses` are the places where a rule did not apply, and why. `seconds` is how long the pass
    took, for terminals only: a build holds no times.
    """

    program_name: str
    name: str
    purpose: str
    program: Program
    before: Program | None = None
    changed: bool = True
    misses: tuple[Miss, ...] = ()
    seconds: float = 0.0

    @property
    def delta(self) -> dict[str, int]:
        """How many operators of each kind there are more than before, each block counted once."""
        if self.before is None:
            return {}
        a, b = self.before.graphs, self.program.graphs
        old, new = (
            Counter([op.kind for n, g in mine.items() if g is not other.get(n) for op in g.walk()])
            for mine, other in ((a, b), (b, a))
        )
        return {kind: n for kind in sorted({*old, *new}) if (n := new[kind] - old[kind])}

    @property
    def summary(self) -> str:
        """What the pass did, in words: `experts -1, grouped_linear +3`."""
        if not self.changed:
            return "no change"
        return ", ".join(f"{kind} {n:+}" for kind, n in self.delta.items()) or "same operators"


@dataclass(frozen=True)
class Compiled:
    """The lowered program, and the programs cut from it."""

    lowered: Program
    programs: Mapping[str, Program]
    steps: tuple[PassResult, ...]

    @property
    def drafts(self) -> list[str]:
        """The programs of MTP modules that can draft, in order."""
        return [name for name in self.programs if name not in PIPELINES]

    def steps_of(self, program: str) -> list[PassResult]:
        """How a program came to be: `lower`, then each of its passes."""
        return [s for s in self.steps if s.name == "lower" or s.program_name == program]


def compile(
    description: Description, *, skip: Collection[str] = (), until: str | None = None
) -> Compiled:
    """Lowers a description and runs every pipeline; the verifier runs after each pass.

    `skip` and `until` leave passes out, as `select_passes` says. Raises `DiagnosticError`.
    """
    start = time.perf_counter()
    lowered = lower(description)
    verify(lowered)
    seconds = time.perf_counter() - start
    steps = [PassResult("all", "lower", "blocks and spec to the graph", lowered, seconds=seconds)]
    programs: dict[str, Program] = {}
    known: dict[tuple[Pass, ...], PassResult] = {}
    for name, passes in program_passes(lowered).items():
        for step in run(name, lowered, select_passes(passes, skip, until), description, known):
            steps.append(step)
            programs[name] = step.program
    return Compiled(lowered, programs, tuple(steps))


def without_fp8(
    compiled: Compiled,
    description: Description,
    skip: Collection[str] = (),
    until: str | None = None,
) -> Compiled:
    """The same, but that the served programs have no products in FP8: those of marked weights are
    in the precision of their input."""
    programs = dict(compiled.programs)
    passes = program_passes(compiled.lowered)
    for name in ("decode", *compiled.drafts):
        wanted = select_passes(passes[name], (*skip, PLACE_FP8.name), until)
        *_, step = run(name, compiled.lowered, wanted, description)
        programs[name] = step.program
    return replace(compiled, programs=programs)


def select_passes(
    passes: Sequence[Pass], skip: Collection[str] = (), until: str | None = None
) -> list[Pass]:
    """The passes of a program without those in `skip` and those after the last `until`.

    Essential passes run in any case. `until` counts for programs that have it.
    """
    last = max((i for i, one in enumerate(passes) if one.name == until), default=len(passes))
    return [
        one for i, one in enumerate(passes) if one.essential or (one.name not in skip and i <= last)
    ]


def run(
    name: str,
    lowered: Program,
    passes: Sequence[Pass],
    description: Description,
    known: dict[tuple[Pass, ...], PassResult] | None = None,
) -> Iterator[PassResult]:
    """The program after each pass. Graphs that a pass does not change are those of before.

    `known` are results of passes from the first one on: programs that begin alike share them.
    """
    known = {} if known is None else known
    program = lowered
    for i, one in enumerate(passes):
        so_far = tuple(passes[: i + 1])
        if so_far not in known:
            known[so_far] = _step(one, program, description)
        yield replace(known[so_far], program_name=name)
        program = known[so_far].program


def _step(one: Pass, before: Program, description: Description) -> PassResult:
    start = time.perf_counter()
    after = copy_program(before)
    misses = one.run(after, description)
    graphs = verify(after, before)
    seconds = time.perf_counter() - start
    changed = bool(graphs) or not equal_links(before, after)
    after.graphs |= {n: g for n, g in before.graphs.items() if n not in graphs}
    return PassResult("", one.name, one.purpose, after, before, changed, tuple(misses), seconds)


def after(
    description: Description,
    program: str,
    name: str,
) -> Program:
    """One program as it is once the pass `name` has run, for the last time if it runs twice.

    `lower` is the graph before all passes. Raises `DiagnosticError`, KeyError for no such pass.
    """
    made = lower(description)
    if name == "lower":
        return made
    passes = program_passes(made)[program]
    last = max((i for i, one in enumerate(passes) if one.name == name), default=None)
    if last is None:
        raise KeyError(name)
    *_, step = run(program, made, passes[: last + 1], description)
    return step.program


def programs(description: Description) -> Mapping[str, Program]:
    """The finished programs, by name."""
    return compile(description).programs
