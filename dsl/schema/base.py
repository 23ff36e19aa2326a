"""What every mapping with known keys is."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from dsl import yaml


class Section(BaseModel):
    """A mapping with known keys, each of which `null` leaves out, as if it was not there."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, arbitrary_types_allowed=True
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        # An unknown key stays, and is reported.
        return {k: v for k, v in data.items() if k not in cls.model_fields or not yaml.is_null(v)}
