"""The HTTP server as clients see it: OpenAI's, plain ones, wrong ones, and those that go away."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.serve.answer import usage
from runtime.serve.choice import Choice
from runtime.serve.request import Event, Sampling, Token
from runtime.serve.service import Limits
from runtime.serve.text import ByteVocabulary, StopStrings
from tests.support.fake_engine import FAIL, NAN
from tests.support.served import END, HTTP, Served, all_idle, byte_chat, serving
from tests.support.tokenizers import vocabulary


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(chat=byte_chat(ByteVocabulary())) as one:
        yield one


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return connect(served)


def connect(served: Served, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)


def post(served: Served, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    return HTTP.post(served.url + path, json=body)


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream, without its end, which must be there."""
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def test_usage_says_which_drafts_were_right() -> None:
    """Those behind a stop string are of no answer, and so were in vain."""
    letters = [*b"ab.cd"]
    choice = Choice(0, "0", [1], Sampling(9), ByteVocabulary(), StopStrings((".",)))
    choice.feed(Event("0", (Token(letters[0]),), drafts=2))
    choice.feed(Event("0", tuple(map(Token, letters[1:])), drafts=3))
    found = usage([choice], 1)
    assert "".join(choice.text) == "ab" and found["completion_tokens"] == 3
    details = {"accepted_prediction_tokens": 2, "rejected_prediction_tokens": 3}
    assert found["completion_tokens_details"] == details


def test_completions(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt="hello ", max_tokens=8, seed=0)
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason, choice.index) == ("hello he", "length", 0)
    assert found.usage is not None and found.object == "text_completion"
    used = found.usage
    assert (used.prompt_tokens, used.completion_tokens, used.total_tokens) == (6, 8, 14)
    details = used.completion_tokens_details
    assert details is not None and details.rejected_prediction_tokens == 0
    assert found.system_fingerprint == "print" and found.model_extra == {"seed": 0}


def test_prompts_may_be_texts_or_tokens_or_lists_of_them(served: Served) -> None:
    for prompt in ("ab", [97, 98], ["ab"], [[97, 98]]):
        found = post(served, prompt=prompt, max_tokens=3, seed=0).json()
        assert [choice["text"] for choice in found["choices"]] == ["aba"]
    found = post(served, prompt=["ab", [99]], n=2, max_tokens=2, seed=0, echo=True).json()
    texts = [choice["text"] for choice in found["choices"]]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert texts[0] == "abab" and texts[1] in ("abab", "abba") and texts[2:] == ["ccc", "ccc"]
    assert found["usage"]["prompt_tokens"] == 3 and found["usage"]["completion_tokens"] == 8


@pytest.mark.slow
def test_choices_have_seeds_of_their_own(served: Served) -> None:
    alphabet = "abcdefghijklmnopqrstuvwxyz"

    def texts(**more: Any) -> list[str]:
        body = {"prompt": alphabet, "max_tokens": 4, **more}
        return [choice["text"] for choice in post(served, **body).json()["choices"]]

    assert texts(n=8, seed=3) == texts(n=8, seed=3)
    assert len(set(texts(n=8, seed=3))) > 4
    assert texts(n=8, seed=3)[:1] == texts(seed=3) == ["defg"]
    drawn = post(served, prompt=alphabet, max_tokens=4).json()
    assert texts(seed=drawn["seed"]) == [drawn["choices"][0]["text"]], "an answer can be repeated"


def test_without_max_tokens_the_window_is_the_limit(served: Served) -> None:
    found = post(served, prompt="ab").json()
    assert (
        found["usage"]["total_tokens"] == 512 and found["choices"][0]["finish_reason"] == "length"
    )


def test_end_tokens_end_and_have_no_text(served: Served) -> None:
    prompt = [97, 98, END, 99]
    assert post(served, prompt=prompt, seed=0).json()["choices"][0] == {
        "index": 0, "text": "ab", "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
    body = {"prompt": prompt, "seed": 0, "max_tokens": 5}
    assert post(served, **body, ignore_eos=True).json()["choices"][0]["text"] == "abca"
    assert post(served, **body, stop_token_ids=[98]).json()["choices"][0]["text"] == "a"
    assert post(served, **body, min_tokens=4).json()["choices"][0]["finish_reason"] == "length"


def test_stop_strings_end_and_are_not_shown(served: Served) -> None:
    body = {"prompt": "one two three ", "seed": 0, "max_tokens": 50}
    found = post(served, **body, stop=["three", "wo t"]).json()
    assert found["choices"][0]["text"] == "one t" and found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == 9
    kept = post(served, **body, stop="wo t", include_stop_str_in_output=True).json()
    assert kept["choices"][0]["text"] == "one two t"
    late = post(served, **body, stop="one", min_tokens=4).json()
    assert late["choices"][0]["text"] == "one two three "
    assert all_idle(served), "what was stopped still runs"


def test_streams_are_the_answer_in_parts(client: openai.OpenAI) -> None:
    prompt = "Größe 🙂 "
    parts = list(
        client.completions.create(
            model="tiny", prompt=prompt, max_tokens=30, seed=0, n=2, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    whole = client.completions.create(model="tiny", prompt=prompt, max_tokens=30, seed=0, n=2)
    for choice in whole.choices:
        own = [p.choices[0] for p in parts if p.choices and p.choices[0].index == choice.index]
        assert "".join(one.text for one in own) == choice.text
        assert [one.finish_reason for one in own if one.finish_reason] == [choice.finish_reason]
    assert all(part.usage is None for part in parts[:-1]) and not parts[-1].choices
    assert parts[-1].usage == whole.usage and len({part.id for part in parts}) == 1


def test_chat(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]
    found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, seed=0)
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "System: ")
    parts = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=8, seed=0, stream=True
        )
    )
    deltas = [part.choices[0].delta for part in parts]
    assert "".join(delta.content or "" for delta in deltas) == "System: "
    assert [delta.role for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    # The template of bytes ends an answer where the next speaker begins.
    long = client.chat.completions.create(model="tiny", messages=messages, seed=0)
    assert long.choices[0].message.content == "System: s"
    assert long.choices[0].finish_reason == "stop"


def test_a_message_is_continued(served: Served) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    body = {"messages": messages, "max_tokens": 40, "seed": 0, "stop": "x"}
    more = {"continue_final_message": True}
    found = post(served, "/v1/chat/completions", **body, **more).json()
    assert found["usage"]["prompt_tokens"] == len("User: a\nAssistant: b")


def test_logprobs(client: openai.OpenAI, served: Served) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "é"}], max_tokens=8, seed=6,
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    logprobs = found.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert bytes(b for one in logprobs.content for b in one.bytes or ()) == "é\nAssis".encode()
    assert [len(one.top_logprobs) for one in logprobs.content] == [2] * 8
    assert logprobs.content[0].logprob == -0.5 and logprobs.content[0].token == "\ufffd"
    text = post(served, prompt="ab\x07", max_tokens=3, seed=0, logprobs=1).json()
    assert text["choices"][0]["logprobs"] == {
        "tokens": ["a", "b", "\x07"],
        "token_logprobs": [-0.5, -0.5, -9999.0],
        "top_logprobs": [{"a": -0.5}, {"b": -0.5}, {"\x07": -0.5}],
        "text_offset": [0, 1, 2],
    }
    parts = events(post(served, prompt="ab", max_tokens=2, seed=0, logprobs=1, stream=True))
    assert [part["choices"][0]["logprobs"]["tokens"] for part in parts] == [["a"], ["b"]]


def test_the_async_client(served: Served) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="-") as client:

            async def one(i: int) -> str:
                stream = await client.completions.create(
                    model="tiny", prompt=f"{i},", max_tokens=9, seed=0, stream=True
                )
                return "".join([part.choices[0].text async for part in stream])

            return await asyncio.gather(*map(one, range(40)))

    assert asyncio.run(run()) == [(f"{i}," * 5)[:9] for i in range(40)]


REFUSED = [
    ({"temprature": 1}, "temprature", "did you mean temperature"),
    ({"prompt": []}, "prompt", "must be a text"),
    ({"prompt": ["a", 1]}, "prompt", "each prompt"),
    ({"prompt": ""}, "prompt", "no tokens"),
    ({"prompt": [0, 512]}, "prompt", "from 0 to 511, got 512"),
    ({"prompt": [True]}, "prompt", ""),
    ({"n": 9}, "n", "8"),
    ({"stop": ["a", ""]}, "stop.1", ""),
    ({"stop": list("abcde")}, "stop", "4"),
    ({"temperature": -0.1}, "temperature", ""),
    ({"temperature": "1"}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", ""),
    ({"logit_bias": {"x": 1}}, "logit_bias", "no token id"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", ""),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1024"),
    ({"logit_bias": {"512": 1}}, "logit_bias", "from 0 to 511"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "from 0 to 511"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "exceeds"),
    ({"max_tokens": 0}, "max_tokens", ""),
    ({"max_tokens": 600}, "max_tokens", "1 tokens and 600 new ones are more than .* 512"),
    ({"prompt": "x" * 512}, "prompt", "512"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "no field"),
    ({"echo": True, "logprobs": 1}, "echo", ""),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"best_of": 2}, "best_of", "not supported"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "not supported"),
    ({"prompt": "x" * 301}, None, "more blocks"),
]


@pytest.mark.parametrize(("body", "param", "message"), REFUSED)
def test_what_is_refused_names_its_field(
    served: Served, body: dict[str, Any], param: str | None, message: str
) -> None:
    response = post(served, **{"prompt": "a", **body})
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert message.replace(".* ", "") in error["message"] or all(
        part in error["message"] for part in message.split(".* ")
    )


CHAT_REFUSED = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "messages.0.tool_calls"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs.a"),
    ({"chat_template_kwargs": {"messages": "x"}}, "messages"),
]


@pytest.mark.parametrize(("body", "param"), CHAT_REFUSED)
def test_what_a_chat_refuses(served: Served, body: dict[str, Any], param: str) -> None:
    whole = {"messages": [{"role": "user", "content": "a"}], **body}
    response = post(served, "/v1/chat/completions", **whole)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)


def test_what_changes_nothing_is_accepted(served: Served) -> None:
    body = {
        "messages": [{"role": "user", "content": "a", "tool_calls": None, "refusal": None}],
        "max_tokens": 1, "tools": [], "response_format": {"type": "text"}, "user": "u",
        "metadata": {"a": "b"}, "store": False, "n": None, "temperature": None, "stop": None,
    }  # fmt: skip
    assert post(served, "/v1/chat/completions", **body).status_code == 200


@pytest.mark.parametrize(
    "content", [b'{"prompt":', b"[" * 100_000, b"[]", b"", b'{"prompt": "\\ud800"}', b"\xff",
                b"NaN", b'{"prompt":"a","temperature":NaN}', b'{"prompt":"a","\\ud800":1}',
                b'{"prompt":"a","seed":1' + b"0" * 5000 + b"}"],
)  # fmt: skip
def test_bodies_that_are_not_json_or_not_text(served: Served, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = HTTP.post(f"{served.url}/v1/completions", content=content, headers=headers)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_a_form_of_another_site_is_not_read(served: Served) -> None:
    headers = {"content-type": "text/plain"}
    response = HTTP.post(f"{served.url}/v1/completions", content='{"prompt":"a"}', headers=headers)
    assert response.status_code == 400 and "application/json" in response.text
    response = HTTP.get(f"{served.url}/v1/models", headers={"host": "evil.example:80"})
    assert response.status_code == 403
    assert HTTP.get(f"{served.url}/v1/models", headers={"host": "localhost"}).status_code == 200


def test_errors_are_those_that_the_client_knows(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="no field 'mood'"):
        client.completions.create(model="tiny", prompt="a", extra_body={"mood": 1})
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.InternalServerError, match="NaN"):
        client.completions.create(model="tiny", prompt=[NAN])
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert HTTP.get(f"{served.url}/nothing").json()["error"]["message"] == "Not Found"
    assert HTTP.get(f"{served.url}/v1/completions").status_code == 405


def test_models_tokens_and_health(client: openai.OpenAI, served: Served) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").model_extra == {"max_model_len": 512}
    found = post(served, "/tokenize", prompt="é").json()
    assert found == {"tokens": [0xC3, 0xA9], "count": 2, "max_model_len": 512}
    assert post(served, "/detokenize", tokens=[0xC3, 0xA9]).json() == {"prompt": "é"}
    messages = [{"role": "user", "content": "a"}]
    assert post(served, "/tokenize", messages=messages).json()["count"] == len(
        "User: a\nAssistant:"
    )
    assert post(served, "/tokenize", prompt="a", messages=messages).status_code == 400
    assert HTTP.get(f"{served.url}/health").json() == {"status": "ok"}


def test_metrics_count_requests_and_tokens(served: Served) -> None:
    before = served.stats()
    post(served, prompt="abc", max_tokens=5)
    after = served.stats()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["prompt_tokens_total"] == 3 and grown["generation_tokens_total"] == 5
    assert grown['request_success_total{finished_reason="length"}'] == 1
    assert grown["time_to_first_token_seconds_count"] == 1
    assert grown["inter_token_latency_seconds_count"] == 4
    assert grown["e2e_request_latency_seconds_count"] == 1


def test_the_page_loads_nothing_and_runs_only_its_script(served: Served) -> None:
    response = HTTP.get(served.url)
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "http" not in response.text and "src=" not in response.text
    assert "innerHTML" not in response.text


TEXT = st.text(st.characters(), max_size=5)  # with halves of characters of UTF-16
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)
FIELDS = [
    "model", "stream", "stream_options", "max_tokens", "n", "stop", "seed", "temperature", "top_p",
    "top_k", "min_p", "presence_penalty", "logit_bias", "min_tokens", "ignore_eos", "logprobs",
    "stop_token_ids", "cache_salt", "prompt", "echo", "messages", "tools", "top_logprobs",
    "max_completion_tokens", "chat_template_kwargs", "tokens",
]  # fmt: skip
PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]


@pytest.mark.slow
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(PATHS),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
    st.booleans(),
)
def test_no_body_is_an_internal_error(
    served: Served, path: str, body: dict[str, Any], start: bool
) -> None:
    valid = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    if start and path.startswith("/v1"):
        unused = "prompt" if "chat" in path else "messages"
        body = {name: value for name, value in valid.items() if name != unused} | body
    content, headers = json.dumps(body), {"content-type": "application/json"}
    response = HTTP.post(served.url + path, content=content, headers=headers)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@pytest.mark.slow
def test_keys_are_asked_for_and_separate_caches() -> None:
    with serving(keys=("first", "second")) as served:
        with pytest.raises(openai.AuthenticationError):
            connect(served, "wrong").completions.create(model="tiny", prompt="a")
        for path in ("/v1/models", "/metrics", "/tokenize"):
            assert HTTP.get(served.url + path).status_code == 401
        assert HTTP.get(f"{served.url}/health").status_code == 200
        for key in ("first", "second"):
            found = connect(served, key).completions.create(model="tiny", prompt="a", max_tokens=1)
            assert found.usage is not None and found.usage.prompt_tokens_details is not None
            # The engine of the test says how long the salt was.
            assert found.usage.prompt_tokens_details.cached_tokens == 32
        service = served.service
        salts = {service.salt(key, given) for key in (b"", b"k" * 32) for given in (None, "", "a")}
        assert len(salts) == 6 and service.salt(b"", None) == b""


@pytest.mark.slow
def test_limits() -> None:
    limits = Limits(pending=4, body=1000)
    with serving(limits=limits, seconds=0.01) as served:
        assert post(served, prompt="a" * 1000).status_code == 413
        chunks = iter([b" " * 600, b" " * 600])
        assert HTTP.post(f"{served.url}/tokenize", content=chunks).status_code == 413
        assert post(served, prompt=["a"] * 3, n=2).status_code == 400
        with httpx.Client() as client:
            body = {"prompt": "a", "n": 3, "stream": True}
            with client.stream("POST", f"{served.url}/v1/completions", json=body) as running:
                assert running.status_code == 200
                refused = post(served, prompt="a", n=2, max_tokens=1)
                assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
                with pytest.raises(openai.RateLimitError):
                    connect(served).completions.create(model="tiny", prompt="a", n=2)
                assert post(served, prompt="a", max_tokens=1).status_code == 200
        assert all_idle(served)


@pytest.mark.slow
def test_answers_take_as_long_as_the_limits_allow() -> None:
    """Those that have not begun fail, those that have keep what they got."""
    with serving(limits=Limits(first_token=0.1), seconds=0.5) as served:
        late = post(served, prompt="a", max_tokens=3)
        assert late.status_code == 503 and late.json()["error"]["code"] == "queue_timeout"
        assert late.headers["retry-after"] == "1"
        assert all_idle(served)
    with serving(limits=Limits(first_token=5, answer=0.4), seconds=0.02) as served:
        found = post(served, prompt="abc", max_tokens=100).json()
        assert found["choices"][0]["finish_reason"] == "length"
        assert 0 < found["usage"]["completion_tokens"] < 100
        assert len(found["choices"][0]["text"]) == found["usage"]["completion_tokens"]
        assert all_idle(served)


@pytest.mark.slow
def test_chat_without_a_template_says_how_to_give_one() -> None:
    with serving(vocabulary=vocabulary(), vocab_size=1000) as served:
        messages = [{"role": "user", "content": "a"}]
        response = post(served, "/v1/chat/completions", messages=messages)
        assert response.status_code == 400 and "--chat-template" in response.text
        assert post(served, "/tokenize", prompt="<s>").json()["tokens"] == [0, 0]
        found = post(served, "/tokenize", prompt="<s>", add_special_tokens=False).json()
        assert found["tokens"] == [0]
        body = {"prompt": "the</s> fox<think>", "seed": 0, "max_tokens": 5, "logprobs": 0}
        for skip, text in ((True, "the fox<think>"), (False, "<s>the</s> fox<think>")):
            (choice,) = post(served, **body, skip_special_tokens=skip).json()["choices"]
            assert choice["text"] == text and "</s>" in choice["logprobs"]["tokens"]


@pytest.mark.slow
def test_clients_that_go_away_leave_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """200 requests, 30 % cancelled: a stream closed, a plain request timed out or cancelled."""
    choose = random.Random(0)
    with serving(seconds=0.002) as served:
        url = f"{served.url}/v1/completions"

        async def one(client: httpx.AsyncClient, i: int) -> str:
            await asyncio.sleep(choose.random())
            length = choose.randrange(1, 60)
            body: dict[str, Any] = {"prompt": f"{i};", "seed": 0, "max_tokens": length}
            if i % 10 >= 3:
                response = await client.post(url, json={**body, "stream": i % 2 == 0})
                if i % 2:
                    text = response.json()["choices"][0]["text"]
                else:
                    text = "".join(part["choices"][0]["text"] for part in events(response))
                assert text == (f"{i};" * length)[:length]
                return "whole"
            body |= {"max_tokens": 500, "n": 2}
            if i % 10 == 0:
                async with client.stream("POST", url, json={**body, "stream": True}) as stream:
                    async for _ in stream.aiter_lines():
                        if choose.random() < 0.3:
                            break
                return "closed"
            if i % 10 == 1:
                with pytest.raises(httpx.TimeoutException):
                    await client.post(url, json=body, timeout=choose.uniform(0.05, 0.3))
                return "timed out"
            task = asyncio.ensure_future(client.post(url, json={**body, "stream": True}))
            await asyncio.sleep(choose.uniform(0, 0.2))
            task.cancel()
            return "cancelled"

        async def run() -> list[str]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(limits=limits, timeout=60) as client:
                return await asyncio.gather(*(one(client, i) for i in range(200)))

        ends = asyncio.run(run())
        assert {end: ends.count(end) for end in ends} == {
            "whole": 140, "closed": 20, "timed out": 20, "cancelled": 20,
        }  # fmt: skip
        assert all_idle(served)
        assert not caplog.records


@pytest.mark.slow
def test_a_killed_engine_ends_every_request_at_once() -> None:
    with serving(seconds=0.005) as served:

        async def run() -> float:
            async with httpx.AsyncClient(timeout=20) as client:

                async def one(i: int) -> httpx.Response:
                    body = {"prompt": "ab", "stream": i % 2 == 0}
                    return await client.post(f"{served.url}/v1/completions", json=body)

                tasks = [asyncio.ensure_future(one(i)) for i in range(20)]
                while served.service.worker.pending < 20:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.1)
                os.kill(served.pid, signal.SIGKILL)
                killed = time.monotonic()
                for i, response in enumerate(await asyncio.gather(*tasks)):
                    assert "status -9" in response.text
                    assert response.status_code == (503 if i % 2 else 200)
                    assert "[DONE]" not in response.text
                return time.monotonic() - killed

        assert asyncio.run(run()) < 2
        assert served.ends() == 1
        with pytest.raises(httpx.ConnectError):
            HTTP.get(served.url)


@pytest.mark.slow
def test_a_failing_engine_says_why() -> None:
    with serving() as served:
        response = post(served, prompt=[FAIL])
        assert response.status_code == 503 and "told to fail" in response.text
        assert served.ends() == 1


@pytest.mark.slow
def test_a_held_up_engine_is_not_healthy_until_it_goes_on() -> None:
    with serving(limits=Limits(patience=0.2)) as served:
        os.kill(served.pid, signal.SIGSTOP)
        try:
            response = HTTP.get(f"{served.url}/health")
            assert response.status_code == 503 and "did not answer" in response.text
        finally:
            os.kill(served.pid, signal.SIGCONT)
        assert HTTP.get(f"{served.url}/health").status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("drain", [5.0, 0.1])
def test_a_server_that_ends_lets_answers_end(drain: float) -> None:
    """Within its time, whole; after it, with what they have."""
    with serving(seconds=0.005, drain=drain) as served, httpx.Client(timeout=20) as client:
        body = {"prompt": "ab", "max_tokens": 100, "stream": True}
        with client.stream("POST", f"{served.url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            served.server.stop()
            found = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert found[-1]["choices"][0]["finish_reason"] == ("length" if drain == 5 else "abort")
        assert (len(found) == 99) == (drain == 5)
        assert served.ends() == 0
