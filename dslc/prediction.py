"""How `dslc plan` shows a predicted step, term by term, and compared with what a run measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compiler.pipeline import Compiled
    from compiler.plan.plan import Plan
    from compiler.plan.predict import Prediction
    from dsl.load import Description

Row = tuple[str, ...]

OVERLAP = (
    "A forward and a backward chunk that the schedule pairs compute in turn, while the other one's"
    " tokens travel; a chunk alone hides nothing of its dispatch and combine. Products that are"
    " gradients of weights are computed where the schedule has them, and in pairs before a chunk"
    " waits for its tokens. Messages between stages are sent beside computing. Sums of gradients,"
    " update and gathering of weights come after the last chunk. Experts are in balance.",
)


@dataclass(frozen=True)
class Steps:
    """The step at the rates of the cluster file, and at those of the calibration `name`.

    `reason` says why it cannot be predicted, if there are rates but not all that it needs.
    """

    planned: Prediction | None = None
    calibrated: Prediction | None = None
    name: str = ""
    reason: str = ""

    @property
    def best(self) -> Prediction | None:
        return self.calibrated or self.planned

    @property
    def words(self) -> str:
        """In one line."""
        return line(self.best, self.name) if self.best else self.reason


def predictions(
    plan: Plan, description: Description, compiled: Compiled, measured: str | None, *, both: bool
) -> Steps:
    """By the calibration in the file `measured`, without it by that beside the cluster file.

    At the rates of the cluster file if there is none, or for `both`. Raises `DiagnosticError`.
    """
    from compiler.plan.predict import predict
    from compiler.plan.rates import NoRate, Rates
    from compiler.roles import roles
    from dsl.measured import calibration_of

    found = calibration_of(description, measured)
    if found is None and plan.cluster.flops.bf16 is None:
        return Steps()
    programs = list(roles(description, compiled.lowered, plan.layout))

    def made(rates: Rates) -> tuple[Prediction | None, str]:
        try:
            return predict(plan, programs, rates), ""
        except NoRate as error:
            return None, f"not known: {error}"

    planned, reason = made(Rates(plan.cluster)) if found is None or both else (None, "")
    if found is None:
        return Steps(planned, reason=reason)
    calibrated, reason = made(Rates(plan.cluster, found[0]))
    return Steps(planned, calibrated, found[1] if calibrated else "", reason)


def line(prediction: Prediction, name: str) -> str:
    """The step in one line, `name` being that of the calibration."""
    from dsl.units import format_count

    parallel = prediction.plan.parallel
    rate = format_count(parallel.batch * parallel.sequence_length / prediction.step)
    mfu = f", MFU {prediction.mfu:.1%}" if prediction.mfu is not None else ""
    where = f"rates of {name}" if name else "peak rates and full bandwidths"
    return f"{seconds(prediction.step)} s or {rate} tokens/s{mfu}, by the {where}"


def seconds(value: float) -> str:
    """Two digits after the point, or three significant ones."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def why_rows(prediction: Prediction) -> Iterator[Row]:
    """What the step consists of, each cause added to those above it."""
    yield ("of the predicted step", "s with it", "s more")
    before = 0.0
    for one in prediction.added:
        yield (one.cause, seconds(one.step), f"{one.step - before:+.2f}" if before else "")
        before = one.step


def chunk_rows(prediction: Prediction) -> Iterator[Row]:
    """The chunks of each stage in ms: forward, gradients of inputs, and of weights."""
    from compiler.plan.rates import Term

    yield ("ms of a chunk", "stage", *(term.value for term in Term))
    names = {"F": "forward", "I": "input gradients", "W": "weight gradients"}
    shown: list[tuple[list[int], list[Row]]] = []
    for stage in range(len(prediction.times.stages)):
        rows = []
        for kind, name in names.items():
            spent = prediction.times.of_chunk(kind, stage)
            if any(spent.values()):
                rows.append((name, *(f"{1e3 * spent[term]:.2f}" for term in Term)))
        if shown and shown[-1][1] == rows:
            shown[-1][0].append(stage)
        else:
            shown.append(([stage], rows))
    for stages, rows in shown:
        words = str(stages[0]) if len(stages) == 1 else f"{stages[0]} to {stages[-1]}"
        for name, *numbers in rows:
            yield (name, words, *numbers)


def phase_rows(prediction: Prediction) -> Iterator[Row]:
    """What each pipeline rank spends a step on."""
    yield (
        "s of a step, rank",
        *("forward", "backward", "weights", "pairs", "waiting", "update", "step"),
    )
    for rank in prediction.plan.ranks:
        one = prediction.phases(rank.pipeline)
        parts = (one.forward, one.backward, one.weights, one.pairs, one.bubble, one.update)
        yield (str(rank.pipeline), *(f"{part:.2f}" for part in parts), f"{prediction.step:.2f}")


def explained(prediction: Prediction) -> str:
    """The tables of `--why` about the step."""
    from dslc.commands.show import table, wrapped

    chunks, phases = list(chunk_rows(prediction)), list(phase_rows(prediction))
    tables = (
        table(list(why_rows(prediction)), "<>>"),
        table(chunks, "<<" + ">" * (len(chunks[0]) - 2)),
        table(phases, "<" + ">" * (len(phases[0]) - 1)),
        wrapped(OVERLAP),
    )
    return "\n\n".join("\n".join(one) for one in tables)


def record(prediction: Prediction, name: str) -> dict[str, Any]:
    """For JSON; times in seconds."""
    return {
        "calibration": name or None,
        "step_seconds": round(prediction.step, 6),
        "mfu": None if prediction.mfu is None else round(prediction.mfu, 6),
        "causes": {one.cause: round(one.step, 6) for one in prediction.added},
    }


def beside(step: Steps, plan: Plan, records: Sequence[Mapping[str, Any]]) -> str:
    """The table of `--measured RUN`."""
    from dslc.commands.show import table

    return "\n".join(table(list(measured_rows(step, plan, records)), "<>>>"))


def measured_rows(step: Steps, plan: Plan, records: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Planned, calibrated and measured, of a run whose metrics are `records`.

    The first step is left out: in it kernels are compiled and buffers made.
    """
    steps = [r for r in records if "main" in r and r.get("performance")][1:]
    speed = median(r["performance"]["tokens_per_second"] for r in steps) if steps else None
    tokens = plan.parallel.batch * plan.parallel.sequence_length
    mfus = [r["performance"]["mfu"] for r in steps if r["performance"]["mfu"] is not None]

    def row(name: str, values: Sequence[float | None], form: str) -> Row:
        return (name, *("" if v is None else format(v, form) for v in values))

    guesses = [None if one is None else one.step for one in (step.planned, step.calibrated)]
    measured = tokens / speed if speed else None
    yield ("of a step", "planned", "calibrated", "measured")
    yield row("s", [*guesses, measured], ",.3f")
    yield row("tokens/s", [*(tokens / s if s else None for s in guesses), speed], ",.0f")
    mfu = [one.mfu if one else None for one in (step.planned, step.calibrated)]
    yield row("MFU", [*mfu, median(mfus) if mfus else None], ".2%")
    if steps:
        peak = max(r["performance"]["memory_bytes"] for r in steps)
        waited = median(r["performance"]["waited_least"] for r in steps)
        yield row("peak GB", [plan.fullest.memory.peak / 1e9, None, peak / 1e9], ",.3f")
        bubbles = [
            min(one.timeline.bubble(rank.pipeline) for rank in plan.ranks) if one else None
            for one in (step.planned, step.calibrated)
        ]
        yield row("waiting, s", [*bubbles, waited], ",.3f")


def is_run(given: str | None) -> bool:
    """Whether `--measured` names a run instead of a calibration."""
    return given is not None and Path(given).is_dir()
