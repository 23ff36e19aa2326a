"""What requests may say, in the terms of OpenAI's API, and what they are answered.

A field is served, or refused by name, or (where it changes nothing) ignored; none is dropped
silently.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICES, MAX_STOPS, MAX_TOP_LOGPROBS, MAX_LOGPROBS, MAX_BIASES = 8, 4, 20, 5, 1024

IGNORED = frozenset({
    "metadata", "store", "user", "service_tier", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier", "refusal", "annotations", "include_obfuscation",
})  # fmt: skip
"""Fields of OpenAI's that change no answer."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "tools": ([],),
    "functions": ([],),
    "tool_calls": ([],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "prompt_logprobs": (),
    "use_beam_search": (False,),
    "tool_call_id": (),
}
"""Fields that other servers have, with the values (beside null) that ask for nothing."""


class Body(BaseModel):
    """A JSON object of a request."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """Leaves out what asks for nothing. Raises for fields that are not served."""
        if not isinstance(value, dict):
            return value
        kept = {}
        names = {field.alias or name for name, field in cls.model_fields.items()}
        for name, field in value.items():
            if name in names:
                kept[name] = field
            elif name in NEUTRAL:
                if field is not None and field not in NEUTRAL[name]:
                    raise _refusal(name, f"{name} is not supported")
            elif name not in IGNORED:
                known = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {known[0]}?" if known else ""
                raise _refusal(ascii(name[:80])[1:-1], f"there is no field {name[:80]!a}{hint}")
        return kept


def _refusal(name: str, message: str) -> PydanticCustomError:
    # The message is a template of pydantic's.
    return PydanticCustomError("refused", "{message}", {"message": message, "param": name})


def _string_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else [] if value is None else value


def _prompts(value: Any) -> Any:
    """A text, tokens, or a list of either, as a list."""

    def is_ids(one: Any) -> bool:
        return isinstance(one, list) and bool(one) and all(type(id) is int for id in one)

    def is_text(one: Any) -> bool:
        # JSON can name half a character of UTF-16.
        return isinstance(one, str) and not re.search("[\ud800-\udfff]", one)

    found = [value] if isinstance(value, str) or is_ids(value) else value
    if not (isinstance(found, list) and found):
        raise PydanticCustomError("prompt", "prompt must be a text, token ids, or a list of them")
    if not all(is_text(one) or is_ids(one) for one in found):
        raise PydanticCustomError("prompt", "each prompt must be a text (of valid Unicode) or ids")
    return found


def _text_parts(value: Any) -> Any:
    """Content as a text; of a list of parts, those parts joined."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            found = f", not {kind[:80]!r}" if isinstance(kind, str) and kind != "text" else ""
            raise PydanticCustomError(
                "parts", "content can only have parts of text{found}", {"found": found}
            )
        texts.append(part["text"])
    return "".join(texts)


def _or_default(default: Any) -> BeforeValidator:
    """Null is the default."""
    return BeforeValidator(lambda value: default if value is None else value)


class StreamOptions(Body):
    include_usage: bool = False


class JsonSchema(Body):
    """What OpenAI calls the format of an answer; `strict` is how all answers are."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """Of an answer: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise _refusal("json_schema", "the type json_schema, and no other, needs json_schema")
        return self


class Request(Body):
    """What requests of both kinds may say."""

    model: str | None = None
    stream: Annotated[bool, _or_default(False)] = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    n: Annotated[int, _or_default(1), Field(ge=1, le=MAX_CHOICES)] = 1
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]],
        Field(max_length=MAX_STOPS),
        BeforeValidator(_string_list, json_schema_input_type=str | list[str] | None),
    ] = Field(default_factory=list)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    temperature: Annotated[float, _or_default(1.0), Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, _or_default(1.0), Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, _or_default(0), Field(ge=-1)] = 0
    min_p: Annotated[float, _or_default(0.0), Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, _or_default(0.0), Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, _or_default(0.0), Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, _or_default(1.0), Field(ge=0.01, le=100)] = 1.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=MAX_BIASES
    )
    min_tokens: Annotated[int, _or_default(0), Field(ge=0)] = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = Field(default=None, max_length=64)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    response_format: ResponseFormat | None = None
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1000)

    def token_limit(self) -> int | None:
        """The most tokens of an answer, if the request says."""
        return self.max_tokens

    def top(self) -> int | None:
        """Of how many of the most likely tokens log-probabilities are asked; None: of no token."""
        raise NotImplementedError

    def bias(self) -> dict[int, float]:
        return {int(id): value for id, value in (self.logit_bias or {}).items()}

    @model_validator(mode="after")
    def _fits_together(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise _refusal("stream_options", "stream_options needs stream: true")
        for id in self.logit_bias or ():
            if not (id.isascii() and id.isdigit() and len(id) < 10):
                raise _refusal("logit_bias", f"logit_bias has {id[:80]!r}, which is no token id")
        limit = self.token_limit()
        if limit is not None and self.min_tokens > limit:
            raise _refusal("min_tokens", f"min_tokens exceeds the most tokens ({limit})")
        return self


class CompletionRequest(Request):
    """The body of /v1/completions."""

    prompt: Annotated[
        list[Any],
        BeforeValidator(
            _prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]]
        ),
        Field(max_length=256),
    ]
    echo: Annotated[bool, _or_default(False)] = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True
    """Whether what the tokenizer has at the beginning of a text, such as BOS, is added."""

    def top(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _no_logprobs_of_prompts(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise _refusal("echo", "echo is not supported together with logprobs")
        return self


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str,
        BeforeValidator(_text_parts, json_schema_input_type=str | list[dict[str, str]]),
    ]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] | None = None

    def values(self) -> dict[str, str]:
        """What templates see; `developer` is OpenAI's newer name of `system`."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content} | ({"name": self.name} if self.name else {})


class ChatRequest(Request):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: Annotated[bool, _or_default(False)] = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    def token_limit(self) -> int | None:
        given = (self.max_completion_tokens, self.max_tokens)
        return next((one for one in given if one is not None), None)

    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _one_end(self) -> ChatRequest:
        asked = self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set
        if self.continue_final_message and asked:
            name = "continue_final_message"
            raise _refusal(name, f"{name} and add_generation_prompt exclude each other")
        if self.top_logprobs is not None and not self.logprobs:
            raise _refusal("top_logprobs", "top_logprobs needs logprobs: true")
        return self


class TokenizeRequest(Body):
    """The body of /tokenize: a text, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=4096)
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one_text(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise _refusal("prompt", "give a prompt or messages, one of them")
        return self


class DetokenizeRequest(Body):
    """The body of /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


class Error(Exception):
    """An answer that is an error: an HTTP status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str = "invalid_request_error",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(problems: Sequence[Any]) -> Error:
    """Of what pydantic found wrong, the first, with the path of its field."""
    first = problems[0]
    if first["type"] == "json_invalid":
        return Error(400, "the body is not valid JSON")
    if first["type"] == "model_attributes_type" and len(first["loc"]) < 2:
        return Error(400, "the body must be a JSON object, of content type application/json")
    path = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "refused":
        path.append(first["ctx"]["param"])
    param = ".".join(path) or None
    message = first["msg"]
    if first["type"] not in ("refused", "prompt", "parts"):
        message = f"{param or 'the body'}: {message[:1].lower()}{message[1:]}"
    return Error(400, message, param=param)


def finite(logprob: float | None) -> float | None:
    """JSON has no infinity; OpenAI writes -9999 for what is impossible."""
    return logprob if logprob is None or math.isfinite(logprob) else -9999.0
