"""What a study file says: which spec, what is varied, how often, and what is held equal."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from dsl.schema.base import Section
from dsl.schema.values import Number, Text, choice

# Mappings of paths to values: `dsl.study` reads them from the tree, which knows their places.
Changes = Annotated[Any, BeforeValidator(lambda node: node), WithJsonSchema({"type": "object"})]


class Budget(Section):
    """What all configurations have in common besides the tokens they are trained on."""

    hold: Annotated[str, choice("tokens", "active_flops", "parameters")] = Field(
        "tokens",
        description="Equal for all: tokens; training FLOPs, by tokens; parameters, by `solve`",
    )
    solve: Text | None = Field(
        None, description="With `parameters`: the path of a whole number that is solved for"
    )


class StudyFile(Section):
    """A study: configurations of one spec, each trained with several seeds."""

    study: Text = Field(description="Name of the study")
    about: Text = Field("", description="The question, in one line")
    spec: Text = Field(description="The spec: a path relative to this file, or a shipped name")
    data: tuple[Text, ...] = Field(
        min_length=1, description="Texts to train on, relative to this file"
    )
    tokenizer: Text | None = Field(None, description="A tokenizer.json, relative to this file")
    set: Changes = Field(None, description="Values of every run, by path")
    factors: Changes = Field(
        description="What is varied: named levels with their changes, or a path and its values"
    )
    design: Annotated[str, choice("one_at_a_time", "grid")] = Field(
        "one_at_a_time", description="Each level alone against the baseline, or all combinations"
    )
    runs: Changes = Field(None, description="Instead of `design`: the combinations, one by one")
    seeds: tuple[Annotated[int, Number("seeds")], ...] = Field(
        (0, 1, 2), min_length=1, description="Seeds of each configuration"
    )
    budget: Budget = Field(default_factory=Budget, description="What is held equal")
