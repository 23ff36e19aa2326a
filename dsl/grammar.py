"""The parser of the block language, loaded from tables that are computed in advance.

Computing the LALR tables of `block.lark` takes longer than compiling a small model. They are stored
next to it, as JSON rather than Lark's own pickle. After a change of the grammar `make golden`, or
`python -m dsl.grammar`, writes them again; a test compares them with the grammar.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from lark import Lark
from lark.grammar import Rule
from lark.indenter import Indenter
from lark.lexer import TerminalDef

GRAMMAR = Path(__file__).with_name("block.lark")
TABLES = Path(__file__).with_name("block.tables.json")
SHIFT = 0  # the kind of an action of the table: to a state; the other kind reduces by a rule


class _Indentation(Indenter):
    NL_type = "_NEWLINE"
    OPEN_PAREN_types = ["LPAR", "LSQB", "LBRACE"]  # noqa: RUF012
    CLOSE_PAREN_types = ["RPAR", "RSQB", "RBRACE"]  # noqa: RUF012
    INDENT_type = "_INDENT"
    DEDENT_type = "_DEDENT"
    tab_len = 8


@cache
def grammar() -> Lark:
    """The parser; its start is `block`, `extern` or `expression_only`."""
    tables = json.loads(TABLES.read_text(encoding="utf-8"), object_hook=_numbered)
    # What Lark's stand-alone parsers call; `Lark.load` takes pickles only.
    parser: Lark = Lark._load_from_dict(*tables, postlex=_Indentation())  # type: ignore[no-untyped-call]
    return parser


def compute_tables() -> str:
    """The text of `block.tables.json`.

    Raises `GrammarError` where `block.lark` is ambiguous; that needs the library interegular.
    """
    parser = Lark(
        GRAMMAR.read_text(encoding="utf-8"),
        parser="lalr",
        start=["block", "extern", "expression_only"],
        postlex=_Indentation(),
        propagate_positions=True,
        maybe_placeholders=True,
        strict=True,
    )
    data, memo = parser.memo_serialize([TerminalDef, Rule])
    data["options"] |= {"postlex": None, "strict": False}
    _sort(data["parser"]["parser"])
    return json.dumps([data, memo], separators=(",", ":")) + "\n"


def _sort(table: dict[str, Any]) -> None:
    """Numbers tokens by name, and states as they are reached: Lark's order is that of its sets."""
    names = table["tokens"]
    states = {
        state: sorted((names[token], *action) for token, action in actions.items())
        for state, actions in table["states"].items()
    }
    reached = [state for _, state in sorted(table["start_states"].items())]
    for state in reached:  # it grows
        to = dict.fromkeys(to for _, what, to in states[state] if what == SHIFT)
        reached += [state for state in to if state not in reached]
    number = {state: i for i, state in enumerate(reached)}
    token = {name: i for i, name in enumerate(sorted(names.values()))}
    table["tokens"] = {i: name for name, i in token.items()}
    table["states"] = {
        number[state]: {
            token[name]: (what, number[to] if what == SHIFT else to)
            for name, what, to in states[state]
        }
        for state in reached
    }
    for ends in ("start_states", "end_states"):
        table[ends] = {start: number[state] for start, state in sorted(table[ends].items())}


def _numbered(entries: dict[str, Any]) -> dict[str | int, Any]:
    """Restores numbers as keys, which JSON turns into texts."""
    return {int(key) if key.isdecimal() else key: value for key, value in entries.items()}


if __name__ == "__main__":
    TABLES.write_text(compute_tables(), encoding="utf-8")
