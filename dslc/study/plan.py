"""Which runs a study has, with the size and the arithmetic of each, before any is started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from compiler.analysis import Summary, summary, total
from compiler.pipeline import Compiled, compile
from dsl import yaml
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.load import Description, load
from dsl.study import Configuration, Study
from dslc.specs import find, shipped

SPECS = "specs"
RUNS = "runs"
MAX_STEPS = 60
"""Of the search for the value that holds the parameters equal."""


@dataclass(frozen=True, eq=False)
class Planned:
    """A configuration with its spec file and its numbers. FLOPs are those of training."""

    configuration: Configuration
    spec: Path
    description: Description
    compiled: Compiled
    parameters: int
    active_parameters: int
    flops_per_token: int
    tokens: int

    @property
    def name(self) -> str:
        return self.configuration.name

    @property
    def flops(self) -> int:
        """Training FLOPs of one run."""
        return self.flops_per_token * self.tokens


@dataclass(frozen=True, eq=False)
class StudyRun:
    """One training: a configuration with a seed. `number` is its place in the study."""

    number: int
    planned: Planned
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.planned.name} seed {self.seed}"


def plan_study(study: Study, out: Path) -> list[Planned]:
    """Writes a spec file for each configuration below `out` and computes its numbers.

    Raises `DiagnosticError` with the problems of all configurations, each named once.
    """
    problems: list[Diagnostic] = []
    planned: list[Planned] = []
    base = _base(study)
    for configuration in study.configurations:
        try:
            first = planned[0] if planned else None
            planned.append(_planned(configuration, study, base, out, first))
        except DiagnosticError as error:
            problems += error.diagnostics
    if problems:
        raise DiagnosticError(list({str(one): one for one in problems}.values()))
    return planned


def runs_of(planned: Sequence[Planned], seeds: Sequence[int], out: Path) -> list[StudyRun]:
    """All runs; those of the first seed come first, so that early results compare."""
    found: list[StudyRun] = []
    for seed in seeds:
        for one in planned:
            folder = out / RUNS / one.configuration.slug / f"seed-{seed}"
            found.append(StudyRun(len(found), one, seed, folder))
    return found


def _base(study: Study) -> str:
    """The path of the spec that all configurations extend."""
    named = study.file.spec
    if named in shipped():
        return str(shipped()[named].resolve())
    return str(find(str(study.path(named))).resolve())


def _planned(
    configuration: Configuration, study: Study, base: str, out: Path, first: Planned | None
) -> Planned:
    """`first` is the baseline, with which a budget holds the others equal."""
    budget = study.file.budget
    found = _numbers(configuration, base, out)
    if first is None or budget.hold == "tokens":
        return found
    if budget.hold == "active_flops":
        tokens = round(first.flops / found.flops_per_token)
        return _numbers(_with(configuration, "train.tokens", tokens), base, out)
    assert budget.solve is not None
    return _solved(configuration, budget.solve, study, base, out, found, first.parameters)


def _numbers(configuration: Configuration, base: str, out: Path) -> Planned:
    """The numbers of a configuration, whose spec file is written."""
    spec = out / SPECS / f"{configuration.slug}.yaml"
    spec.parent.mkdir(parents=True, exist_ok=True)
    text = configuration.spec_text(os.path.relpath(base, spec.parent))
    if not spec.exists() or spec.read_text(encoding="utf-8") != text:
        spec.write_text(text, encoding="utf-8")
    variant = configuration.variant
    description = load(spec, variants=[variant] if variant else [])
    compiled = compile(description)
    train = description.spec.train
    numbers: Summary = summary(
        compiled.lowered,
        compiled.programs["decode"],
        sequence_length=train.sequence_length or 4096,
    )
    if train.tokens is None:
        message = "a study needs `train.tokens`: how long each run is"
        help = "add `set: {train.tokens: 600K}` to the study"
        raise DiagnosticError(
            [Diagnostic("E301", message, description.span("train"), "has no tokens", help=help)]
        )
    return Planned(
        configuration,
        spec,
        description,
        compiled,
        numbers.parameters + numbers.mtp.parameters,
        numbers.activated,
        total(numbers.training_flops) + total(numbers.mtp_training_flops),
        train.tokens,
    )


def _with(configuration: Configuration, path: str, value: int) -> Configuration:
    changes = {**configuration.changes, path: str(value)}
    return Configuration(configuration.name, configuration.levels, changes, configuration.variant)


def _solved(
    configuration: Configuration,
    path: str,
    study: Study,
    base: str,
    out: Path,
    found: Planned,
    wanted: int,
) -> Planned:
    """The configuration with the value at `path` that comes nearest to `wanted` parameters."""
    span = yaml.nearest_node(study.root, ("budget", "solve")).span
    value = next((int(one.value) for one in found.description.resolved()
                  if one.path == path and one.value.isdigit()), None)  # fmt: skip
    if value is None:
        message = f"`{path}` is no whole number of the spec, so it cannot be solved for"
        raise DiagnosticError([Diagnostic("E302", message, span, "not a whole number")])
    tried = {value: found}
    for candidate in _search(value, wanted, tried):
        tried[candidate] = _numbers(_with(configuration, path, candidate), base, out)
    best = min(tried, key=lambda v: (abs(tried[v].parameters - wanted), v))
    if len({one.parameters for one in tried.values()}) == 1:
        message = f"`{path}` does not change how many parameters there are"
        raise DiagnosticError([Diagnostic("E302", message, span, "no effect")])
    return _numbers(_with(configuration, path, best), base, out)


def _search(value: int, wanted: int, tried: dict[int, Planned]) -> Iterator[int]:
    """Values to try, by bisection; parameters grow with the value."""
    low, high = 1, value
    while tried[high].parameters < wanted and high < value << 10:
        low, high = high, high * 2
        yield high
    for _ in range(MAX_STEPS):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        yield middle
        low, high = (middle, high) if tried[middle].parameters < wanted else (low, middle)
    if low not in tried:
        yield low
