"""`dslc diff`: what it tells of two models, and of inputs that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dslc.specs import shipped
from tests.support.command import Run
from tests.support.golden import Golden

TINY = shipped()["deepseek_v3_tiny"]
V3 = shipped()["deepseek_v3"]
# As people would name it, the same in every folder.
NAME = "deepseek_v3_tiny"
FEWER = ("--set", "params.num_experts_per_tok=3")


@pytest.mark.slow
def test_a_changed_value_with_all_that_follows_from_it(dslc: Run, golden: Golden) -> None:
    (Path("specs")).mkdir()
    Path("specs/tiny.yaml").write_text(TINY.read_text(encoding="utf-8"), encoding="utf-8")
    outcome = dslc("diff", "specs/tiny.yaml", *FEWER)
    assert (outcome.status, outcome.err) == (1, "")
    golden("cli/diff_tiny.txt", outcome.out)
    told = dslc("diff", "specs/tiny.yaml", *FEWER, "--format", "json")
    assert told.status == 1
    golden("cli/diff_tiny.json", told.out)
    assert dslc("diff", "specs/tiny.yaml", "specs/tiny.yaml").status == 0


@pytest.mark.slow
def test_the_other_way_round(dslc: Run) -> None:
    there = json.loads(dslc("diff", TINY, V3, "--format", "json").out)
    back = json.loads(dslc("diff", V3, TINY, "--format", "json").out)
    assert there["equal"] is False and (there["a"], there["b"]) == (back["b"], back["a"])
    for kind in ("values", "numbers"):
        mirrored = [{**one, "a": one["b"], "b": one["a"]} for one in back[kind]]
        key = "path" if kind == "values" else "name"
        assert sorted(mirrored, key=lambda x: x[key]) == sorted(there[kind], key=lambda x: x[key])
    swap = {"added": "removed", "removed": "added", "changed": "changed"}

    def signs(found: dict[str, list[dict[str, str]]]) -> set[tuple[str, str]]:
        return {(block["block"].split("_")[0], block["change"]) for block in found["blocks"]}

    assert {(name, swap[mark]) for name, mark in signs(back)} == signs(there)
    assert ("SwiGLU", "changed") in signs(there)  # of 192 and 32 columns, or of 18432 and 2048


@pytest.mark.slow
def test_variants_and_changes_of_either_side(dslc: Run) -> None:
    Path("two.yaml").write_text(
        f"extends: {TINY}\nset: {{model: two}}\n"
        "variants: {a: {params.topk_group: 1}, b: {params.topk_group: 3}}\n",
        encoding="utf-8",
    )
    out = dslc("diff", "two.yaml", "--variant-a", "a", "--variant", "b").out
    assert "A  two.yaml --variant a\nB  two.yaml --variant b\n" in out
    assert "params.topk_group  1  3  two.yaml:3:35 (variant a) -> two.yaml:3:62 (variant b)" in out
    same = ("--set-a", "params.topk_group=3", "--variant", "b")
    assert dslc("diff", "two.yaml", *same).status == 0


@pytest.mark.slow
def test_a_build_says_the_same_as_its_spec(dslc: Run) -> None:
    assert dslc("build", TINY, "-o", "made").status == 0
    assert dslc("build", TINY, *FEWER, "-o", "fewer").status == 0
    outcome = dslc("diff", "made", TINY)
    assert outcome.status == 0 and "They are equal." in outcome.out
    with_spec = dslc("diff", "made", TINY, *FEWER).out.split("\n\n", 2)[2]
    assert dslc("diff", "made", "fewer").out.split("\n\n", 2)[2] == with_spec
    # A build that some pass was left out of differs in operators only.
    dslc("build", TINY, "--skip", "absorb", "-o", "unabsorbed")
    found = json.loads(dslc("diff", "made", "unabsorbed", "--format", "json").out)
    assert not found["values"]
    assert {b["block"] for b in found["blocks"]} == {"MLA"}
    assert {p for line in found["blocks"][0]["lines"] for p in line["programs"]} == {
        "decode",
        "draft",
    }


@pytest.mark.slow
@pytest.mark.parametrize("variant", [("--set", "params.topk_group=1"), ("--variant", "small")])
def test_a_build_does_not_change(dslc: Run, variant: tuple[str, str]) -> None:
    dslc("build", TINY, "-o", "made")
    outcome = dslc("diff", TINY, "made", *variant)
    assert (outcome.status, outcome.out) == (1, "")
    assert "error[E695]: made is a build, which cannot be changed" in outcome.err


def made_run(dslc: Run, name: str, *options: str, **started: object) -> None:
    """A folder with what `dslc diff` reads of a run."""
    assert dslc("build", TINY, *options, "-o", f"{name}/deepseek_v3_tiny").status == 0
    record = {"model": "deepseek_v3_tiny", "seed": 0, "data": ["a.txt"], "weights": None, **started}
    Path(name, "run.json").write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.slow
def test_runs_are_compared_by_their_builds_and_by_how_they_were_started(dslc: Run) -> None:
    made_run(dslc, "a")
    made_run(dslc, "b", seed=1, data=["a.txt", "b.txt"], variants=["fp8"])
    made_run(dslc, "c", *FEWER)
    outcome = dslc("diff", "a", "a")
    assert outcome.status == 0 and "They are equal." in outcome.out
    outcome = dslc("diff", "a", "b", "--format", "json")
    assert outcome.status == 1
    found = json.loads(outcome.out)
    values = {v["path"]: [v[s] and v[s]["value"] for s in "ab"] for v in found["values"]}
    assert values == {
        "run.data": ["a.txt", "a.txt b.txt"], "run.seed": ["0", "1"], "run.variants": [None, "fp8"],
    }  # fmt: skip
    assert not found["blocks"]
    # Of a spec or a build there is nothing to compare it with.
    for other in ("b/deepseek_v3_tiny", str(TINY)):
        assert dslc("diff", "b", other).status == 0
    builds = dslc("diff", "a/deepseek_v3_tiny", "c/deepseek_v3_tiny").out
    assert dslc("diff", "a", "c").out.split("\n\n", 1)[1] == builds.split("\n\n", 1)[1]


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ("{", "E130"),
        ('{"model": "deepseek_v3_tiny"}', "E612"),
        ('{"model": "../elsewhere", "seed": 0}', "E612"),
        ('{"model": "gone", "seed": 0}', "E100"),
    ],
)
@pytest.mark.slow
def test_a_damaged_run_is_refused(dslc: Run, record: str, code: str) -> None:
    Path("run").mkdir()
    Path("run/run.json").write_text(record, encoding="utf-8")
    outcome = dslc("diff", TINY, "run")
    assert (outcome.status, outcome.out) == (1, "")
    assert f"error[{code}]" in outcome.err
    outcome = dslc("diff", TINY, "run", "--set", "params.topk_group=1")
    assert "error[E695]: run is a run, which cannot be changed" in outcome.err


def _cut(manifest: str) -> str:
    return manifest[: len(manifest) // 2]


def _foreign(manifest: str) -> str:
    return manifest.replace('"dslc"', '"other"')


def _without_values(manifest: str) -> str:
    return json.dumps({k: v for k, v in json.loads(manifest).items() if k != "values"})


def _without_graph(manifest: str) -> str:
    return manifest.replace("graph/decode.graph", "graph/0.graph")


def _wrong_kinds(manifest: str) -> str:
    return json.dumps({**json.loads(manifest), "values": [1, 2]})


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", [_cut, _foreign, _without_values, _without_graph, _wrong_kinds, lambda _: "[" * 10**5]
)
def test_a_damaged_build_is_refused(dslc: Run, damage: Callable[[str], str]) -> None:
    dslc("build", TINY, "-o", "made")
    path = Path("made/manifest.json")
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    outcome = dslc("diff", "made", TINY)
    assert (outcome.status, outcome.out) == (1, "")
    assert "error[E604]" in outcome.err
    found = json.loads(dslc("diff", "made", TINY, "--format", "json").out)
    assert found["ok"] is False and "equal" not in found


@pytest.mark.slow
@pytest.mark.parametrize("text", ["program", "program @p root @p", "\0"])
def test_a_damaged_graph_is_refused(dslc: Run, text: str) -> None:
    dslc("build", TINY, "-o", "made")
    Path("made/graph/decode.graph").write_text(text, encoding="utf-8")
    outcome = dslc("diff", "made", TINY)
    assert (outcome.status, outcome.out) == (1, "") and "error[E5" in outcome.err


PLAN = {
    "ranks": [
        {"peak_bytes": peak, "sent": [{"inside": {"bytes": 5}, "across": {"bytes": 7}}] * 2}
        for peak in (100, 200)
    ]
}


@pytest.mark.slow
def test_plans_of_two_builds_are_compared(dslc: Run) -> None:
    for name, times in (("a", 1), ("b", 3)):
        dslc("build", TINY, "-o", name)
        plan = json.loads(json.dumps(PLAN).replace("200", str(200 * times)))
        Path(f"{name}/plan.json").write_text(json.dumps(plan), encoding="utf-8")
        manifest = json.loads(Path(f"{name}/manifest.json").read_text(encoding="utf-8"))
        manifest["outputs"]["plan.json"] = ""
        Path(f"{name}/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    found = json.loads(dslc("diff", "a", "b", "--format", "json").out)
    numbers = {n["name"]: (n["a"], n["b"]) for n in found["numbers"]}
    assert numbers["peak bytes of a rank"] == (200, 600)
    assert numbers["bytes sent intra-node"] == (10, 10)
    assert numbers["bytes sent inter-node"] == (14, 14)
    Path("b/plan.json").write_text('{"ranks": [{}]}', encoding="utf-8")
    outcome = dslc("diff", "a", "b")
    assert outcome.status == 1 and "error[E604]: plan.json" in outcome.err


@pytest.mark.slow
def test_texts_of_a_build_cannot_steer_the_terminal(dslc: Run) -> None:
    dslc("build", TINY, "-o", "made")
    path = Path("made/manifest.json")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["values"][1]["value"] = "\x1b[2J gone"
    path.write_text(json.dumps(manifest), encoding="utf-8")
    outcome = dslc("diff", "made", TINY)
    assert outcome.status == 1 and "\x1b" not in outcome.out and "\\x1b[2J" in outcome.out
