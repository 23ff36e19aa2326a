"""Names and remarks of specs as C++ can have them."""

from __future__ import annotations

import re
import textwrap

_KEYWORDS = """
alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t
char32_t class compl concept const consteval constexpr constinit const_cast continue co_await
co_return co_yield decltype default delete do double dynamic_cast else enum explicit export extern
false float for friend goto if inline int long mutable namespace new noexcept not not_eq nullptr
operator or or_eq private protected public register reinterpret_cast requires return short signed
sizeof static static_assert static_cast struct switch template this thread_local throw true try
typedef typeid typename union unsigned using virtual void volatile wchar_t while xor xor_eq
"""
RESERVED = frozenset(_KEYWORDS.split()) | {
    "s", "arena", "bound", "layer", "next", "run", "op", "std", "main", "call", "Weight", "Entry",
    "Product", "Fp8Product", "Step", "Arena", "Bound", "Rows", "Heads", "Ints", "Matrix",
    "Matrices", "Vector", "Pool", "Table", "linux", "unix",
}  # fmt: skip


def identifier(name: str) -> str:
    """`name`, or with one more `_` where C++ or generated code needs it; different names stay
    different."""
    return f"{name}_" if name.rstrip("_") in RESERVED else name


def comment(text: str) -> list[str]:
    """Text of a spec as lines of comment, which nothing in it can end or continue."""
    lines = [re.sub(r"[^\x20-\x7e]", "?", line).rstrip(" \\") for line in text.splitlines()]
    wrapped = (part for line in lines for part in (textwrap.wrap(line, 96) or [""]))
    return [f"// {line}".rstrip(" \\") for line in wrapped]
