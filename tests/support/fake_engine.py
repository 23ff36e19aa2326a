"""An engine without a model: it repeats the prompt, one token of each request a step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.serve.request import Event, FinishReason, Sampling, Token
from runtime.serve.worker import Stats

FAIL = 251
"""A prompt that begins with this byte fails the engine; with the next, gives NaN."""
NAN = 252


@dataclass
class Running:
    prompt: tuple[int, ...]
    sampling: Sampling
    salt: bytes
    done: int = 0


class FakeEngine:
    """Its answer is the prompt, again and again; `by_seed` it starts elsewhere with another seed.

    `cached` of the first event is the length of the salt. Requests above `slots` wait.
    """

    def __init__(
        self,
        max_model_len: int = 512,
        vocab_size: int = 512,
        seconds: float = 0.0,
        slots: int = 64,
        by_seed: bool = True,
    ) -> None:
        self.max_model_len, self.vocab_size = max_model_len, vocab_size
        self.seconds, self.slots, self.by_seed = seconds, slots, by_seed
        self.requests: dict[str, Running] = {}
        self.counts = dict.fromkeys(("prompt_tokens", "generated_tokens", "steps"), 0)

    def add(self, id: str, prompt: Sequence[int], sampling: Sampling, salt: bytes = b"") -> None:
        if len(prompt) > 300:
            raise ValueError("the prompt needs more blocks than there are")
        self.requests[id] = Running(tuple(prompt), sampling, salt)
        self.counts["prompt_tokens"] += len(prompt)

    def abort(self, id: str) -> None:
        self.requests.pop(id, None)

    @property
    def busy(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Event]:
        if self.seconds:
            time.sleep(self.seconds)
        self.counts["steps"] += 1
        return [self._event(id, one) for id, one in list(self.requests.items())[: self.slots]]

    heartbeat: float | None = None

    def close(self) -> None:
        pass

    def _event(self, id: str, one: Running) -> Event:
        if one.prompt[0] == FAIL:
            raise RuntimeError("told to fail")
        if one.prompt[0] == NAN:
            del self.requests[id]
            return Event(id, finish="error", message="its logits were NaN")
        sampling = one.sampling
        start = sampling.seed if self.by_seed else 0
        token = one.prompt[(start + one.done) % len(one.prompt)]
        one.done += 1
        self.counts["generated_tokens"] += 1
        ended = token in sampling.end_tokens and one.done > sampling.min_tokens
        finish: FinishReason | None = (
            "stop" if ended else "length" if one.done >= sampling.max_tokens else None
        )
        if finish:
            del self.requests[id]
        top = tuple((token + i, -0.5 - i) for i in range(sampling.logprobs or 0))
        logprob = None if sampling.logprobs is None else (-math.inf if token == 7 else -0.5)
        cached = len(one.salt) if one.done == 1 else 0
        return Event(id, (Token(token, logprob, top),), finish, cached=cached)

    def stats(self) -> Stats:
        running = min(len(self.requests), self.slots)
        return {
            "running": running,
            "waiting": len(self.requests) - running,
            "kv_cache_usage": running / self.slots,
            "preemptions": 0,
            "cached_tokens": 0,
            **self.counts,
        }


def fails(kind: type[Exception], message: str) -> FakeEngine:
    raise kind(message)


def sleeps() -> FakeEngine:
    time.sleep(30)
    return FakeEngine()
