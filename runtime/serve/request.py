"""A request to the engine: what is asked, what has been computed, and what it is answered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]
"""`stop`: an end token; `length`: all tokens that were asked for; `error`: its logits were NaN."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen, and when it ends.

    Filters apply in the order of the fields, as docs/serving.md says.
    """

    max_tokens: int
    temperature: float = 0.0
    """0 is greedy decoding; of equal logits the lowest id."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these ids."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt and output."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time a token is in the output."""
    top_k: int = 0
    """Sample from so many of the most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the fewest of the most likely tokens with this total probability."""
    min_p: float = 0.0
    """Leave out tokens less likely than this times the most likely one."""
    seed: int = 0
    """With the place of a token in the text, all that its choice depends on by chance."""
    end_tokens: frozenset[int] = frozenset()
    """Ids that end the request; the last token of its output may be one of them."""
    min_tokens: int = 0
    """So many tokens before an end token can be chosen."""
    logprobs: int | None = None
    """None: no log-probabilities; n: those of the chosen token and of the n most likely."""
    grammar: str | None = None
    """A grammar that the answer follows; see `grammar.py`."""

    def check(self, vocab_size: int) -> None:
        """Raises ValueError that names the field and its bounds."""
        bounds: tuple[tuple[str, float, float], ...] = (
            ("max_tokens", 0, math.inf),
            ("temperature", 0, math.inf),
            ("repetition_penalty", 0.01, 100),
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
            ("top_k", 0, math.inf),
            ("min_p", 0, 1),
            ("min_tokens", 0, max(self.max_tokens, 0)),
            ("logprobs", 0, vocab_size),
            ("seed", -(2**63), 2**64 - 1),
        )
        for name, low, high in bounds:
            value = getattr(self, name)
            if value is None:
                continue
            if not (low <= value <= high) or (math.isinf(value)):
                raise ValueError(f"{name} must be {_between(low, high)}, got {value}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        for id in {*self.logit_bias, *self.end_tokens}:
            if not 0 <= id < vocab_size:
                raise ValueError(f"token ids must be from 0 to {vocab_size - 1}, got {id}")
        for id, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise ValueError(f"logit_bias must be from -100 to 100, got {bias} for {id}")


def _between(low: float, high: float) -> str:
    return f"{low:g} or more" if math.isinf(high) else f"from {low:g} to {high:g}"


@dataclass(frozen=True)
class Token:
    """One token of an answer."""

    id: int
    logprob: float | None = None
    """Natural logarithm of its probability by the model alone, before any filter."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens and their log-probabilities, best first."""


@dataclass(frozen=True)
class Event:
    """What one step of the engine brought to one request: new tokens, and perhaps its end."""

    id: str
    tokens: tuple[Token, ...] = ()
    finish: FinishReason | None = None
    message: str = ""
    """Of an error."""
    cached: int = 0
    """Tokens of the prompt that were found in the prefix cache; with the first event."""
    drafts: int = 0
    """Tokens that were drafted for this step: all of `tokens` but the last one were right."""
