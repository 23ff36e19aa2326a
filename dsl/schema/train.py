"""The section `train` of a spec, and the schedules in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, Literal, NoReturn, get_args

from pydantic import Field, GetJsonSchemaHandler, RootModel, field_validator, model_validator
from pydantic_core import CoreSchema, PydanticCustomError

from dsl import yaml
from dsl.schema.base import Section
from dsl.schema.values import EXPRESSION, Flag, Number, choice

Shape = Literal["linear", "cosine"]


class Phase(Section):
    """One phase of a schedule, up to `until` tokens or `until_step` steps; the last has no end."""

    until: Annotated[int | None, Number("until", 1)] = Field(
        None, description="Tokens seen at which this phase ends; the last phase has none"
    )
    until_step: Annotated[int | None, Number("until_step", 1)] = Field(
        None, description="Or the steps made at which it ends, where the trainer reads the schedule"
    )
    start: Annotated[float | None, Number("start", 0, whole=False)] = Field(
        None, description="The value at the beginning, which moves to `value` during the phase"
    )
    value: Annotated[float, Number("value", 0, whole=False)] = Field(
        description="The value during the phase, or at its end"
    )
    shape: Annotated[Shape, choice(*get_args(Shape))] = Field(
        "linear", description="How it moves from `start`: linear or cosine"
    )

    @property
    def end(self) -> int | None:
        return self.until if self.until_step is None else self.until_step


class Schedule(RootModel[tuple[Phase, ...]]):
    """A number that may change with the tokens seen in training, or with its steps."""

    model_config = {"strict": True, "frozen": True}

    @model_validator(mode="before")
    @classmethod
    def _wrap(cls, data: object) -> object:
        if isinstance(data, dict):
            wanted = "a number or a list of phases"
            raise PydanticCustomError("wanted", "{wanted}", {"wanted": wanted})
        return ({"value": data},) if isinstance(data, yaml.Scalar) else data

    @model_validator(mode="after")
    def _sound(self) -> Schedule:
        problem = next(_problems(self.root), None)
        if problem:
            _refuse(*problem)
        return self

    def value_at(self, tokens: int, steps: int = 0) -> float:
        """The value after so many tokens and steps; at its end a phase is over."""
        begin: dict[bool, int] = {}
        for phase in self.root:
            by_step = phase.until_step is not None
            seen = steps if by_step else tokens
            if phase.end is None or seen < phase.end:
                return _within(phase, seen, begin.get(by_step, 0))
            begin[by_step] = phase.end
        raise AssertionError("the last phase has no end")

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        phases = handler(schema)
        number = {"type": ["number", "string"], "description": EXPRESSION}
        return {"description": cls.__doc__, "anyOf": [number, phases]}


def _within(phase: Phase, seen: int, begin: int) -> float:
    if phase.start is None or phase.end is None:
        return phase.value
    done = (seen - begin) / (phase.end - begin)
    if phase.shape == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return phase.start + (phase.value - phase.start) * done


def _problems(phases: tuple[Phase, ...]) -> Iterator[tuple[str, str]]:
    """(message, help) of what makes a list of phases no schedule."""
    if not phases or phases[-1].end is not None:
        yield "its last phase must have no `until`", "add one such as {value: 0}"
    if any(phase.until is not None and phase.until_step is not None for phase in phases):
        yield "a phase has both `until` and `until_step`", "keep one of the two"
    if any(phase.end is None for phase in phases[:-1]):
        yield "all phases but the last need `until`", "add the tokens at their end"
    for kind in ("until", "until_step"):
        ends = [end for phase in phases if (end := getattr(phase, kind)) is not None]
        if any(a >= b for a, b in pairwise(ends)):
            yield "its phases must ascend", f"order them by `{kind}`"
    if any(phase.start is None and phase.shape != "linear" for phase in phases):
        yield "a `shape` without `start` has no effect", "add the value that the phase starts from"
    if any(phase.start is not None and phase.end is None for phase in phases):
        yield "a phase with `start` needs an end", "add the tokens by which it reaches `value`"
    for before, phase in pairwise(phases):
        if phase.start is not None and (before.until is None) != (phase.until is None):
            help = "end both by `until` or both by `until_step`"
            yield "a phase with `start` begins where another ends in another unit", help


def _refuse(message: str, help: str) -> NoReturn:
    raise PydanticCustomError("schedule", "{message}", {"message": message, "help": help})


def constant(value: float) -> Schedule:
    """A schedule that never changes."""
    phase = Phase.model_construct(
        until=None, until_step=None, start=None, value=value, shape="linear"
    )
    return Schedule.model_construct((phase,))


class Loss(Section):
    """Weights of the parts of the training loss."""

    mtp_weight: Schedule = Field(
        default_factory=lambda: constant(0.3),
        description="Weight of multi-token prediction (report, equation 25)",
    )
    balance_alpha: Annotated[float, Number("balance_alpha", 0, whole=False)] = Field(
        0.0, description="Weight of the sequence-wise balance loss (report, equations 17 to 20)"
    )

    @field_validator("mtp_weight")
    @classmethod
    def _by_tokens(cls, schedule: Schedule) -> Schedule:
        # A model knows the tokens seen; only the trainer knows steps.
        if any(phase.until_step is not None for phase in schedule.root):
            _refuse("it goes by tokens only", "end its phases by `until`")
        return schedule


class Optimizer(Section):
    """AdamW (arXiv 1711.05101), with the values of the report's section 4.2."""

    beta1: Annotated[float, Number("beta1", 0, whole=False, maximum=1)] = Field(
        0.9, description="How much of the mean of gradients a step keeps"
    )
    beta2: Annotated[float, Number("beta2", 0, whole=False, maximum=1)] = Field(
        0.95, description="The same of the mean of their squares"
    )
    eps: Annotated[float, Number("eps", 0, whole=False)] = Field(
        1e-8, description="Added to the root of the mean of squares (not in the report)"
    )
    weight_decay: Annotated[float, Number("weight_decay", 0, whole=False)] = Field(
        0.1, description="Share of a matrix taken off in a step, times the learning rate"
    )
    clip: Annotated[float, Number("clip", 0, whole=False)] = Field(
        1.0, description="The largest norm of all gradients together; 0: any"
    )


class FillInTheMiddle(Section):
    """Documents as `begin prefix hole suffix end middle` (arXiv 2207.14255)."""

    rate: Annotated[float, Number("rate", 0, whole=False, maximum=1)] = Field(
        description="The share of documents that are rearranged"
    )
    begin: Annotated[int, Number("begin")] = Field(description="The token before the prefix")
    hole: Annotated[int, Number("hole")] = Field(description="The token before the suffix")
    end: Annotated[int, Number("end")] = Field(description="The token before the middle")


class SavedFormats(Section):
    """Formats in which activations are saved for the backward pass; without one as computed."""

    attention: Annotated[Literal["e5m6"] | None, choice("e5m6")] = Field(
        None, description="e5m6: results of attention in 12 bits (report, 3.3.3)"
    )
    experts: Annotated[Literal["fp8"] | None, choice("fp8")] = Field(
        None, description="fp8: inputs of the activation of routed experts in FP8 (report, 3.3.3)"
    )


class Train(Section):
    """How the model is initialized and trained."""

    initializer_range: Annotated[float, Number("initializer_range", 0, whole=False)] = Field(
        0.02, description="Standard deviation of random weights"
    )
    loss: Loss = Field(default_factory=Loss, description="The loss")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="The optimizer, AdamW")
    learning_rate: Schedule | None = Field(None, description="The learning rate")
    bias_update: Schedule = Field(
        default_factory=lambda: constant(0.001),
        description="By how much the routing bias of an expert moves in a step (report, 2.1.2)",
    )
    sequence_length: Annotated[int | None, Number("sequence_length", 1)] = Field(
        None, description="Tokens of a training sequence; by default that of `parallel`"
    )
    batch: Schedule | None = Field(
        None, description="Sequences of a step, all ranks together; by default that of `parallel`"
    )
    micro_batch: Annotated[int | None, Number("micro_batch", 1)] = Field(
        None,
        description="Sequences that one rank computes at a time; their gradients are added up. By "
        "default that of `parallel`, or all at once",
    )
    steps: Annotated[int | None, Number("steps", 1)] = Field(
        None, description="Steps after which training ends"
    )
    tokens: Annotated[int | None, Number("tokens", 1)] = Field(
        None, description="Tokens after which it ends; of both, what comes first"
    )
    document_mask: Flag = Field(
        False,
        description="true: attention does not reach over the end of a document, "
        "`sequence.eos_token_id`; false: it does, as in DeepSeek-V3 (report, 4.1)",
    )
    fim: FillInTheMiddle | None = Field(None, description="Fill in the middle")
    ema: Annotated[float | None, Number("ema", 0, whole=False, maximum=1)] = Field(
        None, description="Decay of an exponential moving average of the weights"
    )
    saved_bytes_per_token: Annotated[int | None, Number("saved_bytes_per_token", 0)] = Field(
        None,
        description="What all layers together may save of one token for the backward pass, in "
        "bytes; the rest is recomputed. Without it norms, pointwise functions and the "
        "up-projections of latents are",
    )
    saved_formats: SavedFormats = Field(
        default_factory=SavedFormats,
        description="Formats in which some activations are saved for the backward pass",
    )
