"""The charts of `dslc plot`, from the metrics of runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backends.report.curves import Chart, Curve, Heat
from dsl.diagnostic import Diagnostic, DiagnosticError

Record = dict[str, Any]
SMOOTHING = 0.9
FEW_LINES = 6
"""With more layers in all runs, only the worst and the mean of each run are drawn."""
CELLS = 12_000
"""Cells in all heat maps of expert load together."""


def read_metrics(run: Path) -> list[Record]:
    """The records of a run in the order of its steps. Raises `DiagnosticError` if it has none."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        # The last line may be incomplete.
        records = [json.loads(line) for line in lines if line.endswith("}")]
        if not any("main" in record for record in records):
            raise ValueError("no step is recorded yet")
        return records
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        message = f"{run} has no metrics to draw: {reason}"
        help = "give the folder that `dslc train --out` wrote"
        raise DiagnosticError([Diagnostic("E601", message, help=help)]) from None


def charts(runs: Mapping[str, Sequence[Record]]) -> Iterator[Chart]:
    """Charts over tokens, each with a line for every run."""
    steps = {name: [r for r in records if "main" in r] for name, records in runs.items()}
    tests = {name: list(_tests(records)) for name, records in runs.items()}
    held_out = _lines(tests, _at("held_out", "loss"), " held out", dots=True)
    smooth: Iterator[Curve] = (_smoothed(line) for line in _lines(steps, _at("main")))
    yield Chart("Loss", "nats per token", (*smooth, *held_out), log=True)
    depths = range(max((len(r["mtp"]) for one in steps.values() for r in one), default=0))
    mtp = [_lines(steps, _at("mtp", k), f" depth {k + 1}") for k in depths]
    smooth = map(_smoothed, _flat(mtp))
    yield Chart("Loss of multi-token prediction", "nats per token", tuple(smooth), log=True)
    accepted = [
        _lines(tests, _at("held_out", "acceptance", k), f" depth {k + 1}", dots=True)
        for k in depths
    ]
    yield Chart(
        "Acceptance of multi-token prediction", "fraction of tokens", tuple(_flat(accepted))
    )
    norms = tuple(_lines(steps, _at("gradient_norm")))
    yield Chart("Gradient norm", "before clipping", norms, log=True)
    yield Chart("MaxVio", "largest load over mean, minus 1", tuple(_max_vio(steps)))
    yield Chart("Learning rate", "", tuple(_lines(steps, _at("learning_rate"))))


def heats(runs: Mapping[str, Sequence[Record]]) -> Iterator[Heat]:
    """The load of the experts of each layer over time, relative to the mean."""
    loads: dict[tuple[str, str], list[tuple[int, list[int]]]] = {}
    for layer in _layers(runs):
        for run, records in runs.items():
            found = [
                (r["tokens"], use["load"])
                for r in records
                if "main" in r and "load" in (use := r["experts"].get(layer, {}))
            ]
            if found:
                loads[run, layer] = found
    experts = sum(len(found[0][1]) for found in loads.values())
    columns = max(10, CELLS // max(experts, 1))
    for (run, layer), found in loads.items():
        picked = found[:: max(1, -(-len(found) // min(columns, 80)))]
        title = f"{run}: {_short(layer)}" if len(runs) > 1 else _short(layer)
        shares = tuple(
            tuple(count * len(load) / max(sum(load), 1) for count in load) for _, load in picked
        )
        yield Heat(title, tuple(tokens for tokens, _ in picked), shares)


def _layers(runs: Mapping[str, Sequence[Record]]) -> list[str]:
    """The layers with experts of all runs, each once, in their order."""
    first: list[Record] = [
        next((r["experts"] for r in records if "main" in r), {}) for records in runs.values()
    ]
    return list(dict.fromkeys(name for experts in first for name in experts))


def _short(layer: str) -> str:
    """`model.layers.3.mlp` is `layer 3`."""
    return re.sub(r"^model\.layers\.(\d+)\.mlp$", r"layer \1", layer)


def _tests(records: Sequence[Record]) -> Iterator[Record]:
    """The evaluations, with the tokens that were trained on before."""
    tokens = 0
    for record in records:
        tokens = record.get("tokens", tokens)
        if "held_out" in record:
            yield {**record, "tokens": tokens}


def _lines(
    records: Mapping[str, Sequence[Record]],
    value: Callable[[Record], float],
    suffix: str = "",
    dots: bool = False,
) -> Iterator[Curve]:
    for number, (name, found) in enumerate(records.items()):
        points = []
        for record in found:
            try:
                points.append((record["tokens"], float(value(record))))
            except (LookupError, TypeError):  # a run without this
                continue
        if points:
            yield Curve(f"{name}{suffix}", number, tuple(points), dots)


def _at(*path: str | int) -> Callable[[Record], float]:
    """The value at a path of keys and indices."""

    def value(record: Record) -> float:
        found: Any = record
        for part in path:
            found = found[part]
        return float(found)

    return value


def _over_layers(choose: Callable[[Sequence[float]], float]) -> Callable[[Record], float]:
    return lambda record: choose([use["max_vio"] for use in record["experts"].values()])


def _flat(lines: Sequence[Iterator[Curve]]) -> list[Curve]:
    return [line for part in lines for line in part]


def _smoothed(line: Curve) -> Curve:
    """An exponential average, each point being one of those before it."""
    mean, points = line.points[0][1], []
    for tokens, value in line.points:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        points.append((tokens, mean))
    return Curve(line.name, line.run, tuple(points), line.dots)


def _max_vio(steps: Mapping[str, Sequence[Record]]) -> Iterator[Curve]:
    layers = _layers(steps)
    if len(layers) * len(steps) <= FEW_LINES:
        for layer in layers:
            found = _lines(steps, _at("experts", layer, "max_vio"), f" {_short(layer)}")
            yield from map(_smoothed, found)
        return
    choices: dict[str, Callable[[Sequence[float]], float]] = {" mean": _mean, " worst layer": max}
    for suffix, choose in choices.items():
        found = _lines(steps, _over_layers(choose), suffix)
        yield from map(_smoothed, found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
