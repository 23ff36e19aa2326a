"""Load for a server: requests that arrive at random, and how long each waits for its tokens."""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from dsl.diagnostic import Diagnostic, DiagnosticError

TIMEOUT = 600.0
"""Seconds without a byte after which a request has failed."""


@dataclass(frozen=True)
class Load:
    """Which requests are made."""

    requests: int
    rate: float
    """Requests a second on average; 0: as fast as `at_once` allows."""
    at_once: int
    """Most requests at a time; to be due and to wait for another to end is to wait."""
    prompt: tuple[int, int]
    """Fewest and most tokens of a prompt."""
    new: tuple[int, int]
    """Fewest and most tokens of an answer."""
    shared: float
    """Share of a prompt that all prompts begin with."""
    temperature: float
    seed: int


@dataclass
class Timed:
    """One request: seconds since it was due, and tokens."""

    first: float = 0.0
    """Until its first token."""
    whole: float = 0.0
    between: list[float] = field(default_factory=list)
    read: int = 0
    """Tokens of its prompt, those from the prefix cache included."""
    cached: int = 0
    written: int = 0
    text: str = ""
    error: str = ""


class ServerClient:
    """One with the API of OpenAI, and of vLLM what that lacks: `ignore_eos`, `/tokenize`."""

    def __init__(self, url: str, key: str | None) -> None:
        """Raises `DiagnosticError` for an address that is none."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise _problem(f"{url} is not the address of a server")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else None
        self._kind = kind or http.client.HTTPConnection
        self._place = parts.netloc.rpartition("@")[2]
        self._path = parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """The events of a stream. Raises OSError, HTTPException, ValueError."""
        connection = self._kind(self._place, timeout=TIMEOUT)
        try:
            connection.request("POST", self._path + path, json.dumps(body), self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(_message(response.status, response.read()))
            while line := response.readline():
                if line.startswith(b"data: "):
                    if line.strip() == b"data: [DONE]":
                        return
                    yield json.loads(line[6:])
            raise ValueError("the stream ended early")
        finally:
            connection.close()

    def answer(self, path: str, body: Mapping[str, Any]) -> Any:
        """What it answers. Raises `DiagnosticError` for a server that does not, or refuses."""
        connection = self._kind(self._place, timeout=TIMEOUT)
        try:
            connection.request("POST", self._path + path, json.dumps(body), self._headers)
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                raise ValueError(_message(response.status, content))
            return json.loads(content)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _problem(f"{self._place} does not serve {path}: {_reason(error)}") from None
        finally:
            connection.close()


def _message(status: int, content: bytes) -> str:
    try:
        return f"{status}: {json.loads(content)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return str(status)


def _reason(error: Exception) -> str:
    system = error.strerror if isinstance(error, OSError) else None
    return system or str(error) or type(error).__name__


def _problem(message: str) -> DiagnosticError:
    return DiagnosticError([Diagnostic("E614", message, help="start one with `dslc serve`")])


def prompts(load: Load, text: Sequence[int] | None) -> list[list[int]]:
    """Ids of every prompt: slices of a tokenized text, or random ids of the first 256."""
    draw = random.Random(load.seed)

    def tokens(count: int) -> list[int]:
        if text is None:
            return [draw.randrange(256) for _ in range(count)]
        first = draw.randrange(max(len(text) - count, 0) + 1)
        return list(text[first : first + count])

    common = tokens(round(load.shared * load.prompt[1]))
    found = []
    for _ in range(load.requests):
        length = draw.randint(*load.prompt)
        begin = common[: round(load.shared * length)]
        found.append(begin + tokens(max(length - len(begin), 1)))
    return found


def measure(
    server: ServerClient, load: Load, text: Sequence[int] | None
) -> tuple[list[Timed], float]:
    """Makes all requests; what each took, in order, and seconds until the last had ended."""
    draw = random.Random(load.seed + 1)
    at, bodies = 0.0, []
    for index, prompt in enumerate(prompts(load, text)):
        bodies.append((at, prompt, draw.randint(*load.new), index))
        at += draw.expovariate(load.rate) if load.rate else 0.0
    started = time.monotonic()

    def run(item: tuple[float, list[int], int, int]) -> Timed:
        due, prompt, new, index = item
        time.sleep(max(started + due - time.monotonic(), 0))
        begun = started + due if load.rate else time.monotonic()
        body = {
            "prompt": prompt, "max_tokens": new, "ignore_eos": True, "stream": True,
            "temperature": load.temperature, "seed": index,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        return _timed(server, body, begun)

    with ThreadPoolExecutor(load.at_once) as pool:
        return list(pool.map(run, bodies)), time.monotonic() - started


def _timed(server: ServerClient, body: Mapping[str, Any], begun: float) -> Timed:
    found = Timed()
    last = begun
    try:
        for event in server.events("/v1/completions", body):
            now = time.monotonic()
            if "error" in event:
                raise ValueError(event["error"]["message"])
            if usage := event.get("usage"):
                found.read, found.written = usage["prompt_tokens"], usage["completion_tokens"]
                found.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            if event["choices"]:
                if last == begun:
                    found.first = now - begun
                else:
                    found.between.append(now - last)
                last = now
                found.text += event["choices"][0]["text"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        found.error = _reason(error)
    found.whole = time.monotonic() - begun
    return found


def summary(all: Sequence[Timed], seconds: float) -> dict[str, Any]:
    """Throughput, and times in milliseconds: mean and percentiles of requests without an error."""
    timed = [one for one in all if not one.error]
    digest = hashlib.sha256("\0".join(one.text for one in all).encode())
    return {
        "requests": len(all),
        "failed": len(all) - len(timed),
        "errors": sorted({one.error for one in all if one.error}),
        "seconds": seconds,
        "requests_per_second": len(timed) / seconds,
        "prompt_tokens_per_second": sum(one.read for one in timed) / seconds,
        "cached_tokens": sum(one.cached for one in timed),
        "new_tokens_per_second": sum(one.written for one in timed) / seconds,
        "first_token_ms": _spread([one.first for one in timed]),
        "between_tokens_ms": _spread([gap for one in timed for gap in one.between]),
        "request_ms": _spread([one.whole for one in timed]),
        "answers": digest.hexdigest()[:16],
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    ordered = sorted(1000 * one for one in seconds)

    def at(share: float) -> float:
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    return {
        "mean": statistics.fmean(ordered),
        "median": at(0.5),
        "p95": at(0.95),
        "p99": at(0.99),
    }
