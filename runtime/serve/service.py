"""Requests to tokens, to the engine, and to text: what a server does apart from HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .chat import Chat, ChatError
from .choice import Choice, Delta, choice_seed
from .grammar import GrammarError, json_grammar
from .metrics import Metrics
from .protocol import (
    ChatMessage,
    CompletionRequest,
    Error,
    Request,
    ResponseFormat,
    TokenizeRequest,
)
from .request import Event, Sampling
from .text import StopStrings, Vocabulary
from .worker import Events, Refused, Stats, Unavailable, Worker

T = TypeVar("T")


@dataclass(frozen=True)
class ServedModel:
    """What the server knows of a model."""

    name: str
    vocabulary: Vocabulary
    chat: Chat | None
    end_tokens: frozenset[int]
    fingerprint: str = ""
    """Equal ones promise equal answers for equal requests and seeds."""


@dataclass(frozen=True)
class Limits:
    """What a server accepts."""

    pending: int = 512
    """Answers that run or wait at a time."""
    body: int = 4 * 2**20
    """Bytes of a request."""
    patience: float = 5.0
    """Seconds for an answer of the engine about itself."""
    first_token: float | None = None
    """Seconds until an answer has begun; then the request fails."""
    answer: float | None = None
    """Seconds until an answer has ended; then it is cut off."""


class Service:
    """Everything that raises `Error` here is an answer to the client."""

    def __init__(self, model: ServedModel, worker: Worker, limits: Limits) -> None:
        self.model, self.worker, self.limits = model, worker, limits
        self.metrics = Metrics()
        self.draining = False
        """Whether new requests are refused, because the server ends."""

    async def completion_prompts(self, body: CompletionRequest) -> list[list[int]]:
        encode = self.model.vocabulary.encode
        return [
            one if isinstance(one, list) else await _aside(encode, one, body.add_special_tokens)
            for one in body.prompt
        ]

    async def chat_prompt(
        self,
        messages: Sequence[ChatMessage],
        answer: bool,
        resume: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """`answer` begins that of the assistant, `resume` leaves the last message open."""
        if self.model.chat is None:
            raise Error(
                400,
                f"{self.model.name} has no chat template: start the server with "
                "--chat-template FILE, or use /v1/completions",
                param="messages",
            )
        values = [message.values() for message in messages]
        prompt = self.model.chat.prompt
        try:
            return await _aside(prompt, values, answer and not resume, resume, variables)
        except ChatError as error:
            raise Error(400, str(error), param="messages") from None

    async def tokens(self, body: TokenizeRequest) -> list[int]:
        """Those of a text or of messages."""
        if body.prompt is None:
            return await self.chat_prompt(body.messages or (), body.add_generation_prompt)
        return await _aside(self.model.vocabulary.encode, body.prompt, body.add_special_tokens)

    async def text(self, ids: Sequence[int]) -> str:
        return await _aside(self.model.vocabulary.decode, ids)

    def choices(
        self, body: Request, prompts: Sequence[Sequence[int]], seed: int, stops: Sequence[str] = ()
    ) -> list[Choice]:
        """The answers to make, those of a prompt together; `stops` are those of the template."""
        self.check_model(body.model)
        total = len(prompts) * body.n
        if total > self.limits.pending:
            raise Error(400, f"at most {self.limits.pending} answers at a time, not {total}")
        if self.draining:
            raise Error(503, "the server is shutting down", "unavailable")
        if self.worker.pending + total > self.limits.pending:
            raise Error(
                429, "too many requests are waiting: try again later", "queue_full",
                headers={"Retry-After": "1"},
            )  # fmt: skip
        request = secrets.token_hex(12)
        samplings = [self._sampling(body, prompt, seed) for prompt in prompts]
        return [
            Choice(
                index,
                f"{request}-{index}",
                prompts[index // body.n],
                samplings[index // body.n](index),
                self.model.vocabulary,
                StopStrings((*body.stop, *stops), body.include_stop_str_in_output),
                self.model.vocabulary.special if body.skip_special_tokens else frozenset(),
            )
            for index in range(total)
        ]

    def check_model(self, name: str | None) -> None:
        """Raises `Error` for a model that this server does not have; None is the one it has."""
        if name is not None and name != self.model.name:
            message = f"there is no model {name[:80]!r}; this server has {self.model.name!r}"
            raise Error(404, message, "model_not_found", "model")

    def _sampling(
        self, body: Request, prompt: Sequence[int], seed: int
    ) -> Callable[[int], Sampling]:
        """Checks a prompt and settings; gives the sampling of a choice by its index."""
        size, longest = self.worker.vocab_size, self.worker.max_model_len
        if not prompt:
            raise Error(400, "the prompt has no tokens", param="prompt")
        for name, ids in (
            ("prompt", prompt),
            ("stop_token_ids", body.stop_token_ids or ()),
            ("logit_bias", body.bias()),
        ):
            wrong = next((id for id in ids if not 0 <= id < size), None)
            if wrong is not None:
                message = f"{name}: token ids must be from 0 to {size - 1}, got {wrong}"
                raise Error(400, message, param=name)
        limit = body.token_limit()
        if len(prompt) + (limit or 1) > longest:
            asked = f" and {limit} new ones are" if limit else " leaves no room for an answer:"
            raise Error(
                400,
                f"the prompt of {len(prompt)} tokens{asked} more than max_model_len ({longest})",
                "context_length_exceeded",
                "max_tokens" if limit else "prompt",
            )
        ends = frozenset() if body.ignore_eos else self.model.end_tokens
        given: Mapping[str, Any] = {
            "max_tokens": limit or longest - len(prompt),
            "temperature": body.temperature,
            "logit_bias": body.bias(),
            "repetition_penalty": body.repetition_penalty,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
            "top_k": max(body.top_k, 0),
            "top_p": body.top_p,
            "min_p": body.min_p,
            "end_tokens": ends | {*(body.stop_token_ids or ())},
            "min_tokens": body.min_tokens,
            "logprobs": body.top(),
            "grammar": _grammar(body.response_format),
        }
        try:
            Sampling(**given).check(size)
        except ValueError as error:
            raise Error(400, str(error)) from None
        return lambda index: Sampling(**given, seed=choice_seed(seed, index))

    async def deltas(
        self, choices: Sequence[Choice], salt: bytes
    ) -> AsyncGenerator[tuple[Choice, Delta], None]:
        """Runs choices to their ends. If it is left early, what has not ended is aborted."""
        events = Events()
        running = {choice.id: choice for choice in choices}
        started = time.monotonic()
        last = dict.fromkeys(running, started)
        reason = "abort"
        try:
            for choice in choices:
                self.worker.submit(choice.id, choice.prompt, choice.sampling, salt, events)
            while running:
                item = await self._next(events, started, started in last.values())
                if item is None:
                    reason = "length"
                    for choice in running.values():
                        yield choice, choice.feed(Event(choice.id, finish="length"))
                    return
                event = _event(item)
                known = running.get(event.id)
                if known is None:  # it came while the choice was stopped
                    continue
                delta = known.feed(event)
                now = time.monotonic()
                first = last[event.id] == started
                self.metrics.tokens(len(event.tokens), now - last[event.id], first)
                last[event.id] = now
                if delta.finish is not None:
                    self.metrics.ended(delta.finish, now - started)
                    self.worker.abort(event.id)  # the engine does not know of stop strings
                    del running[event.id], last[event.id]
                yield known, delta
        except Unavailable as error:
            reason = "error"
            raise Error(503, str(error), "unavailable") from None
        except Error:
            reason = "error"
            raise
        finally:
            for id in running:
                self.metrics.ended(reason, time.monotonic() - started)
                self.worker.abort(id)

    async def _next(
        self, events: Events, started: float, waiting: bool
    ) -> Event | Exception | None:
        """What comes next for answers; None if they have had all their time.

        Raises `Error` if one has not begun (`waiting`) in the time for that.
        """
        first = self.limits.first_token if waiting else None
        limits = [limit for limit in (first, self.limits.answer) if limit is not None]
        left = max(started + min(limits) - time.monotonic(), 0.0) if limits else None
        try:
            return await asyncio.wait_for(events.get(), left)
        except TimeoutError:
            if first is None or first > min(limits):
                return None
            message = f"the answer had not begun after {first:g} s: try again later"
            headers = {"Retry-After": "1"}
            raise Error(503, message, "queue_timeout", headers=headers) from None

    async def stats(self) -> Stats:
        """Numbers of the engine, if it answers in time."""
        try:
            return await self.worker.stats(self.limits.patience)
        except Unavailable as error:
            raise Error(503, str(error), "unavailable") from None

    def salt(self, key: bytes, given: str | None) -> bytes:
        """What separates prefix caches: by the hash of the API key, and by the request."""
        return hashlib.sha256(key + given.encode()).digest() if given is not None else key


def _grammar(form: ResponseFormat | None) -> str | None:
    """Raises `Error` for a schema that is too long, or if there is no library for it."""
    if form is None or form.type == "text":
        return None
    try:
        return json_grammar(None if form.json_schema is None else form.json_schema.schema_)
    except (GrammarError, ModuleNotFoundError) as error:
        raise Error(400, f"response_format: {error}", param="response_format") from None


def _event(item: Event | Exception) -> Event:
    if isinstance(item, Refused):
        raise Error(400, str(item))
    if isinstance(item, Exception):
        raise item
    if item.finish == "error":
        raise Error(500, item.message or "the engine failed on this request", "engine_error")
    return item


async def _aside(call: Callable[..., T], *arguments: Any) -> T:
    """In a thread: long texts must not hold up other requests."""
    return await asyncio.to_thread(call, *arguments)
