"""Study files: from factors and their levels to the configurations that are trained."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsl import yaml
from dsl.diagnostic import Diagnostic, DiagnosticError, Diagnostics
from dsl.read import read_source
from dsl.schema.study import StudyFile
from dsl.schema.validate import validate_file
from dsl.source import Source, Span
from dsl.suggest import did_you_mean

VARIANT = "variant"
BASELINE = "baseline"
MAX_RUNS = 10_000


@dataclass(frozen=True)
class Level:
    """One value of a factor: changes of the spec by path, as YAML, or a variant that it names."""

    name: str
    changes: Mapping[str, str]
    variant: str | None = None


@dataclass(frozen=True)
class Factor:
    """What is varied; the first level is that of the baseline."""

    name: str
    levels: tuple[Level, ...]

    def level(self, name: str) -> Level | None:
        return next((level for level in self.levels if level.name == name), None)


@dataclass(frozen=True)
class Configuration:
    """One level of each factor. `levels` names those that are not the baseline's."""

    name: str
    levels: Mapping[str, str]
    changes: Mapping[str, str]
    variant: str | None = None

    @property
    def slug(self) -> str:
        """The name as a folder is called."""
        return re.sub(r"[^A-Za-z0-9.=+_-]+", "_", self.name)

    def spec_text(self, base: str) -> str:
        """A spec file of this configuration, which extends the spec at the path `base`."""
        lines = [f"extends: {json.dumps(base)}"]
        if self.changes:
            lines += ["set:", *(f"  {path}: {text}" for path, text in self.changes.items())]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Study:
    """A study as written; `configurations` begin with the baseline."""

    file: StudyFile
    factors: tuple[Factor, ...]
    configurations: tuple[Configuration, ...]
    source: Source
    root: yaml.Mapping

    def path(self, relative: str) -> Path:
        """A path that the file names, as seen from the current folder."""
        folder = self.source.path.parent if self.source.path else Path()
        return folder / relative


def read_study(path: Path) -> Study:
    """The study in a file. Raises `DiagnosticError` with every problem in it (E1xx, E3xx)."""
    source = read_source(path, str(path), None)
    root = yaml.parse_yaml(source)
    if not isinstance(root, yaml.Mapping):
        raise _error("E302", f"a study must be a mapping, not {yaml.kind(root)}", root.span)
    file, found = validate_file(StudyFile, root)
    problems = Diagnostics()
    problems.extend(found)
    factors = tuple(_factors(root, problems))
    common = _changes(yaml.child_of(root, "set"), "`set`", problems)
    problems.raise_if_any()
    assert file is not None
    listed = yaml.child_of(root, "runs")
    if listed is not None:
        chosen = list(_listed(listed, factors, problems))
    else:
        chosen = list(_designed(factors, file.design))
    configurations = _named([_configuration(levels, common) for levels in chosen])
    _check(configurations, file, root, problems)
    problems.raise_if_any()
    return Study(file, factors, configurations, source, root)


def _error(code: str, message: str, span: Span, help: str = "") -> DiagnosticError:
    return DiagnosticError([Diagnostic(code, message, span, "here", help=help)])


# ---- factors ------------------------------------------------------------------------------------


def _factors(root: yaml.Mapping, problems: Diagnostics) -> Iterator[Factor]:
    node = yaml.child_of(root, "factors")
    if node is None:
        return
    if not isinstance(node, yaml.Mapping) or not node.entries:
        message = "`factors` must be a mapping with at least one factor"
        problems.error("E302", message, node.span, "expected factors")
        return
    for name, entry in node.entries.items():
        if isinstance(entry.node, yaml.Scalar):
            message = f"the factor `{name}` must be levels with their changes, or a list of values"
            help = f"{name}: [1, 2], or {name}: {{off: {{path.of.value: 0}}, on: {{}}}}"
            problems.error("E302", message, entry.node.span, "a single value", help=help)
            continue
        levels = tuple(_levels(name, entry.node, problems))
        names = [level.name for level in levels]
        if len(levels) < 2:
            message = f"the factor `{name}` has {len(levels)} level"
            help = "give two or more; the first one is the baseline's"
            problems.error("E303", message, entry.key_span, "nothing varies", help=help)
        elif len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            message = f"the factor `{name}` has the level `{twice}` twice"
            problems.error("E303", message, entry.node.span, "given again")
        yield Factor(name, levels)


def _levels(
    name: str, node: yaml.Mapping | yaml.Sequence, problems: Diagnostics
) -> Iterator[Level]:
    """Named changes, or a path (the factor's name) with its values."""
    if isinstance(node, yaml.Mapping):
        for level, entry in node.entries.items():
            what = f"the level `{level}` of `{name}`"
            yield Level(level, _changes(entry.node, what, problems))
        return
    for item in node.items:
        text = flow(item)
        if name == VARIANT:
            yield Level(text, {}, None if text in ("none", "null") else text)
        else:
            yield Level(text, {name: text})


def _changes(node: yaml.Node | None, what: str, problems: Diagnostics) -> dict[str, str]:
    """Values by path, each as YAML on one line."""
    if node is None:
        return {}
    if not isinstance(node, yaml.Mapping):
        message = f"{what} must be a mapping of paths to values, not {yaml.kind(node)}"
        problems.error("E302", message, node.span, "expected `path: value`")
        return {}
    return {path: flow(entry.node) for path, entry in node.entries.items()}


def flow(node: yaml.Node) -> str:
    """A value as YAML on one line."""
    if isinstance(node, yaml.Mapping):
        return "{" + ", ".join(f"{k}: {flow(e.node)}" for k, e in node.entries.items()) + "}"
    if isinstance(node, yaml.Sequence):
        return "[" + ", ".join(map(flow, node.items)) + "]"
    return json.dumps(node.value) if node.quoted or "\n" in node.span.text else node.span.text


# ---- configurations -----------------------------------------------------------------------------


def _designed(factors: Sequence[Factor], design: str) -> Iterator[dict[str, Level]]:
    if design == "grid":
        for levels in itertools.product(*(factor.levels for factor in factors)):
            yield {f.name: level for f, level in zip(factors, levels, strict=True)}
        return
    baseline = {factor.name: factor.levels[0] for factor in factors}
    yield baseline
    for factor in factors:
        for level in factor.levels[1:]:
            yield {**baseline, factor.name: level}


def _listed(
    node: yaml.Node, factors: Sequence[Factor], problems: Diagnostics
) -> Iterator[dict[str, Level]]:
    """The combinations of `runs`: a level for each factor that is not the baseline's."""
    baseline = {factor.name: factor.levels[0] for factor in factors}
    yield baseline
    if not isinstance(node, yaml.Sequence):
        problems.error("E302", "`runs` must be a list of levels by factor", node.span, "no list")
        return
    known = {factor.name: factor for factor in factors}
    for item in node.items:
        if not isinstance(item, yaml.Mapping):
            problems.error("E302", "a run is a mapping: {factor: level}", item.span, "no mapping")
            continue
        chosen = dict(baseline)
        for name, entry in item.entries.items():
            if name not in known:
                help = did_you_mean(name, known) or f"the factors are {', '.join(known)}"
                message = f"there is no factor `{name}`"
                problems.error("E300", message, entry.key_span, "unknown", help=help)
                continue
            level = known[name].level(flow(entry.node))
            if level is None:
                names = [one.name for one in known[name].levels]
                help = did_you_mean(flow(entry.node), names) or f"its levels are {', '.join(names)}"
                message = f"the factor `{name}` has no level `{flow(entry.node)}`"
                problems.error("E305", message, entry.node.span, "unknown", help=help)
                continue
            chosen[name] = level
        if chosen != baseline:
            yield chosen


def _configuration(levels: Mapping[str, Level], common: Mapping[str, str]) -> Configuration:
    changes = dict(common)
    variant = None
    for level in levels.values():
        changes |= level.changes
        variant = level.variant or variant
    return Configuration("", {f: level.name for f, level in levels.items()}, changes, variant)


def _check(
    configurations: tuple[Configuration, ...],
    file: StudyFile,
    root: yaml.Mapping,
    problems: Diagnostics,
) -> None:
    runs = len(configurations) * len(file.seeds)
    if runs > MAX_RUNS:
        message = f"this study has {runs:,} runs, more than {MAX_RUNS:,}"
        problems.error("E303", message, root.span, "too many", help="vary one factor at a time")
    budget = yaml.nearest_node(root, ("budget",))
    if (file.budget.hold == "parameters") != (file.budget.solve is not None):
        message = "`budget.solve` names the value that holds the parameters equal"
        help = "write budget: {hold: parameters, solve: params.moe_intermediate_size}"
        problems.error("E301", message, budget.span, "both or neither", help=help)
    if len(set(file.seeds)) < len(file.seeds):
        span = yaml.nearest_node(root, ("seeds",)).span
        problems.error("E303", "a seed is given twice", span, "given again", help="remove it")


def _named(configurations: Sequence[Configuration]) -> tuple[Configuration, ...]:
    """The configurations by name: `baseline`, or the levels in which each differs from it."""
    first = configurations[0].levels
    found = []
    for one in configurations:
        other = {f: level for f, level in one.levels.items() if level != first[f]}
        name = ", ".join(f"{f.rpartition('.')[2]}={level}" for f, level in other.items())
        found.append(replace(one, name=name or BASELINE, levels=other))
    return tuple(found)
