"""The chat page in a real browser: turns, stop, emoji, markup as text, a server that dies."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.serve.text import ByteVocabulary
from tests.support.browser import CHROMIUM, Browser
from tests.support.served import HTTP, Served, byte_chat, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]
# The answer of the fake engine is the prompt, which is the message between two bars.
TEMPLATE = "|{{ messages[-1].content }}|"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.size(900, 700)
        yield browser


@pytest.fixture
def served(browser: Browser) -> Iterator[Served]:
    chat = byte_chat(ByteVocabulary(), TEMPLATE)
    with serving(chat=chat, seconds=0.005, max_model_len=4096, by_seed=False) as served:
        browser.visit(served.url)
        yield served


def say(browser: Browser, text: str, tokens: int) -> None:
    """Writes a message and presses Enter."""
    browser.evaluate(f"find('text').value = {json.dumps(text)}; find('tokens').value = {tokens}; 0")
    browser.evaluate("find('text').focus()")
    browser.key("Enter")


def wait(browser: Browser, condition: str) -> None:
    end = time.monotonic() + 20
    while not browser.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.02)


def messages(browser: Browser) -> Any:
    listed = "[...document.querySelectorAll('.message')].map(e => [e.className, e.textContent])"
    return browser.evaluate(listed)


def test_turns_show_what_the_api_says(served: Served, browser: Browser, tmp_path: Path) -> None:
    turns = []
    for text in ("héllo 🙂", "<img src=x onerror=alert(1)>\n<b>"):
        tokens = 2 * len(f"|{text}|".encode())
        say(browser, text, tokens)
        wait(browser, "running === null && document.querySelectorAll('.assistant').length > 0")
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens}
        answer = HTTP.post(f"{served.url}/v1/chat/completions", json=body).json()
        content = answer["choices"][0]["message"]["content"]
        assert content == f"|{text}||{text}|"
        turns += [["message user", text], ["message assistant", content]]
        assert messages(browser) == turns
    assert browser.evaluate("document.querySelectorAll('#log b, #log img').length") == 0
    assert browser.evaluate("messages.map(m => m.role).join()") == "user,assistant,user,assistant"
    assert browser.errors == []
    (tmp_path / "page.png").write_bytes(browser.screenshot())
    browser.evaluate("find('clear').click()")
    assert messages(browser) == [] == browser.evaluate("messages")


def test_stop_ends_an_answer_here_and_there(served: Served, browser: Browser) -> None:
    say(browser, "hello", 4000)
    wait(browser, "document.querySelector('.assistant')?.textContent.length > 20")
    assert browser.evaluate("find('send').textContent") == "Stop"
    browser.evaluate("find('send').click()")
    wait(browser, "running === null")
    shown = messages(browser)
    assert 20 < len(shown[1][1]) < 4000 and len(shown) == 2, "no error is shown"
    for _ in range(200):
        if not served.service.worker.pending:
            break
        time.sleep(0.01)
    assert not served.service.worker.pending
    say(browser, "again", 7)
    wait(browser, "running === null && document.querySelectorAll('.assistant').length > 1")
    assert messages(browser)[3][1] == "|again|"


def test_errors_are_shown_and_leave_the_chat_whole(served: Served, browser: Browser) -> None:
    say(browser, "a", 9999)
    wait(browser, "document.querySelectorAll('.error').length > 0")
    assert "max_model_len" in messages(browser)[-1][1]
    assert browser.evaluate("messages") == []
    say(browser, "hello", 4000)
    wait(browser, "document.querySelector('.assistant')?.textContent.length > 20")
    os.kill(served.pid, signal.SIGKILL)
    wait(browser, "document.querySelectorAll('.error').length > 1")
    assert "status -9" in messages(browser)[-1][1]
    assert browser.evaluate("find('send').textContent") == "Send"
