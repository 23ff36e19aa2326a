"""The options of training, declared once for `python -m MODEL.train` and `dslc train`.

How they are declared and read serves `python -m MODEL.serve`, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Option:
    """What a command line says of an option and checks; the default is in brackets."""

    help: str
    metavar: str | None = None
    minimum: int | None = None
    maximum: float | None = None


@dataclass(frozen=True)
class Options:
    """The options of a command line. None: as the run was started, or the default in `FIXED`."""

    out: Annotated[Path, Option("The folder of the run.", "RUN")]
    data: Annotated[
        tuple[Path, ...],
        Option(
            "Text, JSON lines with a `text` or `messages` each, or a folder of tokens. Repeatable.",
            "FILE",
        ),
    ] = ()
    weights: Annotated[
        Path | None, Option("Start from these weights: a folder of safetensors.", "DIR")
    ] = None
    tokenizer: Annotated[
        str | None, Option("A tokenizer.json; by default tokens are bytes.", "FILE")
    ] = None
    chat_template: Annotated[
        Path | None,
        Option("The template of chats, in Jinja [that next to the tokenizer].", "FILE"),
    ] = None
    held_out: Annotated[
        float | None,
        Option("Share of each file, at its end, held out of training [0.1].", "SHARE", 0, 0.999),
    ] = None
    seed: Annotated[int | None, Option("Seed of initial weights and data order [0].", "N")] = None
    save_every: Annotated[int, Option("Steps between checkpoints [500].", "STEPS", 1)] = 500
    keep: Annotated[int, Option("Number of checkpoints to keep, the newest [2].", "N", 1)] = 2
    eval_every: Annotated[int, Option("Steps between evaluations [500].", "STEPS", 1)] = 500
    eval_sequences: Annotated[
        int, Option("Sequences of an evaluation; the last one takes all [64].", "N", 1)
    ] = 64
    wandb: Annotated[
        str | None,
        Option("Record metrics in this project of Weights & Biases, too.", "PROJECT"),
    ] = None
    profile: Annotated[
        int | None, Option("Write a trace of so many steps to RUN/profile.", "STEPS", 1)
    ] = None
    patience: Annotated[
        int, Option("Seconds that a rank waits for others before all end [600].", "SECONDS", 1)
    ] = 600
    device: Annotated[
        str | None, Option("cpu, cuda or cuda:N [a GPU if there is one].", "DEVICE")
    ] = None


FIXED: Mapping[str, Any] = {
    "weights": None,
    "tokenizer": "bytes",
    "chat_template": None,
    "held_out": 0.1,
    "seed": 0,
}
"""Options that cannot change during the life of a run, with their defaults."""


T = TypeVar("T")


@dataclass(frozen=True)
class Declared:
    """An option: its name, the type of a value, whether it is repeatable or must be given."""

    name: str
    kind: Any
    repeatable: bool
    required: bool
    option: Option


def declared(options: type[Any]) -> Iterator[Declared]:
    """The options that a dataclass declares."""
    required = {one.name for one in fields(options) if one.default is MISSING}
    for name, hint in get_type_hints(options, include_extras=True).items():
        kind, option = get_args(hint)
        value = (get_args(kind) or (kind,))[0]
        yield Declared(name, value, get_origin(kind) is tuple, name in required, option)


def parse(
    options: type[T],
    program: str,
    description: str,
    arguments: Sequence[str] | None,
    examples: str = "",
) -> T:
    """The options of a command line (sys.argv by default); ends the process on wrong usage."""
    import argparse  # here: dslc, which has a parser of its own, starts faster without

    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    listed = list(declared(options))
    for one in listed:
        more: dict[str, Any] = {"nargs": "+", "action": "extend"} if one.repeatable else {}
        if one.kind is bool:
            more = {"action": "store_true"}
        else:
            more |= {"type": _bounded(one.kind, one.option), "metavar": one.option.metavar}
        parser.add_argument(
            f"--{one.name.replace('_', '-')}",
            required=one.required,
            default=argparse.SUPPRESS,
            help=one.option.help,
            **more,
        )
    given = vars(parser.parse_args(arguments))
    lists = {one.name: tuple(given.get(one.name, ())) for one in listed if one.repeatable}
    return options(**{**given, **lists})


def _bounded(kind: Any, option: Option) -> Any:
    from argparse import ArgumentTypeError

    def value(text: str) -> Any:
        found = kind(text)
        if option.minimum is not None and not found >= option.minimum:
            raise ArgumentTypeError(f"must be at least {option.minimum}")
        if option.maximum is not None and not found <= option.maximum:
            raise ArgumentTypeError(f"must be at most {option.maximum}")
        return found

    value.__name__ = kind.__name__  # for the message of argparse
    return value
