"""The routes of the HTTP server, and how answers look."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from . import protocol
from .answer import (
    Answer,
    chat_choice,
    chat_chunk,
    completion_choice,
    completion_chunk,
    usage,
)
from .choice import Choice, Delta
from .connection import GONE, EventStream, event, while_connected
from .gate import LOCAL, Gate, error_response, json_response
from .metrics import CONTENT_TYPE
from .page import HEADERS, PAGE
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, Error, TokenizeRequest
from .service import Service

Step = tuple[Choice, Delta]
Deltas = AsyncGenerator[Step, None]


@dataclass(frozen=True)
class Form:
    """How answers of one of the two endpoints look."""

    prefix: str
    kind: str
    chunk_kind: str
    chat: bool

    def choice(self, choice: Choice, echo: str) -> dict[str, Any]:
        return chat_choice(choice) if self.chat else completion_choice(choice, echo)

    def chunk(self, choice: Choice, delta: Delta, first: bool, echo: str) -> dict[str, Any]:
        if self.chat:
            return chat_chunk(choice, delta, first)
        return completion_chunk(choice, delta, echo if first else "")


CHAT = Form("chatcmpl", "chat.completion", "chat.completion.chunk", chat=True)
TEXT = Form("cmpl", "text_completion", "text_completion", chat=False)


def make_app(
    service: Service,
    keys: Iterable[str] = (),
    hosts: Iterable[str] | None = LOCAL,
    page: bool = True,
) -> ASGIApp:
    """The server. `hosts` are the names by which it may be called (None: any), `keys` who may."""
    # Its pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="dslc", docs_url=None, redoc_url=None)
    for kind in (Error, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    _add_answers(app, service)
    _add_information(app, service)
    if page:

        @app.get("/", include_in_schema=False, response_model=None)
        async def chat_page() -> Response:
            return Response(PAGE, media_type="text/html; charset=utf-8", headers=HEADERS)

    return Gate(app, keys, hosts, service.limits.body)


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        prompt = await service.chat_prompt(
            body.messages,
            body.add_generation_prompt,
            body.continue_final_message,
            body.chat_template_kwargs,
        )
        stops = service.model.chat.stops if service.model.chat is not None else ()
        return await _complete(service, body, request, [prompt], CHAT, stops)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        prompts = await service.completion_prompts(body)
        return await _complete(service, body, request, prompts, TEXT)


def _add_information(app: FastAPI, service: Service) -> None:
    created = int(time.time())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return described()

    def described() -> dict[str, Any]:
        return {
            "id": service.model.name,
            "object": "model",
            "created": created,
            "owned_by": "dslc",
            "max_model_len": service.worker.max_model_len,
        }

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        service.check_model(body.model)
        ids = await service.tokens(body)
        length = service.worker.max_model_len
        return {"tokens": ids, "count": len(ids), "max_model_len": length}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        service.check_model(body.model)
        return {"prompt": await service.text(body.tokens)}

    @app.get("/health")
    async def health() -> dict[str, str]:
        if service.draining:
            raise Error(503, "the server is shutting down", "unavailable")
        await service.stats()
        return {"status": "ok"}

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(service.metrics.render(await service.stats()), media_type=CONTENT_TYPE)


async def _complete(
    service: Service,
    body: protocol.Request,
    request: Request,
    prompts: Sequence[Sequence[int]],
    form: Form,
    stops: Sequence[str] = (),
) -> Response:
    # One that JavaScript's numbers can hold, too.
    seed = secrets.randbits(53) if body.seed is None else body.seed
    choices = service.choices(body, prompts, seed, stops)
    echo = await _echoes(service, body, len(choices))
    salt = service.salt(request.state.key, body.cache_salt)
    deltas = service.deltas(choices, salt)

    kind = form.chunk_kind if body.stream else form.kind
    answer = Answer(
        f"{form.prefix}-{secrets.token_hex(12)}",
        kind,
        service.model.name,
        service.model.fingerprint,
        seed,
    )

    async def whole() -> dict[str, Any]:
        async with aclosing(deltas):
            async for _ in deltas:
                pass
        listed = [form.choice(one, echo[one.index]) for one in choices]
        return answer.object(listed, usage=usage(choices, body.n))

    async def chunks(step: Step | None) -> AsyncIterator[str]:
        begun = set[int]()
        wanted = body.stream_options is not None and body.stream_options.include_usage
        more = {"usage": None} if wanted else {}
        try:
            while step is not None:
                choice, delta = step
                first = choice.index not in begun
                begun.add(choice.index)
                if first or delta.text or delta.finish or body.top() is not None:
                    chunk = form.chunk(choice, delta, first, echo[choice.index])
                    yield event(answer.object([chunk], **more))
                # Other clients have their turn, and the end of this connection is noticed.
                await asyncio.sleep(0)
                step = await anext(deltas, None)
            if wanted:
                yield event(answer.object([], usage=usage(choices, body.n)))
            yield "data: [DONE]\n\n"
        except Error as error:
            yield event(error.body)

    if not body.stream:
        found = await while_connected(request, whole())
        return GONE if found is None else json_response(found)
    # Errors before the first token have a status of their own.
    first = await while_connected(request, _first(deltas))
    return GONE if first is None else EventStream(chunks(first), deltas)


async def _echoes(service: Service, body: protocol.Request, count: int) -> list[str]:
    """What comes before the text of each choice: that of its prompt where it is asked for."""
    if not isinstance(body, CompletionRequest) or not body.echo:
        return [""] * count
    texts = [one if isinstance(one, str) else await service.text(one) for one in body.prompt]
    return [text for text in texts for _ in range(body.n)]


async def _first(deltas: Deltas) -> Step:
    return await anext(deltas)


async def answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        error = protocol.invalid(error.errors())
    elif isinstance(error, HTTPException):
        error = Error(error.status_code, str(error.detail), headers=error.headers)
    elif not isinstance(error, Error):
        error = Error(500, "internal error: the log of the server has more", "internal_error")
    return error_response(error)
