"""The page that steps through the passes: what it shows, and that nothing in it runs or is lost."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from backends.report.steps import render_steps
from compiler.pipeline import PIPELINES, Compiled, compile
from dsl.load import Description, load
from tests.support.pages import Page
from tests.support.places import SPECS


@cache
def compiled(spec: str) -> tuple[Description, Compiled]:
    description = load(SPECS / f"{spec}.yaml")
    return description, compile(description)


@cache
def page(spec: str) -> Page:
    return Page(render_steps(*compiled(spec), version="1.2.3", start="train-1"))


@pytest.mark.slow
@pytest.mark.parametrize("program", PIPELINES)
def test_every_pass_of_every_program_is_a_step(program: str) -> None:
    v3 = page("deepseek_v3")
    steps = compiled("deepseek_v3")[1].steps_of(program)
    for i, step in enumerate(steps):
        assert f"{program} {i}/{len(steps) - 1} {step.name}" in v3.text
        assert step.summary in v3.text
    assert all(one.purpose in v3.text for one in PIPELINES[program])


def test_an_operator_is_shown_with_types_bytes_arithmetic_and_place() -> None:
    text = page("deepseek_v3").text
    assert (
        "%down_proj = grouped_linear (%mul, %offs, @experts.*.down_proj.weight) "
        "bf16[slot, hidden_size=7168] 469.76 MB 962.07 GFLOP swiglu.dsl:7"
    ) in re.sub(r" +", " ", text)


def test_blocks_that_do_not_change_are_there_once() -> None:
    source = page("deepseek_v3").source
    anchors = re.findall(r'data-block="DecoderLayer_SwiGLU_18432"', source)
    versions = re.findall(r"<h4[^>]*>DecoderLayer_SwiGLU_18432 ", source)
    assert len(versions) < len(anchors) / 4


def test_links_lead_somewhere_and_ids_are_unique() -> None:
    v3 = page("deepseek_v3")
    ids = list(v3.attributes("id"))
    assert len(ids) == len(set(ids))
    links = list(v3.attributes("href"))
    assert all(link.startswith("#") and link[1:] in ids for link in links)


def test_the_page_is_small_and_needs_nothing_but_itself() -> None:
    v3 = page("deepseek_v3")
    assert len(v3.source.encode()) < 2_000_000
    assert not {"src", "srcset", "action", "onload"} & {n for _, a in v3.tags for n in a}
    assert "url(" not in v3.source and "@import" not in v3.source and "fetch" not in v3.source
    (policy,) = [a["content"] or "" for t, a in v3.tags if t == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


@pytest.mark.slow
def test_the_page_is_the_same_again_and_in_every_folder(tmp_path: Path) -> None:
    again = load(SPECS / "deepseek_v3_tiny.yaml")
    copy = tmp_path / "deepseek_v3_tiny.yaml"
    copy.write_text((SPECS / "deepseek_v3_tiny.yaml").read_text())
    first = page("deepseek_v3_tiny").source
    for description in (again, load(copy)):
        made = render_steps(description, compile(description), version="1.2.3", start="train-1")
        assert made == first


@pytest.mark.slow
def test_texts_of_a_spec_are_shown_and_never_run(tmp_path: Path) -> None:
    hostile = "</script></pre><script>alert(1)</script>{{ 7 * 7 }}<b onclick=x>"
    text = (SPECS / "deepseek_v3_tiny.yaml").read_text()
    text = re.sub("^about:.*", lambda _: f"about: '{hostile}'", text, flags=re.MULTILINE)
    (tmp_path / "hostile.yaml").write_text(text)
    description = load(tmp_path / "hostile.yaml")
    shown = Page(render_steps(description, compile(description), version="0", start="train-1"))
    assert [tag for tag, _ in shown.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attrs in shown.tags for name in attrs)
    assert hostile in shown.text
