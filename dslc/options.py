"""The arguments that commands share, so that each means the same everywhere."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Format(StrEnum):
    """How results and problems are printed: for people, or for tools."""

    text = "text"
    json = "json"


class TargetName(StrEnum):
    """The GPUs that kernels are written for, as `backends.triton.target` knows them."""

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
    str | None,
    typer.Option(
        "--variant", metavar="NAME", help="Use a variant that the spec names.", show_default=False
    ),
]
SkipOption = Annotated[
    list[str] | None,
    typer.Option(
        "--skip",
        metavar="PASS",
        help="Leave a pass out, for debugging. Repeatable.",
        show_default=False,
    ),
]
UntilOption = Annotated[
    str | None,
    typer.Option(
        "--only-until",
        metavar="PASS",
        help="Leave out what follows this pass, but for essential passes.",
        show_default=False,
    ),
]
FormatOption = Annotated[
    Format, typer.Option("--format", help="Print for people, or as JSON on standard output.")
]
