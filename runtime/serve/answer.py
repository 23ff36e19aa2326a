"""The answers of one HTTP request: text of each choice as it comes, and OpenAI's objects."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .choice import Choice, Delta, Shown
from .protocol import finite
from .text import Vocabulary


def usage(choices: Iterable[Choice], per_prompt: int) -> dict[str, Any]:
    """Tokens of prompts, each counted once for its `per_prompt` choices, and of answers; of these
    the drafts, by whether they were right."""
    listed = list(choices)
    prompts = listed[::per_prompt]
    read = sum(len(one.prompt) for one in prompts)
    written = sum(one.completion_tokens for one in listed)
    accepted = sum(one.accepted_tokens for one in listed)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in prompts)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(one.drafted_tokens for one in listed) - accepted,
        },
    }


@dataclass(frozen=True)
class Answer:
    """What the objects of one request have in common."""

    id: str
    kind: str
    model: str
    fingerprint: str
    seed: int
    created: int = field(default_factory=lambda: int(time.time()))

    def object(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "seed": self.seed,
            "choices": choices,
            **more,
        }


def chat_choice(choice: Choice) -> dict[str, Any]:
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
        "logprobs": chat_logprobs(choice, choice.tokens),
        "finish_reason": choice.finish,
    }


def chat_chunk(choice: Choice, delta: Delta, first: bool) -> dict[str, Any]:
    """`first` of a choice says who speaks."""
    content = {"content": delta.text} if delta.text or first else {}
    return {
        "index": choice.index,
        "delta": ({"role": "assistant"} if first else {}) | content,
        "logprobs": chat_logprobs(choice, delta.tokens),
        "finish_reason": delta.finish,
    }


def completion_choice(choice: Choice, echo: str) -> dict[str, Any]:
    """`echo` is the text of the prompt where it was asked for."""
    return {
        "index": choice.index,
        "text": echo + "".join(choice.text),
        "logprobs": completion_logprobs(choice, choice.tokens),
        "finish_reason": choice.finish,
    }


def completion_chunk(choice: Choice, delta: Delta, echo: str) -> dict[str, Any]:
    return {
        "index": choice.index,
        "text": echo + delta.text,
        "logprobs": completion_logprobs(choice, delta.tokens),
        "finish_reason": delta.finish,
    }


def chat_logprobs(choice: Choice, tokens: Sequence[Shown]) -> dict[str, Any] | None:
    if choice.sampling.logprobs is None:
        return None

    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        data = _bytes(choice.vocabulary, id)
        text = data.decode(errors="replace")
        return {"token": text, "logprob": finite(logprob), "bytes": list(data)}

    content = [
        entry(one.token.id, one.token.logprob)
        | {"top_logprobs": [entry(id, logprob) for id, logprob in one.token.top]}
        for one in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(choice: Choice, tokens: Sequence[Shown]) -> dict[str, Any] | None:
    if choice.sampling.logprobs is None:
        return None

    def name(id: int) -> str:
        return _bytes(choice.vocabulary, id).decode(errors="replace")

    return {
        "tokens": [name(one.token.id) for one in tokens],
        "token_logprobs": [finite(one.token.logprob) for one in tokens],
        # Of tokens with equal text the most likely one stays.
        "top_logprobs": [
            {name(id): finite(logprob) for id, logprob in reversed(one.token.top)} for one in tokens
        ],
        "text_offset": [one.offset for one in tokens],
    }


def _bytes(vocabulary: Vocabulary, id: int) -> bytes:
    data = vocabulary.piece(id)
    return vocabulary.decode([id]).encode() if data is None else data
