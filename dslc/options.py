"""Arguments that several commands share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Format(StrEnum):
    """How results and problems are printed: as text for people, as JSON for tools."""

    text = "text"
    json = "json"


class TargetName(StrEnum):
    """The GPUs that have kernels: the names of `backends.triton.target`."""

    sm_90 = "sm_90"
    sm_100 = "sm_100"
    gfx942 = "gfx942"


SpecArgument = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help="A spec file, or the name of a shipped one (deepseek_v3).",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Replace one value, e.g. params.n_routed_experts=128. Repeatable.",
        show_default=False,
    ),
]
VariantOption = Annotated[
    list[str] | None,
    typer.Option(
        "--variant",
        metavar="NAME",
        help="Use a variant of the spec. Repeatable: variants combine.",
        show_default=False,
    ),
]
SkipOption = Annotated[
    list[str] | None,
    typer.Option(
        "--skip",
        metavar="PASS",
        help="Skip a pass, for debugging. Repeatable.",
        show_default=False,
    ),
]
UntilOption = Annotated[
    str | None,
    typer.Option(
        "--only-until",
        metavar="PASS",
        help="Skip the passes after this one, except essential ones.",
        show_default=False,
    ),
]
FormatOption = Annotated[
    Format, typer.Option("--format", help="Print text, or JSON on standard output.")
]
