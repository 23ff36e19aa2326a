"""Syntax errors of the block language and of expressions, in the words of people."""

from __future__ import annotations

from lark import Token
from lark.exceptions import LarkError, UnexpectedCharacters, UnexpectedToken
from lark.indenter import DedentError

from dsl.diagnostic import Diagnostic
from dsl.source import Source
from dsl.suggest import nearest

KEYWORDS = (
    "block",
    "extern",
    "params",
    "slots",
    "require",
    "let",
    "collect",
    "alias",
    "if",
    "elif",
    "else",
    "for",
    "repeat",
    "in",
    "return",
    "output",
    "and",
    "or",
    "not",
    "true",
    "false",
)

MAX_EXPECTED = 6

# Names of terminals; those that are not here are words of the language.
_READABLE = {
    "_NEWLINE": "the end of the line",
    "_INDENT": "an indented line",
    "_DEDENT": "the end of the indented part",
    "$END": "the end of the text",
    "NAME": "a name",
    "NUMBER": "a number",
    "TEXT": "quoted text",
    "BOOLEAN": "`true` or `false`",
    "DTYPE": "an element type",
    "DOCSTRING": "a docstring",
    "COMPARE": "a comparison",
    "LPAR": "`(`",
    "RPAR": "`)`",
    "LSQB": "`[`",
    "RSQB": "`]`",
    "LBRACE": "`{`",
    "RBRACE": "`}`",
    "COMMA": "`,`",
    "COLON": "`:`",
    "EQUAL": "`=`",
    "DOT": "`.`",
    "ANY": "`..`",
    "PLUS": "`+`",
    "MINUS": "`-`",
    "STAR": "`*`",
    "SLASH": "`/`",
    "PERCENT": "`%`",
    "POWER": "`**`",
    "__ANON_0": "`->`",
}


def syntax_error(error: LarkError, source: Source, start: int, end: int) -> Diagnostic:
    """What is wrong between two offsets of `source`, and the place."""
    if isinstance(error, DedentError):
        return Diagnostic(
            "E202",
            "the indentation of a line in this block fits no line above it",
            source.span(start, start + 5),
            "in this block",
            help="indent by two spaces a level, and never by tabs",
        )
    if isinstance(error, UnexpectedCharacters):
        at = start + (error.pos_in_stream or 0)
        char = source.text[at : at + 1]
        return Diagnostic(
            "E203",
            f"the character {char!r} has no meaning here",
            source.span(at, at + 1),
            "not understood",
            help=_character_help(char),
        )
    if isinstance(error, UnexpectedToken):
        token = error.token
        if token.type == "$END":
            at = len(source.text[start:end].rstrip()) + start
            span = source.span(at, at)
        else:
            at = start + (token.start_pos or 0)
            span = source.span(at, at + max(1, len(str(token).split("\n")[0])))
        return Diagnostic(
            "E203",
            f"expected {_expected(error)}, found {_found(token)}",
            span,
            "here",
            help=_token_help(token, error),
        )
    return Diagnostic("E203", "this is not understood", source.span(start, end))


def _character_help(char: str) -> str:
    return {
        '"': "text is written between two quotes on one line",
        "'": "text is written between two quotes on one line",
        "=": "compare with `==`; set an argument with `name = value` inside parentheses",
        "&": "write `and`",
        "|": "write `or`",
        "!": "write `not`, or `!=`",
        "\t": "indent by spaces",
        ".": "a number has digits on both sides of its point",
    }.get(char, "remove it")


def _found(token: Token) -> str:
    if token.type in ("_NEWLINE", "_INDENT", "_DEDENT", "$END"):
        return _READABLE[token.type]
    return f"`{token}`"


def _expected(error: UnexpectedToken) -> str:
    words = list(dict.fromkeys(_READABLE.get(n, f"`{n.lower()}`") for n in sorted(error.expected)))
    # A longer list of possibilities does not help.
    if len(words) > MAX_EXPECTED:
        return "an operator or the end of the expression" if "`)`" in words else "an expression"
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _token_help(token: Token, error: UnexpectedToken) -> str:
    if token.type == "NAME" and {"LET", "RETURN"} & set(error.expected):
        near = nearest(str(token), KEYWORDS)
        if near:
            return f"did you mean `{near}`?"
    if str(token) in KEYWORDS and "NAME" in error.expected:
        return f"`{token}` is a word of the language; choose another name"
    if token.type == "EQUAL":
        return "an expression compares with `==`"
    return ""
