"""Long expressions over several lines, as a formatter would break them."""

from __future__ import annotations

from dataclasses import dataclass

WIDTH = 92
"""Columns of the body of a method, which is indented by 8: lines end at column 100."""


@dataclass(frozen=True)
class CallText:
    """`head(items)`; an item is a text or a call, with or without a keyword."""

    head: str
    items: tuple[tuple[str, CallText | str], ...]
    close: str = ")"

    def flat(self) -> str:
        return self.head + ", ".join(k + flat(v) for k, v in self.items) + self.close


def flat(node: CallText | str) -> str:
    return node if isinstance(node, str) else node.flat()


def lay_out(prefix: str, node: CallText | str, indent: int = 0, suffix: str = "") -> list[str]:
    """Lines of `prefix node suffix`: one if it fits, else all items on one, or one for each."""
    space = " " * indent
    line = f"{space}{prefix}{flat(node)}{suffix}"
    if isinstance(node, str) or len(line) <= WIDTH:
        return [line]
    inside = f"{space}    {', '.join(k + flat(v) for k, v in node.items)}"
    if len(inside) <= WIDTH:
        return [f"{space}{prefix}{node.head}", inside, f"{space}{node.close}{suffix}"]
    lines = [f"{space}{prefix}{node.head}"]
    for keyword, value in node.items:
        lines += lay_out(keyword, value, indent + 4, ",")
    return [*lines, f"{space}{node.close}{suffix}"]


def parse_call(text: str) -> CallText | str:
    """`f(a, b=g(c))` as a tree of calls at its last opening level; other text as it is."""
    if not text.endswith(")") or "(" not in text:
        return text
    start = text.index("(")
    if _closing(text, start) != len(text) - 1:
        return text
    items = tuple(_keyword(part) for part in split_arguments(text[start + 1 : -1]))
    return CallText(text[: start + 1], items)


def _keyword(part: str) -> tuple[str, str]:
    name, equals, value = part.partition("=")
    return (f"{name}=", value) if equals and name.isidentifier() else ("", part)


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    return -1


def _is_lambda(part: str) -> bool:
    """Whether a text ends among the arguments of a `lambda`."""
    return "lambda " in part and ":" not in part


def split_arguments(text: str) -> list[str]:
    """`a, (b, c), d` cut at its outer commas."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0 and not _is_lambda(text[start:i]):
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [p for p in parts if p]
