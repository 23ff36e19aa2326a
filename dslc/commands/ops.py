"""`dslc ops`: the functions that a block may use, and the operators that a graph is made of."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from compiler.ops import Operator

EXAMPLES = """
\b
Examples:
  dslc ops                one line for each
  dslc ops topk_groups    all about one
"""


def run(
    name: Annotated[
        str | None, typer.Argument(help="A function or operator.", show_default=False)
    ] = None,
) -> None:
    """List what blocks and graphs are made of, or explain one."""
    from compiler.lower.forms import FORMS
    from compiler.ops import OPS
    from dslc.report import reporting

    with reporting():
        if name is None:
            print_table("Functions of the block language:", {k: f.about for k, f in FORMS.items()})
            only = {kind: summary(op) for kind, op in OPS.items() if kind not in FORMS}
            print()
            print_table("Operators found in graphs only:", only)
        elif name in FORMS or name in OPS:
            print("\n\n".join(explained(name)))
        else:
            raise unknown(name, [*FORMS, *OPS])


def print_table(title: str, rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    print(title)
    for name, text in rows.items():
        print(f"  {name:<{width}}  {text}")


def summary(operator: type[Operator]) -> str:
    return inspect.cleandoc(operator.__doc__ or "").splitlines()[0]


def explained(name: str) -> list[str]:
    """How a block writes it, how a graph prints it, and what it means."""
    from compiler.lower.forms import FORMS
    from compiler.ops import OPS

    parts = []
    if name in FORMS:
        form = FORMS[name]
        parts.append(f"In a block: {name}({form.signature})\n  {form.about}")
    if name in OPS:
        operator = OPS[name]
        operands = [*operator.operands, *(f"@{symbol}" for symbol in operator.symbols)]
        operands += [".."] if operator.variadic else []
        attrs = ", ".join(f"{attr}: {kind.__name__}" for attr, kind in operator.attrs.items())
        line = f"In a graph: {name}({', '.join(operands)})" + (f" <{attrs}>" if attrs else "")
        parts += [line, inspect.cleandoc(operator.__doc__ or "")]
    return parts


def unknown(name: str, known: list[str]) -> Exception:
    from dsl.diagnostic import Diagnostic, DiagnosticError
    from dsl.suggest import did_you_mean

    help = did_you_mean(name, known) or "`dslc ops` lists them all"
    return DiagnosticError([Diagnostic("E691", f"there is no operator {name!r}", help=help)])
