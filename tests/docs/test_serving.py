"""docs/serving.md names the endpoints, fields and statuses that there are."""

from __future__ import annotations

import re
from typing import Any

import pytest

from runtime.serve import gate, protocol, server, service
from runtime.serve.protocol import ChatRequest, CompletionRequest
from runtime.serve.text import ByteVocabulary
from runtime.serve.worker import Worker
from tests.support.documents import tables
from tests.support.fake_engine import FakeEngine
from tests.support.places import ROOT

TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_endpoints() -> None:
    model = service.ServedModel("m", ByteVocabulary(), None, frozenset())
    app: Any = server.make_app(service.Service(model, Worker(FakeEngine), service.Limits()))
    schema = app.app.openapi()["paths"]
    found = {f"{method.upper()} {path}" for path, one in schema.items() for method in one}
    rows = [re.findall(r"`([^`]+)`", row[0]) for row in tables(TEXT, "endpoint")]
    listed = set()
    for first, *more in rows:
        method = first.split()[0]
        listed |= {first, *(f"{method} {path}" for path in more)}
    assert {one.replace("{name}", "NAME") for one in found} == listed - {"GET /"}


def test_fields() -> None:
    rows = [row[0] for row in tables(TEXT, "field")]
    common = set(re.findall(r"`([a-z_]+)(?:\.[a-z_]+)?`", " ".join(rows)))
    prose = TEXT.split("## Fields")[1].split("## Chats")[0]
    completions, chats = prose.split("Of `/v1/completions`:")[1].split("Of `/v1/chat/completions`:")
    own = {
        CompletionRequest: set(re.findall(r"`([a-z_]+)`", completions)) | {"prompt"},
        ChatRequest: set(re.findall(r"`([a-z_]+)`", chats.split("Filters")[0])) | {"messages"},
    }
    for body, names in own.items():
        other = {"max_completion_tokens"} - set(body.model_fields)
        assert names | common - other == set(body.model_fields), body


def test_bounds() -> None:
    assert f"1 to {protocol.MAX_CHOICES};" in TEXT and f"up to {protocol.MAX_STOPS} strings" in TEXT
    assert f"up to {protocol.MAX_BIASES} of them" in TEXT
    assert f"`logprobs` (0 to {protocol.MAX_LOGPROBS})" in TEXT
    assert f"`top_logprobs` (0 to {protocol.MAX_TOP_LOGPROBS})" in TEXT
    assert f"within {service.Limits().patience:g} s" in TEXT
    assert all(f"`{path}`" in TEXT for path in gate.OPEN)
    for name in ("user", "metadata", "store"):
        assert name in protocol.IGNORED
    for name in ("tools", "audio", "suffix", "best_of", "structured_outputs"):
        assert name in protocol.NEUTRAL
