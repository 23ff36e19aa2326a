"""Both pages in a real browser: no complaint in its console, keys that work, and paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.report.steps import render_steps
from compiler.pipeline import PIPELINES, compile
from dsl.load import load
from tests.support.browser import CHROMIUM, Browser
from tests.support.pages import report
from tests.support.places import SPECS

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.size(1400, 1000)
        yield browser


@pytest.fixture(scope="module", params=["deepseek_v3_tiny", "deepseek_v3"])
def pages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both pages of a model; `report.html` and `steps.html`."""
    folder = tmp_path_factory.mktemp(request.param)
    path = SPECS / f"{request.param}.yaml"
    description = load(path)
    text = render_steps(description, compile(description), version="0", start="forward-0")
    (folder / "steps.html").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text(report(path), encoding="utf-8")
    return folder


VISIBLE = "[...document.querySelectorAll('{}')].filter(e => e.offsetParent).map(e => e.{})"


def visible(browser: Browser, selector: str, what: str = "textContent.trim()") -> list[str]:
    found = browser.evaluate(VISIBLE.format(selector, what))
    assert isinstance(found, list)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report.html", "steps.html"])
def test_pages_open_without_errors_and_print(pages: Path, browser: Browser, name: str) -> None:
    browser.open(pages / name)
    assert browser.errors == []
    picture, paper = browser.screenshot(), browser.pdf()
    (pages / f"{name}.png").write_bytes(picture)
    (pages / f"{name}.pdf").write_bytes(paper)
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    assert paper.startswith(b"%PDF") and len(paper) > 50_000
    assert browser.errors == []
    width = browser.evaluate("document.documentElement.scrollWidth")
    assert width <= 1400, "the page is wider than the window"


@pytest.mark.slow
def test_without_scripts_everything_is_there(pages: Path, browser: Browser) -> None:
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(pages / "steps.html")
        for selector in (".step", ".version", ".version li"):
            total = browser.evaluate(f"document.querySelectorAll('{selector}').length")
            assert len(visible(browser, selector, "tagName")) == total > 0
        assert visible(browser, ".scripted", "tagName") == []
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.slow
def test_a_person_steps_through_a_program(pages: Path, browser: Browser) -> None:
    browser.open(pages / "steps.html")
    assert visible(browser, ".step", "id") == ["forward-0"]
    assert visible(browser, ".version h4", "firstChild.data.trim()") == ["CausalLM"]
    passes = ["lower", *(one.name for one in PIPELINES["decode"])]
    browser.key(str(1 + list(PIPELINES).index("decode")))
    for i, name in enumerate(passes):
        assert visible(browser, ".step", "id") == [f"decode-{i}"]
        assert visible(browser, ".steps a.on b") == [name]
        browser.key("ArrowRight")
    assert visible(browser, ".step", "id") == [f"decode-{len(passes) - 1}"], "the last one stays"
    browser.key("ArrowLeft")
    assert visible(browser, ".step", "id") == [f"decode-{len(passes) - 2}"]
    assert browser.errors == []


@pytest.mark.slow
def test_a_person_zooms_into_a_block_and_sees_what_a_pass_did(
    pages: Path, browser: Browser
) -> None:
    at = list(p.name for p in PIPELINES["decode"]).index("absorb") + 1
    browser.open(pages / "steps.html", f"#decode-{at}")
    assert visible(browser, ".version h4", "firstChild.data.trim()") == ["MLA"]
    assert visible(browser, ".version li.added b") == ["head_linear", "latent_attention"]
    assert visible(browser, ".version li.changed del")[0].startswith("%o = attention(")
    # A block that this pass left alone stands there without marks.
    browser.evaluate(f"document.querySelector('#decode-{at} [data-block=CausalLM]').click()")
    assert visible(browser, ".version h4", "firstChild.data.trim()") == ["CausalLM"]
    assert visible(browser, ".version del") == []
    assert visible(browser, ".version li.box") != []
    browser.key("Escape")
    assert visible(browser, ".version h4", "firstChild.data.trim()") == ["MLA"]
    browser.evaluate("document.querySelector('.version.on .row code').click()")
    assert len(visible(browser, "code.hit")) >= 2
    assert browser.errors == []
