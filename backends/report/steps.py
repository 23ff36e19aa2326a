"""The page that steps through the passes of every program; `steps.html.jinja` is its shape.

A block is shown once for each way in which a pass left it, next to what it was before; a step names
the blocks as they are after it. Programs share what they have in common, so that the page grows
with what the passes do, not with programs times passes times blocks.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from backends.report.html import environment
from compiler.analysis.costs import Cost, Costs
from compiler.graph.compare import Comparison, DiffLine, Mark, compare
from compiler.graph.core import Op, Program
from compiler.graph.svg import short_name
from compiler.graph.text import print_attributes, print_op
from compiler.pipeline import Compiled, PassResult
from dsl.load import Description
from dsl.source import Source, Span

TOKENS = 4096  # of the one sequence that bytes and FLOPs are given for
SCRIPT, STYLE = "steps.js", "steps.css"


@dataclass(frozen=True)
class SourceLink:
    """Where a line of a block was written; `anchor` leads to the listing of that source."""

    text: str
    anchor: str


@dataclass(frozen=True)
class GraphRow:
    """One line of a block with its numbers; `inside` are those of its regions.

    `left`, `kind` and `right` together are the statement without types. `was` is as in
    `compiler.graph.compare.Line`.
    """

    mark: Mark
    left: str
    kind: str = ""
    right: str = ""
    types: str = ""
    was: str = ""
    bytes: int = 0
    flops: int = 0
    callee: str = ""
    places: tuple[SourceLink, ...] = ()
    inside: tuple[GraphRow, ...] = ()


@dataclass(frozen=True)
class Version:
    """A block as one or several steps show it: after a pass, next to what it was before."""

    anchor: str
    name: str
    about: str
    signature: GraphRow
    declarations: tuple[GraphRow, ...]
    rows: tuple[GraphRow, ...]
    flops: int
    first: bool  # of its name: what a link without a step leads to


@dataclass(frozen=True)
class Chip:
    """A block in the list of a step."""

    name: str
    mark: Mark
    anchor: str
    told: str
    runs: int


@dataclass(frozen=True)
class ShownPass:
    """One step of a program."""

    anchor: str
    name: str
    purpose: str
    told: str
    operators: int
    chips: tuple[Chip, ...]
    notes: tuple[str, ...]


def render_steps(description: Description, compiled: Compiled, *, version: str, start: str) -> str:
    """The page: self-contained, the same for the same inputs; texts of the spec appear escaped.

    `start` is what it opens with: a program, a step (`train-2`) or a block there (`train-2/MLA`).
    """
    page = _Page(description)
    programs = {name: list(page.steps(name, compiled)) for name in compiled.programs}
    script = _text(SCRIPT)
    return environment().get_template("steps.html.jinja").render(
        spec=description.spec,
        version=version,
        start=start,
        programs=programs,
        versions=page.versions.values(),
        sources=[(short_name(s), s.text.split("\n")) for s in description.sources],
        tokens=TOKENS,
        style=_text(STYLE),
        script=script,
        policy=_policy(script),
    )  # fmt: skip


def _text(name: str) -> str:
    """A file next to the template, of ours and so not escaped."""
    loader = environment().loader
    assert loader is not None
    return loader.get_source(environment(), name)[0]


def _policy(script: str) -> str:
    """No script runs but this one, and nothing is fetched."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


@dataclass
class _Page:
    """Collects the versions of blocks while the steps are listed."""

    description: Description
    versions: dict[tuple[object, ...], Version] = field(default_factory=dict)

    def steps(self, program: str, compiled: Compiled) -> Iterator[ShownPass]:
        one_token = program.startswith(("decode", "draft"))
        sizes = {"batch": 1, "seq": 1 if one_token else TOKENS, "context": TOKENS}
        # The step before the first one is the first one.
        steps = compiled.steps_of(program)
        current: dict[str, str] = {}
        for i, (before, step) in enumerate(zip([steps[0], *steps], steps, strict=False)):
            yield ShownPass(
                anchor=f"{program}-{i}",
                name=step.name,
                purpose=step.purpose,
                told=step.summary if i else "",
                operators=sum(1 for g in step.program.graphs.values() for _ in g.walk()),
                chips=tuple(self._chips(before, step, sizes, current)),
                notes=tuple(f"{m.block}: {print_op(m.op)} stays: {m.reason}" for m in step.misses),
            )

    def _chips(
        self,
        before: PassResult,
        step: PassResult,
        sizes: Mapping[str, int],
        current: dict[str, str],
    ) -> Iterator[Chip]:
        """The blocks after a step, callers first; `current` knows the last version of each."""
        costs = Costs(step.program)
        runs = costs.runs()
        for block in _callers_first(compare(before.program, step.program), step.program):
            if block.mark is not Mark.SAME or block.name not in current:
                current[block.name] = self._version(block, costs, sizes)
            counts = block.counts()
            told = ", ".join(f"{counts[m]} {m}" for m in Mark if counts[m])
            yield Chip(block.name, block.mark, current[block.name], told, runs.get(block.name, 0))

    def _version(self, block: Comparison, costs: Costs, sizes: Mapping[str, int]) -> str:
        # Sizes of one token and of many make other numbers.
        key = (block.name, sizes["seq"], tuple((x.mark, x.text, x.was) for x in block.lines))
        if key not in self.versions:
            of_ops = costs.of(block.after, sizes) if block.after else {}
            signature, *lines = self._rows(block.lines, of_ops)
            names = {v.name for v in self.versions.values()}
            graph = block.after or block.before
            assert graph is not None
            self.versions[key] = Version(
                anchor=f"v{len(self.versions)}",
                name=block.name,
                about=graph.about,
                signature=signature,
                declarations=tuple(r for r in lines if not r.kind),
                rows=tuple(r for r in lines if r.kind),
                flops=costs.flops(block.after, sizes) if block.after else 0,
                first=block.name not in names,
            )
        return self.versions[key].anchor

    def _rows(self, lines: Sequence[DiffLine], costs: Mapping[Op, Cost]) -> tuple[GraphRow, ...]:
        """Lines to nested rows: those inside a region go into the row that holds it."""
        inside: dict[str, list[DiffLine]] = {}
        for line in lines:
            inside.setdefault(line.inside, []).append(line)

        def rows(key: str) -> tuple[GraphRow, ...]:
            return tuple(
                self._row(line, costs, rows(line.key))
                for line in inside.get(key, ())
                if key != line.key
            )

        return rows("")

    def _row(
        self, line: DiffLine, costs: Mapping[Op, Cost], inside: tuple[GraphRow, ...]
    ) -> GraphRow:
        op = line.op
        if op is None:
            return GraphRow(line.mark, line.text, was=line.was, inside=inside)
        left, _, right = print_op(op).partition(f"{op.kind}(")
        cost = costs.get(op, Cost(0, 0))
        return GraphRow(
            mark=line.mark,
            left=left,
            kind=op.kind,
            right=f"({right}{print_attributes(op.attrs)}",
            types=", ".join(str(v.type) for v in op.results),
            was=line.was,
            bytes=cost.bytes,
            flops=cost.flops,
            callee=str(op.attrs.get("callee", "")),
            places=tuple(map(self._place, op.spans)),
            inside=inside,
        )

    def _place(self, span: Span) -> SourceLink:
        name = short_name(span.source).rsplit("/", 1)[-1]
        return SourceLink(f"{name}:{span.line}", f"s{self._number(span.source)}-{span.line}")

    def _number(self, source: Source) -> int:
        return next((i for i, s in enumerate(self.description.sources) if s is source), 0)


def _callers_first(blocks: Sequence[Comparison], program: Program) -> Iterator[Comparison]:
    """The outermost block first, and those that are gone last."""
    here = [block for block in blocks if block.name in program.graphs]
    # Each backward graph after its forward graph.
    yield from sorted(
        reversed(here), key=lambda block: program.forward_of(block.name) != block.name
    )
    yield from (block for block in blocks if block.name not in program.graphs)
