"""What a study found: a table, a page, CSV and JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

from backends.report.curves import Chart, Curve
from backends.report.study import Change, ConfigurationRow, render_study
from dsl.study import BASELINE, Study
from dslc.curves import SMOOTHING
from dslc.difference import Difference, Side, difference
from dslc.study.plan import Planned, StudyRun
from dslc.study.run import Result, read_records
from dslc.study.statistics import BaselineComparison, Interval, compare, fit_law

Results = Mapping[StudyRun, Result | None]
"""None for a run that failed; a run that is not there has not ended yet."""
MAX_LINES = 400
"""Of graphs that differ, for each configuration."""


class Findings:
    """Results of a study, complete or not, and what follows from them."""

    def __init__(
        self, study: Study, planned: Sequence[Planned], runs: Sequence[StudyRun], results: Results
    ) -> None:
        self.study, self.planned, self.runs = study, planned, runs
        self.results = results
        losses: dict[str, dict[int, float]] = {one.name: {} for one in planned}
        for run, result in results.items():
            if result is not None:
                losses[run.planned.name][run.seed] = result.loss
        self.comparisons = compare(losses, BASELINE)

    @property
    def failed(self) -> list[StudyRun]:
        return [run for run, result in self.results.items() if result is None]

    def rows(self) -> list[ConfigurationRow]:
        return [self._row(one) for one in self.planned]

    def _row(self, one: Planned) -> ConfigurationRow:
        results = self._results(one)
        found = self.comparisons.get(one.name)
        vio = [result.max_vio for result in results if result.max_vio is not None]
        return ConfigurationRow(
            one.name,
            one.parameters,
            one.active_parameters,
            one.flops,
            f"{len(results)} of {len(self.study.file.seeds)}",
            _spread(found.values) if found else "",
            _bounds(found.values) if found else "",
            _signed(found.difference) if found and found.difference else "",
            f"{found.p:.3g}" if found and found.p is not None else "",
            _verdict(one, found),
            f"{fmean(vio):.2f}" if vio else "",
            clock(fmean(result.seconds for result in results)) if results else "",
        )

    def _results(self, one: Planned) -> list[Result]:
        return [r for run, r in self.results.items() if run.planned is one and r is not None]

    def table(self) -> list[tuple[str, ...]]:
        """The rows for a terminal, a head first."""
        head = ("configuration", "runs", "loss", "difference", "p", "verdict")
        return [head, *((r.name, r.runs, r.loss, r.difference, r.p, r.verdict)
                        for r in self.rows())]  # fmt: skip

    def page(self, version: str) -> str:
        """The text of the HTML page."""
        file = self.study.file
        hold = file.budget.hold.replace("_", " ")
        facts = [
            ("spec", file.spec),
            ("data", ", ".join(file.data)),
            ("seeds", ", ".join(map(str, file.seeds))),
            ("held equal", f"{hold}, by {file.budget.solve}" if file.budget.solve else hold),
        ]
        ended = len(self.results)
        notes = [] if ended == len(self.runs) else [f"{ended} of {len(self.runs)} runs have ended."]
        notes += [f"{run.name} failed." for run in self.failed]
        charts, changes = list(self._charts()), list(self._changes())
        return render_study(
            file.study, file.about, facts, self.rows(), charts, changes, notes, version=version
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values for `json.dumps`; what is not known is null."""
        return {
            "study": self.study.file.study,
            "configurations": [
                {
                    "name": one.name,
                    "levels": dict(one.configuration.levels),
                    "parameters": one.parameters,
                    "active_parameters": one.active_parameters,
                    "training_flops": one.flops,
                    "tokens": one.tokens,
                    "comparison": _plain(self.comparisons.get(one.name)),
                    "runs": {
                        str(run.seed): result.to_json() if result else None
                        for run, result in self.results.items()
                        if run.planned is one
                    },
                }
                for one in self.planned
            ],
        }

    def csv(self) -> str:
        """A line for each run that ended well."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        factors = [factor.name for factor in self.study.factors]
        names = ("parameters", "training_flops", "loss", "bits_per_byte", "max_vio", "seconds")
        writer.writerow(["configuration", *factors, "seed", *names])
        baseline = {factor.name: factor.levels[0].name for factor in self.study.factors}
        for run, result in self.results.items():
            if result is None:
                continue
            levels = baseline | dict(run.planned.configuration.levels)
            numbers = (run.planned.parameters, run.planned.flops, result.loss)
            measured = (result.bits_per_byte, result.max_vio, result.seconds)
            writer.writerow([run.planned.name, *levels.values(), run.seed, *numbers, *measured])
        return out.getvalue()

    # ---- charts ---------------------------------------------------------------------------------

    def _charts(self) -> Iterator[Chart]:
        records = {run: read_records(run.folder) for run in self.results}
        loss = list(self._lines(records, lambda record: record["main"]))
        yield Chart("Training loss", "nats per token, over tokens", tuple(loss), log=True)
        yield Chart("MaxVio", "mean of the layers, over tokens", tuple(self._lines(records, _vio)))
        yield self._scaling()

    def _lines(self, records: Mapping[StudyRun, Any], value: Any) -> Iterator[Curve]:
        """For each configuration the mean over seeds, and one deviation to both sides."""
        for number, one in enumerate(self.planned):
            curves = [
                _curve([r for r in found if "main" in r], value)
                for run, found in records.items()
                if run.planned is one
            ]
            curves = [curve for curve in curves if curve]
            if not curves:
                continue
            shared = sorted(set.intersection(*(set(curve) for curve in curves)))
            at = {tokens: [curve[tokens] for curve in curves] for tokens in shared}
            points = tuple((tokens, fmean(values)) for tokens, values in at.items())
            band = tuple(
                (tokens, fmean(values) - stdev(values), fmean(values) + stdev(values))
                for tokens, values in at.items()
                if len(values) > 1
            )
            if points:
                yield Curve(one.name, number, points, band=band)

    def _scaling(self) -> Chart:
        """Loss over FLOPs of training; with a law where sizes vary enough."""
        lines = []
        points: list[tuple[float, float]] = []
        for number, one in enumerate(self.planned):
            results = self._results(one)
            dots = tuple((one.flops, result.loss) for result in results)
            if dots:
                lines.append(Curve(one.name, number, dots, dots=True))
                points += dots
        law = fit_law(points)
        if law is not None:
            sizes = sorted({int(flops) for flops, _ in points})
            step = (sizes[-1] - sizes[0]) // 40 or 1
            name = f"{law.floor:.3f} + {law.scale:.3g} C^-{law.exponent:.3f}"
            curve = tuple((c, law.at(c)) for c in range(sizes[0], sizes[-1] + 1, step))
            lines.append(Curve(name, len(self.planned), curve))
        return Chart("Held-out loss over training FLOPs", "nats per token", tuple(lines))

    def _changes(self) -> Iterator[Change]:
        first, *others = self.planned
        for one in others:
            found = difference(_side(first), _side(one))
            values = [(v.path, v.a.value if v.a else "", v.b.value if v.b else "")
                      for v in found.values]  # fmt: skip
            yield Change(one.name, values, list(_operators(found))[:MAX_LINES])


def _side(one: Planned) -> Side:
    compiled = one.compiled
    return Side(one.name, one.description.resolved(), compiled.lowered, compiled.programs, None)


def _operators(found: Difference) -> Iterator[str]:
    for block in found.blocks:
        for programs, lines in block.lines.items():
            for line in lines:
                yield f"{block.name} ({', '.join(programs)}) {line.mark.value}: {line.text}"


def _curve(steps: Sequence[Mapping[str, Any]], value: Any) -> dict[int, float]:
    """A value by tokens, smoothed."""
    found: dict[int, float] = {}
    mean = math.nan
    for step in steps:
        try:
            now = float(value(step))
        except (LookupError, ValueError):
            continue
        mean = now if math.isnan(mean) else SMOOTHING * mean + (1 - SMOOTHING) * now
        found[step["tokens"]] = mean
    return found


def _vio(step: Mapping[str, Any]) -> float:
    return fmean(use["max_vio"] for use in step["experts"].values())


def _verdict(one: Planned, found: BaselineComparison | None) -> str:
    return BASELINE if one.name == BASELINE else found.verdict if found else ""


def _spread(values: Interval) -> str:
    deviation = "" if math.isnan(values.deviation) else f" ± {values.deviation:.4f}"
    return f"{values.mean:.4f}{deviation}"


def _bounds(values: Interval) -> str:
    return "" if math.isnan(values.low) else f"{values.low:.4f} to {values.high:.4f}"


def _signed(difference: Interval) -> str:
    bounds = "" if math.isnan(difference.low) else (
        f" ({difference.low:+.4f} to {difference.high:+.4f})"
    )  # fmt: skip
    return f"{difference.mean:+.4f}{bounds}"


def _plain(found: BaselineComparison | None) -> dict[str, Any] | None:
    if found is None:
        return None

    def number(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: number(one) for key, one in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    plain: dict[str, Any] = number(asdict(found))
    return {**plain, "verdict": found.verdict}


def clock(seconds: float) -> str:
    """A time as people read it: 2:05, 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
