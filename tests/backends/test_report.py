"""The page of a build: the numbers, links that lead somewhere, and texts that stay texts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from backends.report.html import quantity
from compiler.analysis import CONVENTIONS
from compiler.pipeline import PIPELINES, compile
from compiler.plan.explain import CONVENTIONS as PLAN_CONVENTIONS
from dsl.load import load
from tests.support.models import GQA
from tests.support.pages import Page, report
from tests.support.places import SPECS


@pytest.fixture(scope="module")
def v3() -> Page:
    return Page(report(SPECS / "deepseek_v3.yaml"))


@pytest.mark.parametrize(
    "number",
    [
        "671,026,419,200",
        "37,552,297,472",
        "684,489,845,504",
        "46,183",
        "250,449,887,232",
        "250.45 GFLOP",
        "70,272 B",
        "1.37 TB",
    ],
)
def test_the_numbers_are_on_the_page(v3: Page, number: str) -> None:
    assert number in v3.text


def test_modules_tensors_blocks_and_passes_are_on_the_page(v3: Page) -> None:
    for words in (
        "model.layers.{3..60} DecoderLayer_DeepSeekMoE \u00d7 58",
        "deepseek_v3 CausalLM 671.03B 37.55B 250.45B 70,272",
        "self_attn MLA \u00d7 58 10.85B 10.85B 94.3B 66,816",
        "model.layers.61 MTP",
        "bf16[vocab_size=129280, hidden_size=7168]",
        "model.layers.{3..60}.mlp.experts.{0..255}.down_proj.weight",
        "copy of lm_head.weight",
        "repeat: layers 3..60",
        "Multi-head latent attention: DeepSeek-V3 report",
        "Built by dslc 1.2.3.",
    ):
        assert words in v3.text
    for passes in PIPELINES.values():
        assert all(one.purpose in v3.text for one in passes)
    assert all(re.sub(r"\s+", " ", c) in v3.text for c in CONVENTIONS)


@pytest.mark.slow
def test_every_pass_tells_what_it_did(v3: Page) -> None:
    compiled = compile(load(SPECS / "deepseek_v3.yaml"))
    for program in PIPELINES:
        section = v3.text.split(f" {program} pass purpose operators change ")[1]
        for step in compiled.steps_of(program):
            operators = sum(1 for graph in step.program.graphs.values() for _ in graph.walk())
            delta = " ".join(f"{kind} {n:+d}" for kind, n in step.delta.items())
            told = delta or ("no change" if not step.changed else "same operators")
            expected = f"{operators:,} {'' if step.name == 'lower' else told}".strip()
            place, _, section = section.partition(expected)
            assert step.name in place


def test_where_a_rule_did_not_apply_is_told() -> None:
    page = Page(report(SPECS / "deepseek_v3_tiny.yaml", *GQA))
    assert "GQA, %o = attention(" in page.text
    assert "queries and keys are not joined from two parts" in page.text


@pytest.mark.slow
def test_the_plan_is_on_the_page(v3: Page) -> None:
    for words in (
        "h800_2048: 256 nodes of 8 GPUs",
        "16 pipeline, 2 replicas, 64 expert",
        "4 of 256 on each rank",
        "14,336 back; to 4 nodes at most",
        "memory of 80.00 GB",
        "1 1, 14 4..7, 56..59 3.27B",
    ):
        assert words in v3.text
    assert all(re.sub(r"\s+", " ", c) in v3.text for c in PLAN_CONVENTIONS)
    widths = [float(w) for w in re.findall(r'class="k\d" style="width: ([\d.]+)%"', v3.source)]
    assert len(widths) == 16 * 7 and all(sum(widths[i : i + 7]) < 101 for i in range(0, 112, 7))
    tiny = Page(report(SPECS / "deepseek_v3_tiny.yaml"))
    assert "plan" not in set(tiny.attributes("id")) and "#plan" not in set(tiny.attributes("href"))


def test_the_spec_is_on_the_page_with_the_place_of_each_value(v3: Page) -> None:
    spec = (SPECS / "deepseek_v3.yaml").read_text()
    assert re.sub(r"\s+", " ", spec).strip() in v3.text
    line = spec.splitlines().index("  hidden_size: 7168") + 1
    assert f"params.hidden_size 7168 deepseek_v3.yaml:{line}:16" in v3.text
    assert "architecture.layers.0.block DecoderLayer default" in v3.text


def test_the_page_needs_nothing_but_itself(v3: Page) -> None:
    assert "script" not in {tag for tag, _ in v3.tags}
    assert not {"src", "srcset", "action", "onload", "onclick"} & {n for _, a in v3.tags for n in a}
    assert "url(" not in v3.source and "@import" not in v3.source
    policy = [a["content"] for t, a in v3.tags if t == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_links_lead_somewhere(v3: Page) -> None:
    ids = list(v3.attributes("id"))
    assert len(ids) == len(set(ids))
    links = set(v3.attributes("href"))
    files = {link for link in links if not link.startswith("#")}
    assert files == {"__init__.py", "model.py", "graph/00-all-lower.graph", "odd%20name%3F.txt"}
    assert {link[1:] for link in links - files} <= set(ids)
    assert {"block-MLA", "block-DeepSeekMoE"} <= {link[1:] for link in links - files}


HOSTILE = "</pre></svg><script>alert(1)</script>{{ 7 * 7 }}<b onclick=x>"


@pytest.mark.slow
def test_texts_of_a_spec_are_shown_and_never_run(tmp_path: Path) -> None:
    text = (SPECS / "deepseek_v3_tiny.yaml").read_text()
    text = re.sub("^about:.*", f"about: '{HOSTILE}'  # {HOSTILE}", text, flags=re.MULTILINE)
    text = text.replace("swiglu,", "./swiglu.dsl,")
    (tmp_path / "hostile.yaml").write_text(text)
    block = (SPECS / "blocks" / "swiglu.dsl").read_text()
    block = re.sub('""".*?"""', lambda _: f'"""{HOSTILE}"""', block)
    (tmp_path / "swiglu.dsl").write_text(f"# {HOSTILE}\n{block}")
    page = Page(report(tmp_path / "hostile.yaml"))
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    # In its heading, among the values, in both sources (each says it twice), above two pictures.
    assert page.text.count(HOSTILE) == 1 + 1 + 2 + 2 + 2


@pytest.mark.slow
def test_the_page_is_the_same_in_every_folder(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "deepseek_v3_tiny.yaml").write_text((SPECS / "deepseek_v3_tiny.yaml").read_text())
    here = report(SPECS / "deepseek_v3_tiny.yaml")
    assert here == report(folder / "deepseek_v3_tiny.yaml")
    assert "elsewhere" not in here


def test_a_model_without_multi_token_prediction_says_nothing_of_it() -> None:
    page = Page(report(SPECS / "deepseek_v2_lite.yaml"))
    assert "15,706,484,224" in page.text
    assert "Multi-token prediction 0" not in page.text
    assert "with multi-token prediction" not in page.text


@pytest.mark.slow
def test_changes_from_the_command_line_are_told() -> None:
    page = Page(report(SPECS / "deepseek_v3_tiny.yaml", "params.n_routed_experts=32"))
    assert "params.n_routed_experts 32 --set" in page.text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (70_272, "70.27 kB"),
        (250_449_887_232, "250.45 GB"),
        (8 * 10**15, "8.00 PB"),
    ],
)
def test_quantity(number: int, text: str) -> None:
    assert quantity(number, "B") == text
