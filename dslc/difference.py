"""What differs between two models: values, numbers, operators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compiler.analysis import Summary, summary, total
from compiler.analysis.saved import saved_bytes_per_token
from compiler.graph.compare import DiffLine, Mark, compare
from compiler.graph.core import Program
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.load import Resolved


@dataclass(frozen=True)
class Side:
    """One of the two: a spec with its changes, a build, or a run.

    `plan` is as in `plan.json`; `run` holds how a run was started: data, seed and the like.
    """

    name: str
    values: Sequence[Resolved]
    lowered: Program
    programs: Mapping[str, Program]
    plan: Mapping[str, Any] | None
    run: Sequence[Resolved] = ()


@dataclass(frozen=True)
class ChangedValue:
    """A value of the spec; None where one side has none."""

    path: str
    a: Resolved | None
    b: Resolved | None


@dataclass(frozen=True)
class ComparedNumber:
    """A number of both models; None where one does not have it."""

    name: str
    a: int | None
    b: int | None

    @property
    def equal(self) -> bool:
        return self.a == self.b


@dataclass(frozen=True)
class ChangedBlock:
    """A block that differs: lines that became another, by the programs in which they did.

    `mark` is what became of the block as a whole.
    """

    name: str
    mark: Mark
    lines: Mapping[tuple[str, ...], Sequence[DiffLine]]


@dataclass(frozen=True)
class Difference:
    """Between A and B: changed values and blocks, and every number that either has."""

    a: str
    b: str
    values: tuple[ChangedValue, ...]
    numbers: tuple[ComparedNumber, ...]
    blocks: tuple[ChangedBlock, ...]

    @property
    def equal(self) -> bool:
        return not self.values and not self.blocks and all(n.equal for n in self.numbers)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values for `json.dumps`."""
        return {
            "equal": self.equal,
            "a": self.a,
            "b": self.b,
            "values": [{"path": v.path, "a": _value(v.a), "b": _value(v.b)} for v in self.values],
            "numbers": [{"name": n.name, "a": n.a, "b": n.b} for n in self.numbers],
            "blocks": [
                {
                    "block": block.name,
                    "change": block.mark.value,
                    "lines": [
                        {
                            "change": x.mark.value,
                            "text": x.text,
                            "was": x.was,
                            "programs": list(programs),
                        }
                        for programs, lines in block.lines.items()
                        for x in lines
                    ],
                }
                for block in self.blocks
            ],
        }


def _value(value: Resolved | None) -> dict[str, str] | None:
    return None if value is None else {"value": value.value, "origin": value.origin}


def difference(a: Side, b: Side) -> Difference:
    """All differences of two models. Raises `DiagnosticError` for a plan that cannot be read."""
    return Difference(
        a.name,
        b.name,
        tuple(_values(a, b)),
        tuple(n for n in _numbers(a, b) if n.a is not None or n.b is not None),
        tuple(_blocks(a, b)),
    )


def _values(a: Side, b: Side) -> Iterator[ChangedValue]:
    # How it was started is no property of a model: it is compared between runs only.
    runs = a.run and b.run
    before, after = (
        {v.path: v for v in (*side.values, *(side.run if runs else ()))} for side in (a, b)
    )
    for path in dict.fromkeys([*before, *after]):
        old, new = before.get(path), after.get(path)
        if old is None or new is None or old.value != new.value:
            yield ChangedValue(path, old, new)


def _numbers(a: Side, b: Side) -> Iterator[ComparedNumber]:
    found = [_summed(side) | _planned(side.plan) for side in (a, b)]
    for name in dict.fromkeys([*found[0], *found[1]]):
        yield ComparedNumber(name, found[0].get(name), found[1].get(name))


def _summed(side: Side) -> dict[str, int]:
    numbers: Summary = summary(side.lowered, side.programs["decode"])
    train = side.programs["train"]
    return {
        "parameters": numbers.parameters,
        "active parameters": numbers.activated,
        "bytes of a checkpoint": numbers.stored_bytes,
        "training FLOPs per token": total(numbers.training_flops),
        "training FLOPs per token, MTP": total(numbers.mtp_training_flops),
        "decoding FLOPs per token": total(numbers.decoding_flops),
        "cache bytes per token": numbers.cache_bytes,
        # Of activations, from the forward to the backward pass.
        **({"saved bytes per token": int(saved_bytes_per_token(train))} if train.backward else {}),
    }


def _planned(plan: Mapping[str, Any] | None) -> dict[str, int]:
    """The largest value of any rank, per step. The plan may come from an untrusted build."""
    if plan is None:
        return {}

    def sent(rank: Mapping[str, Any], where: str) -> int:
        return sum(int(one[where]["bytes"]) for one in rank["sent"])

    try:
        ranks = list(plan["ranks"])
        return {
            "peak bytes of a rank": max(int(rank["peak_bytes"]) for rank in ranks),
            "bytes sent intra-node": max(sent(rank, "inside") for rank in ranks),
            "bytes sent inter-node": max(sent(rank, "across") for rank in ranks),
        }
    except (KeyError, TypeError, ValueError):
        message = "plan.json is not of a form that this version of dslc reads"
        raise DiagnosticError([Diagnostic("E604", message, help="build the model again")]) from None


def _blocks(a: Side, b: Side) -> Iterator[ChangedBlock]:
    """Blocks that differ, callers first; a change in several programs is listed once."""
    marks: dict[str, set[Mark]] = {}
    changes: dict[str, dict[tuple[str, ...], tuple[DiffLine, list[str]]]] = {}
    for program, before, after in _pairs(a, b):
        for block in reversed(compare(before, after)):
            if block.mark is not Mark.SAME:
                marks.setdefault(block.name, set()).add(block.mark)
                lines = changes.setdefault(block.name, {})
                for line in block.lines:
                    if line.mark is not Mark.SAME:
                        key = (line.mark.value, line.text, line.was)
                        lines.setdefault(key, (line, []))[1].append(program)
    for name, found in changes.items():
        by_programs: dict[tuple[str, ...], list[DiffLine]] = {}
        for line, programs in found.values():
            # The same line may be there twice in one program.
            by_programs.setdefault(tuple(dict.fromkeys(programs)), []).append(line)
        mark = marks[name].pop() if len(marks[name]) == 1 else Mark.CHANGED
        yield ChangedBlock(name, mark, by_programs)


def _pairs(a: Side, b: Side) -> Iterator[tuple[str, Program, Program]]:
    """The lowered program, and those that both have."""
    yield "all", a.lowered, b.lowered
    for name, program in a.programs.items():
        if name in b.programs:
            yield name, program, b.programs[name]
