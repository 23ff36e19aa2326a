"""Arguments that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from enum import StrEnum
from types import GenericAlias
from typing import Annotated, Any

import typer

from runtime.train.options import declared


class Format(StrEnum):
    """How results and problems are printed: as text for people, as JSON for tools."""

    text = "text"
    json = "json"


class TargetName(StrEnum):
    """The GPUs that have kernels: the names of `backends.triton.target`."""

    sm_90 = "sm_90"
    sm_100 = "sm_100"
    gfx942 = "gfx942"


class BuildTarget(StrEnum):
    """What a build can have code for besides torch: those GPUs, and CPUs that serve."""

    sm_90 = "sm_90"
    sm_100 = "sm_100"
    gfx942 = "gfx942"
    cpu = "cpu"


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
DeviceOption = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:N [a GPU if there is one].", show_default=False),
]
FormatOption = Annotated[
    Format, typer.Option("--format", help="Print text, or JSON on standard output.")
]


def with_declared(
    run: Callable[..., Any], options: type[Any], without: Collection[str] = ()
) -> inspect.Signature:
    """The parameters that typer reads: those of `run`, with declared options in place of `given`.

    What must be given comes first.
    """
    own = inspect.signature(run, eval_str=True).parameters.values()
    found = [one for one in own if one.kind is not one.VAR_KEYWORD]
    needed = [one for one in found if one.default is one.empty]
    others = [one for one in found if one.default is not one.empty]
    for one in declared(options):
        if one.name in without:
            continue
        option = typer.Option(
            f"--{one.name.replace('_', '-')}",
            help=one.option.help,
            metavar=one.option.metavar,
            min=one.option.minimum,
            max=one.option.maximum,
            show_default=False,
        )
        parameter = inspect.Parameter(
            one.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if one.required else None,
            annotation=Annotated[
                GenericAlias(list, (one.kind,)) if one.repeatable else one.kind, option
            ],
        )
        (needed if one.required else others).append(parameter)
    return inspect.Signature([*needed, *others])
