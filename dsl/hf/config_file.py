"""`config.json` files: JSON with exact positions, in which every key must be read."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, NoReturn

from dsl.diagnostic import Diagnostics
from dsl.source import Source, Span

Spans = Mapping[tuple[str, ...], Span]
# Known features of other models, so that the refusal can say what the key would do.
FEATURES = {
    "index_": "sparse attention with an indexer (DeepSeek-V3.2)",
    "vision_": "image input",
    "audio_": "audio input",
    "text_config": "a model of several parts; give the config of the language model alone",
    "sliding_window": "attention over a window",
    "layer_types": "layers with different attention",
}

# Far above every count and size; beyond it arithmetic on a config could overflow.
MAX_NUMBER = 1e30

_SPACE = re.compile(r"[ \t\r\n]*")


def read_config(source: Source) -> dict[str, Any]:
    """The JSON object of `source`; DiagnosticError if it is none, or gives a key twice."""
    problems = Diagnostics()
    repeated: set[str] = set()

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        repeated.update(key for key, count in counts.items() if count > 1)
        return dict(pairs)

    value: Any = None
    try:
        value = json.loads(source.text, object_pairs_hook=members, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        message = f"not valid JSON: {error.msg}"
        problems.error("E130", message, source.span(error.pos, error.pos + 1))
    except (ValueError, RecursionError) as error:
        problems.error("E130", f"not valid JSON: {error}", source.span(0, 1))
    else:
        if not isinstance(value, dict):
            problems.error("E130", "a config is a JSON object", source.span(0, 1))
    for key in sorted(repeated):
        at = source.text.rfind(json.dumps(key, ensure_ascii=False))
        span = source.span(at, at + len(key) + 2) if at >= 0 else None
        problems.error("E130", f"the key `{key}` is given twice", span)
    problems.raise_if_any()
    return dict(value)


def spans_of(source: Source) -> Spans:
    """The place of each key of a JSON object, by path; () is the object itself.

    Exact for a text that `read_config` accepts; of another text as much as can be read.
    """
    spans: dict[tuple[str, ...], Span] = {}
    try:
        _walk(source, _skip(source.text, 0), (), spans)
    except (ValueError, IndexError, RecursionError):
        return spans
    return spans


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")


def _walk(
    source: Source, at: int, path: tuple[str, ...], spans: dict[tuple[str, ...], Span]
) -> int:
    """Records the keys of the value at `at`; where it ends."""
    text, decode = source.text, json.JSONDecoder().raw_decode
    if text[at] != "{":
        return int(decode(text, at)[1])
    spans.setdefault(path, source.span(at, at + 1))
    at = _skip(text, at + 1)
    while text[at] != "}":
        key, end = decode(text, at)
        spans[*path, key] = source.span(at, end)
        value = _skip(text, _skip(text, end) + 1)  # after the colon
        at = _skip(text, _walk(source, value, (*path, key), spans))
        if text[at] == ",":
            at = _skip(text, at + 1)
    return at + 1


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


class Reader:
    """Takes keys from a JSON object; what was not taken is refused by name at the end."""

    def __init__(
        self,
        config: Mapping[str, Any],
        spans: Spans,
        problems: Diagnostics,
        path: tuple[str, ...] = (),
    ) -> None:
        self.config, self.spans, self.problems, self.path = config, spans, problems, path
        self.taken: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        """The value, with null read as absent (as transformers does)."""
        self.taken.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def sub(self, key: str) -> Reader:
        """A nested object; an absent one reads as empty."""
        value = self.take(key, {})
        if not isinstance(value, dict):
            self.refuse(key, f"`{key}` must be an object, not {shown(value)}")
            value = {}
        return Reader(value, self.spans, self.problems, (*self.path, key))

    def refuse(self, key: str, message: str, help: str = "", code: str = "E381") -> None:
        span = self.spans.get((*self.path, key)) or self.spans.get(self.path)
        self.problems.error(code, message, span, help=help)

    def number(self, key: str, default: float | None = None, minimum: float = 0) -> float:
        return self._number(key, default, minimum, "a number", int | float)

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        return int(self._number(key, default, minimum, "an integer", int))

    def _number(
        self, key: str, default: float | None, minimum: float, what: str, kind: type | UnionType
    ) -> float:
        value = self.take(key, default)
        if value is None:
            return self._missing(key)
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not (is_number and minimum <= value <= MAX_NUMBER):
            self.refuse(key, f"`{key}` must be {what} from {minimum}, not {shown(value)}")
            return max(minimum, 1)
        return float(value) if isinstance(value, float) else int(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self.take(key, default)
        if value is None:
            self._missing(key)
        elif not isinstance(value, bool):
            self.refuse(key, f"`{key}` must be true or false, not {shown(value)}")
        return bool(value)

    def only(self, key: str, allowed: Sequence[Any], why: str) -> Any:
        """A key that may be absent, and otherwise must have one of a few values.

        Absent, or refused, it counts as the first of them.
        """
        value = self.take(key, allowed[0])
        same_type = (v for v in allowed if isinstance(v, bool) == isinstance(value, bool))
        if value not in same_type:
            expected = " or ".join(shown(v) for v in allowed)
            self.refuse(key, f"`{key}: {shown(value)}` cannot be expressed", f"{why}: {expected}")
            return allowed[0]
        return value

    def _missing(self, key: str) -> int:
        where = f"`{'.'.join(self.path)}`" if self.path else "the config"
        self.problems.error("E383", f"{where} does not give `{key}`", self.spans.get(self.path))
        return 1

    def finish(self) -> None:
        for key in self.config:
            if key not in self.taken:
                reason = next((text for k, text in FEATURES.items() if key.startswith(k)), "")
                message = f"`{'.'.join((*self.path, key))}` cannot be expressed" + (
                    f": {reason}" if reason else "; it may change the model"
                )
                self.refuse(key, message, code="E382")


def shown(value: Any) -> str:
    """A JSON value, short enough for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
