"""What a traffic file says: the requests that a served model is planned for."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dsl.schema.base import Section
from dsl.schema.values import Number, Numbers, Text


class Unit(Section):
    """The GPUs that share the routed experts; each holds as many of every layer."""

    expert: Annotated[int, Number("expert", 1)] = Field(description="How many GPUs")
    redundant: Annotated[int, Number("redundant")] = Field(
        0, description="Copies of experts besides one of each, in every layer"
    )


class Measured(Section):
    """Rates that were measured, in tokens a second and node."""

    prefill: Annotated[int | None, Number("prefill", 1)] = Field(
        None, description="Of input tokens, those found in the prefix cache included"
    )
    decode: Annotated[int | None, Number("decode", 1)] = Field(None, description="Of output tokens")


class Traffic(Section):
    """A day of requests, and the units of GPUs that serve them."""

    traffic: Text = Field(description="Name of the traffic")
    about: Text = Field("", description="One line for people")
    input_tokens: Annotated[int, Number("input_tokens", 1)] = Field(
        description="Tokens of prompts in a day"
    )
    cached: Annotated[float, Number("cached", 0, whole=False, maximum=1)] = Field(
        0.0, description="The share of them that is found in the prefix cache"
    )
    output_tokens: Annotated[int, Number("output_tokens", 1)] = Field(
        description="Tokens of answers in a day"
    )
    context: Annotated[int, Number("context", 1)] = Field(
        description="Mean tokens of cache of a token of an answer"
    )
    prefill_context: Annotated[int, Number("prefill_context", 1)] = Field(
        description="Mean keys that a computed token of a prompt sees"
    )
    requests: Annotated[int | tuple[int, ...], Numbers("requests", 1)] = Field(
        description="Requests that decode on each GPU at a time: a row of the table for each"
    )
    decode: Unit = Field(description="The GPUs of a unit that decodes")
    prefill: Unit = Field(description="The GPUs of a unit that computes prompts")
    measured: Measured = Field(
        default_factory=Measured, description="For the number of nodes, in place of the bounds"
    )
