"""Templates to text: logic in Python, shape in Jinja."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def environment() -> Environment:
    """Python templates: unknown names are errors, tags leave no blank lines behind."""
    return Environment(
        loader=PackageLoader("backends", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # these templates make Python; report.html has an environment of its own
    )


def render(template: str, **facts: Any) -> str:
    """The text of a template, named by its path below `backends/`."""
    return environment().get_template(template).render(**facts)
