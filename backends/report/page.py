"""What the report says; `report.html.jinja` says how it looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from backends.report.html import environment
from backends.report.plan import plan_page
from backends.values import values
from compiler.analysis import (
    CONVENTIONS,
    Module,
    Submodule,
    Summary,
    Tally,
    Work,
    total,
    training_flops,
)
from compiler.graph.core import Graph
from compiler.graph.svg import STYLE, picture, short_name
from compiler.graph.text import print_op
from compiler.pipeline import Compiled
from compiler.plan.plan import Plan
from dsl.load import Description

# Context lengths of the cache table, besides the longest that the model takes.
CONTEXTS = (4_096, 32_768, 131_072)


def render_report(
    description: Description,
    compiled: Compiled,
    numbers: Summary,
    *,
    version: str,
    files: Sequence[str],
    plan: Plan | None = None,
) -> str:
    """The page `report.html`: self-contained, without scripts, the same for the same inputs.

    `files` are the paths in the build that it links to. Texts of the spec appear escaped.
    """
    template = environment().get_template("report.html.jinja")
    return template.render(
        spec=description.spec,
        version=version,
        numbers=numbers,
        conventions=CONVENTIONS,
        training=total(numbers.training_flops),
        mtp_training=total(numbers.mtp_training_flops),
        decoding=total(numbers.decoding_flops),
        shares=list(_shares(numbers)),
        modules=list(_modules(numbers)),
        caches=list(_caches(numbers, description.spec.sequence.max_position_embeddings)),
        graphs=[(graph, picture(graph)) for graph in _callers_first(compiled)],
        style=STYLE,
        values=list(values(description)),
        sources=[(short_name(source), source.text) for source in description.sources],
        pipelines=list(_pipelines(compiled)),
        files=files,
        page=plan_page(plan) if plan is not None else None,
    )


@dataclass(frozen=True)
class Share:
    """One line of the table of shares: for each column the number, and its part of the whole."""

    words: str
    cells: tuple[tuple[int, float], ...]


def _shares(numbers: Summary) -> Iterator[Share]:
    columns: tuple[Tally, ...] = (
        numbers.model.elements,
        numbers.model.active_elements,
        numbers.training_flops,
        numbers.decoding_flops,
    )
    wholes = [total(column) or 1 for column in columns]
    for work in Work:
        cells = [column.get(work, 0) for column in columns]
        if any(cells):
            parts = [n / whole for n, whole in zip(cells, wholes, strict=True)]
            yield Share(work.words, tuple(zip(cells, parts, strict=True)))


@dataclass(frozen=True)
class ModuleRow:
    """A module or a weight of the tree, with the totals of all equal ones that it represents."""

    name: str
    what: str
    parameters: int
    activated: int
    flops: int = 0
    cache_bytes: int = 0
    inside: tuple[ModuleRow, ...] = ()


@dataclass(frozen=True)
class _Equal:
    """How many of a module there are, how many a token meets, and how often they run."""

    count: int = 1
    active: int = 1
    passes: int = 1

    def of(self, part: Submodule) -> _Equal:
        return _Equal(self.count * part.count, self.active * part.active, self.passes * part.passes)


def _modules(numbers: Summary) -> Iterator[ModuleRow]:
    """The model, then each module of multi-token prediction."""
    length = numbers.sequence_length
    yield _line(numbers.model, numbers.name, _Equal(), length)
    yield from _inside(numbers.mtp, _Equal(), length)


def _line(module: Module, name: str, many: _Equal, length: int) -> ModuleRow:
    return ModuleRow(
        name,
        module.block + (f" \u00d7 {many.count:,}" if many.count > 1 else ""),
        many.count * module.parameters,
        many.active * module.activated,
        total(training_flops(module, length, many.passes)),
        many.passes * module.cache_bytes,
        tuple(_inside(module, many, length)),
    )


def _inside(module: Module, many: _Equal, length: int) -> Iterator[ModuleRow]:
    for t in module.tensors:
        shape = ", ".join(f"{d.name}={d.size}" for d in t.dims)
        parameters, activated = many.count * t.parameters, many.active * t.activated
        yield ModuleRow(t.name, f"{t.dtype}[{shape}]", parameters, activated)
    for part in module.parts:
        yield _line(part.module, part.name, many.of(part), length)


def _caches(numbers: Summary, longest: int) -> Iterator[tuple[int, int, int]]:
    """Tokens, bytes of the cache, bytes with multi-token prediction."""
    for tokens in sorted({n for n in CONTEXTS if n < longest} | {longest}):
        yield tokens, tokens * numbers.cache_bytes, tokens * numbers.cache_bytes_with_mtp


def _callers_first(compiled: Compiled) -> Iterator[Graph]:
    return reversed(compiled.lowered.graphs.values())


@dataclass(frozen=True)
class PassLine:
    """One pass of a program: operators after it, how many came or went, and what it left alone."""

    name: str
    purpose: str
    operators: int
    changed: bool
    delta: tuple[tuple[str, int], ...]
    notes: tuple[str, ...]


def _pipelines(compiled: Compiled) -> Iterator[tuple[str, list[PassLine]]]:
    """Every program with `lower` and its passes."""
    for program in compiled.programs:
        lines = [
            PassLine(
                step.name,
                step.purpose,
                sum(1 for graph in step.program.graphs.values() for _ in graph.walk()),
                step.changed,
                tuple(step.delta.items()),
                tuple(f"{miss.block}, {print_op(miss.op)}: {miss.reason}" for miss in step.misses),
            )
            for step in compiled.steps_of(program)
        ]
        yield program, lines
