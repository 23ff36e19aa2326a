"""What `dslc plot` draws: the metrics of runs as charts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backends.report.curves import Chart, Heat, Line
from dsl.diagnostic import Diagnostic, DiagnosticError

Record = dict[str, Any]
SMOOTHING = 0.9
FEW_LAYERS = 6
"""With more, the worst and the mean of all layers are drawn instead of each."""
CELLS = 12_000
"""Of all pictures of expert load together."""


def read_metrics(run: Path) -> list[Record]:
    """The records of a run in the order of its steps. Raises `DiagnosticError` if it has none."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        # The last line may be under way.
        return [json.loads(line) for line in lines if line.endswith("}")]
    except (OSError, ValueError) as error:
        message = f"{run} has no metrics to draw: {error}"
        help = "give the folder that `dslc train --out` wrote"
        raise DiagnosticError([Diagnostic("E601", message, help=help)]) from None


def charts(runs: Mapping[str, Sequence[Record]]) -> Iterator[Chart]:
    """Each has a line of every run, over tokens."""
    steps = {name: [r for r in records if "main" in r] for name, records in runs.items()}
    tests = {name: list(_tests(records)) for name, records in runs.items()}
    held_out = _lines(tests, _at("held_out", "loss"), " held out", dots=True)
    smooth = (_smoothed(line) for line in _lines(steps, _at("main")))
    yield Chart("Loss", "nats a token", (*smooth, *held_out))
    depths = range(max((len(r["mtp"]) for one in steps.values() for r in one), default=0))
    mtp = [_lines(steps, _at("mtp", k), f" depth {k + 1}") for k in depths]
    yield Chart("Loss of multi-token prediction", "nats", tuple(map(_smoothed, _flat(mtp))))
    accepted = [
        _lines(tests, _at("held_out", "acceptance", k), f" depth {k + 1}", dots=True)
        for k in depths
    ]
    yield Chart("Acceptance of multi-token prediction", "share", tuple(_flat(accepted)))
    yield Chart("Norm of gradients", "before clipping", tuple(_lines(steps, _at("gradient_norm"))))
    yield Chart("MaxVio", "busiest expert over the mean, less 1", tuple(_max_vio(steps)))
    yield Chart("Learning rate", "", tuple(_lines(steps, _at("learning_rate"))))


def heats(runs: Mapping[str, Sequence[Record]]) -> Iterator[Heat]:
    """The load of the experts of each layer over time, 1 being their share."""
    loads = {
        (run, layer): [
            (r["tokens"], use["load"])
            for r in records
            if "main" in r and "load" in (use := r["experts"].get(layer, {}))
        ]
        for run, records in runs.items()
        for layer in next((r["experts"] for r in records if "main" in r), {})
    }
    experts = sum(len(found[0][1]) for found in loads.values() if found)
    columns = max(10, CELLS // max(experts, 1))
    for (run, layer), found in loads.items():
        picked = found[:: max(1, -(-len(found) // min(columns, 80)))]
        title = f"{run}: {layer}" if len(runs) > 1 else layer
        shares = tuple(
            tuple(count * len(load) / max(sum(load), 1) for count in load) for _, load in picked
        )
        if shares:
            yield Heat(title, tuple(tokens for tokens, _ in picked), shares)


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
) -> Iterator[Line]:
    for number, (name, found) in enumerate(records.items()):
        points = []
        for record in found:
            try:
                points.append((record["tokens"], float(value(record))))
            except (LookupError, TypeError):  # a run without this
                continue
        if points:
            yield Line(f"{name}{suffix}", number, tuple(points), dots)


def _at(*path: str | int) -> Callable[[Record], float]:
    """What stands at a path of keys and indices."""

    def value(record: Record) -> float:
        found: Any = record
        for part in path:
            found = found[part]
        return float(found)

    return value


def _over_layers(choose: Callable[[Sequence[float]], float]) -> Callable[[Record], float]:
    return lambda record: choose([use["max_vio"] for use in record["experts"].values()])


def _flat(lines: Sequence[Iterator[Line]]) -> list[Line]:
    return [line for part in lines for line in part]


def _smoothed(line: Line) -> Line:
    """An exponential average, each point being one of those before it."""
    mean, points = line.points[0][1], []
    for tokens, value in line.points:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        points.append((tokens, mean))
    return Line(line.name, line.run, tuple(points), line.dots)


def _max_vio(steps: Mapping[str, Sequence[Record]]) -> Iterator[Line]:
    layers = sorted({name for one in steps.values() for r in one[:1] for name in r["experts"]})
    if len(layers) <= FEW_LAYERS:
        for layer in layers:
            short = layer.removeprefix("model.layers.").removesuffix(".mlp")
            found = _lines(steps, _at("experts", layer, "max_vio"), f" layer {short}")
            yield from map(_smoothed, found)
        return
    choices: dict[str, Callable[[Sequence[float]], float]] = {" worst layer": max, " mean": _mean}
    for suffix, choose in choices.items():
        found = _lines(steps, _over_layers(choose), suffix)
        yield from map(_smoothed, found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
