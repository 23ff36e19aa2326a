"""One answer to one prompt: its events to text, up to a stop string."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from .request import Event, FinishReason, Sampling, Token
from .text import StopStrings, Vocabulary


@dataclass(frozen=True)
class Shown:
    """A token, and where in the text of its choice it begins, in characters."""

    token: Token
    offset: int


@dataclass(frozen=True)
class Delta:
    """What an event brought to a choice."""

    text: str = ""
    tokens: tuple[Shown, ...] = ()
    finish: FinishReason | None = None


@dataclass
class Choice:
    """One answer to one prompt, from events to text."""

    index: int
    id: str
    prompt: Sequence[int]
    sampling: Sampling
    vocabulary: Vocabulary
    stops: StopStrings
    hidden: frozenset[int] = frozenset()
    """Tokens without text."""
    finish: FinishReason | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Drafts that are tokens of the answer."""
    text: list[str] = field(default_factory=list)
    tokens: list[Shown] = field(default_factory=list)
    _length: int = 0

    def __post_init__(self) -> None:
        self._detokenizer = self.vocabulary.detokenizer()

    def feed(self, event: Event) -> Delta:
        """Tokens after a stop string are not counted; an end token has no text."""
        self.cached_tokens = event.cached or self.cached_tokens
        text, shown, finish = "", list[Shown](), event.finish
        before = self.completion_tokens
        for token in event.tokens:
            self.completion_tokens += 1
            last = token is event.tokens[-1] and finish == "stop"
            if last and token.id in self.sampling.end_tokens:
                break
            shown.append(Shown(token, self._length))
            hidden = token.id in self.hidden
            text += self._show("" if hidden else self._detokenizer.feed(token.id))
            if self.stops.found is not None:
                finish = "stop"
                break
        if event.drafts:
            self.drafted_tokens += event.drafts
            counted = self.completion_tokens - before
            self.accepted_tokens += min(len(event.tokens) - 1, counted)
        if finish is not None and self.stops.found is None:
            text += self._show(self._detokenizer.end()) + self.stops.end()
            finish = "stop" if self.stops.found is not None else finish
        delta = Delta(text, tuple(shown), finish)
        self.finish = finish
        self.text.append(text)
        self.tokens += shown
        return delta

    def _show(self, text: str) -> str:
        self._length += len(text)
        if self.completion_tokens < self.sampling.min_tokens:  # no stop string yet
            return self.stops.end() + text
        return self.stops.feed(text)


def choice_seed(seed: int, index: int) -> int:
    """The seed of a choice: that of the request for the first, others by a hash."""
    if index == 0:
        return seed
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
