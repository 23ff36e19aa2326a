"""`dslc generate`: texts and chats of a folder of weights, one or many, without a server."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from backends.build import build
from dsl.load import load
from tests.support.command import Run
from tests.support.places import TINY

pytestmark = pytest.mark.slow  # runs models


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `save` wrote; a model of bytes."""
    parent = tmp_path_factory.mktemp("built")
    build(load(TINY, sets=["model=generating"]), parent / "generating")
    sys.path.insert(0, str(parent))
    importlib.import_module("generating").Model(seed=3).save(parent / "weights")
    sys.path.remove(str(parent))
    return parent / "weights"


def answers(dslc: Run, *words: str | Path) -> list[dict[str, object]]:
    outcome = dslc("generate", *words, "--format", "json")
    assert outcome.status == 0, outcome.err
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_a_text_and_its_continuation(dslc: Run, weights: Path) -> None:
    words = ("generate", weights, "--prompt", "ROMEO:", "--tokens", "12")
    outcome = dslc(*words)
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith("ROMEO:") and outcome.out.endswith("\n")
    assert dslc(*words).out == outcome.out
    assert dslc(*words, "--speculate", "1").out == outcome.out
    assert dslc(*words, "--seed", "1").out != outcome.out
    # The former name of the command.
    assert dslc("sample", *words[1:]).out == outcome.out


def test_an_answer_does_not_depend_on_other_prompts(dslc: Run, weights: Path) -> None:
    (alone,) = answers(dslc, weights, "--prompt", "ROMEO:", "--tokens", "12")
    first, second = answers(
        dslc, weights, "--prompt", "ROMEO:", "--prompt", "A longer one", "--tokens", "12"
    )
    assert first == alone and second["text"] != alone["text"]
    assert alone["prompt_tokens"] == 6 and alone["completion_tokens"] == 12
    assert alone["finish_reason"] == "length"


def test_a_stop_string_ends_before_it(dslc: Run, weights: Path) -> None:
    words = (weights, "--prompt", "ROMEO:", "--tokens", "30", "--temperature", "0")
    (whole,) = answers(dslc, *words)
    text = str(whole["text"])
    stop = next(c for c in text if c.isascii() and text.index(c) > 2)
    (cut,) = answers(dslc, *words, "--stop", stop)
    assert cut["text"] == text[: text.index(stop)] and cut["finish_reason"] == "stop"


def test_messages_and_prompts_of_a_file(dslc: Run, weights: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "ROMEO:"},
        {"messages": [{"role": "user", "content": "Who?"}]},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    text, chat = answers(dslc, weights, "--file", file, "--tokens", "5")
    assert text["prompt"] == "ROMEO:" and chat["messages"] == lines[1]["messages"]
    # The plain template of models of bytes.
    assert chat["prompt_tokens"] == len("User: Who?\nAssistant:")
    outcome = dslc("generate", weights, "--chat", "--system", "Be brief.", "--prompt", "Who?")
    assert outcome.status == 0 and "Who?" not in outcome.out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 3}', "line 2: `prompt` must be a text"),
        ('{"prompt": "a", "n": 2}', "line 2: it needs `prompt` or `messages`, and nothing else"),
        ('{"messages": []}', "line 2: each of `messages` needs `role` and `content`"),
        ('{"messages": [{"role": "user"}]}', "line 2: each of `messages` needs"),
        ("no JSON", "line 2: Expecting value"),
    ],
)
def test_a_line_that_is_no_prompt(
    dslc: Run, weights: Path, tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n' + line, encoding="utf-8")
    outcome = dslc("generate", weights, "--file", file)
    assert outcome.status == 1 and message in outcome.err and not outcome.out


def test_what_does_not_fit_is_one_error(dslc: Run, weights: Path, tmp_path: Path) -> None:
    for words, message in [
        ((weights, "--prompt", ""), "at least one token"),
        ((weights, "--tokens", "1000"), "exceed the longest text (256)"),
        ((tmp_path / "none",), "error[E100]"),
        ((weights, "--file", tmp_path / "none.jsonl"), "No such file"),
    ]:
        outcome = dslc("generate", *words)
        assert outcome.status == 1 and message in outcome.err, outcome.err
        assert outcome.err.count("error") == 1
