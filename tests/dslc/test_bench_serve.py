"""`dslc bench-serve` against a server whose answers and pace are known."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dslc.load import Load, prompts
from tests.support.command import Run
from tests.support.served import Served, serving

pytestmark = pytest.mark.slow
PACE = 0.01  # seconds of a step, which gives each request one token


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(seconds=PACE, slots=4) as one:
        yield one


def words(served: Served, **options: object) -> list[str]:
    given = {"requests": 12, "prompt": "8:20", "new": 10, **options}
    listed = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items()]
    return ["bench-serve", served.url, *(word for pair in listed for word in pair)]


def test_numbers_are_those_of_the_server(dslc: Run, served: Served) -> None:
    done = dslc(*words(served, format="json", at_once=4))
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["requests"] == 12 and found["failed"] == 0
    # Three rounds of four requests, ten steps each.
    assert 30 * PACE < found["seconds"] < 10 * 30 * PACE
    assert found["new_tokens_per_second"] == pytest.approx(120 / found["seconds"])
    assert found["between_tokens_ms"]["median"] >= 0.8 * 1000 * PACE
    assert found["request_ms"]["mean"] >= 10 * 1000 * PACE


def test_waiting_is_counted_and_answers_do_not_depend_on_load(dslc: Run, served: Served) -> None:
    """All at once, where the engine has four places, some wait for their first token."""
    calm, busy, arriving = (
        json.loads(dslc(*words(served, format="json", **more)).out)
        for more in ({"at_once": 1}, {"at_once": 12}, {"rate": 100})
    )
    assert calm["answers"] == busy["answers"] == arriving["answers"]
    assert busy["first_token_ms"]["p95"] > calm["first_token_ms"]["p95"] + 10 * 1000 * PACE
    assert busy["seconds"] < calm["seconds"]
    other = json.loads(dslc(*words(served, format="json", seed=1)).out)
    assert other["answers"] != calm["answers"]


def test_the_table(dslc: Run, served: Served, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"To be, or not to be: that is the question. \xff" * 9)
    done = dslc(*words(served, requests=3, text=text, shared=0.5))
    lines = done.out.splitlines()
    assert lines[0].split() == ["ms", "mean", "median", "p95", "p99"]
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        "first token",
        "between tokens",
        "request",
    ]
    assert any(line.split() == ["failed", "0", "of", "3"] for line in lines)


def test_failures_are_counted_with_their_reason(dslc: Run, served: Served) -> None:
    done = dslc(*words(served, requests=2, new=600))
    assert done.status == 1 and re.search("^failed +2 of 2$", done.out, re.M)
    assert "failed: 400: the prompt of" in done.out and "max_model_len (512)" in done.out
    assert re.search("^first token +- +- +- +-$", done.out, re.M)


def test_what_is_no_server(dslc: Run, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("text")
    for url in ("ftp://x", "http://127.0.0.1:1"):
        done = dslc("bench-serve", url, "--text", text)
        assert done.status == 1 and "E614" in done.err
    assert dslc("bench-serve", "--prompt", "5:2").status == 2
    refused = dslc("bench-serve", "http://127.0.0.1:1", "--requests", "1")
    assert "failed: Connection refused" in refused.out


def test_prompts_share_their_beginning() -> None:
    load = Load(20, 0, 1, (10, 30), (1, 1), 0.5, 0, 3)
    found = prompts(load, None)
    assert found == prompts(load, None) and all(10 <= len(one) <= 30 for one in found)
    longest = max(found, key=len)
    for one in found:
        half = round(0.5 * len(one))
        assert one[:half] == longest[:half] and (one == longest or one[half:] != longest[half:])
    pieces = prompts(load, list(range(100)))
    assert all(one[-1] - one[len(one) // 2 + 1] == len(one) - len(one) // 2 - 2 for one in pieces)
