"""The front door. Rendered messages are in test_diagnostic."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from dsl.diagnostic import DiagnosticError, render
from dsl.load import Description, load
from dsl.schema import Spec
from dsl.schema.base import Section
from dsl.source import MAX_SOURCE_BYTES
from specs import SPECS
from tests.support.places import TINY

ERRORS = Path(__file__).parents[1] / "golden" / "errors"
VALID = (ERRORS / "valid.yaml").read_text(encoding="utf-8")


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid spec in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = Path("spec.yaml")
    path.write_text(VALID, encoding="utf-8")
    return path


def codes(path: str | Path, *sets: str) -> list[str]:
    with pytest.raises(DiagnosticError) as raised:
        load(path, sets=sets)
    render(raised.value.diagnostics)
    return [d.code for d in raised.value.diagnostics]


def listing(description: Description) -> str:
    return "".join(f"{r.path} = {r.value}  # {r.origin}\n" for r in description.resolved())


@pytest.mark.parametrize("variant", [None, "wide", "flat"])
def test_resolved_values_and_origins(
    variant: str | None, golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ERRORS)
    sets = ["sequence.max_position_embeddings=2 * hidden_size"] if variant == "flat" else []
    text = listing(load("valid.yaml", variants=[variant] if variant else [], sets=sets))
    golden(f"errors/valid{f'_{variant}' if variant else ''}.txt", text)


def optional_sections(section: type[BaseModel], path: str = "") -> Iterator[str]:
    """Paths of the sections, at every depth, that a spec need not have."""
    for name, about in section.model_fields.items():
        inner = (get_args(about.annotation) or (about.annotation,))[0]
        if not (isinstance(inner, type) and issubclass(inner, Section)):
            continue
        if not about.is_required():
            yield f"{path}{name}"
        if get_origin(about.annotation) is not tuple:
            yield from optional_sections(inner, f"{path}{name}.")


@pytest.mark.parametrize("path", [*optional_sections(Spec)])
def test_null_leaves_an_optional_section_out(path: str) -> None:
    """What a smaller model that extends V3 does not want of it."""
    description = load(SPECS / "deepseek_v3.yaml", sets=[f"{path}=null"])
    *parents, name = path.split(".")
    section: BaseModel = description.spec
    for parent in parents:
        section = getattr(section, parent)
    default = type(section).model_fields[name].get_default(call_default_factory=True)
    assert getattr(section, name) == default
    inside = [r.origin for r in description.resolved() if r.path.startswith(f"{path}.")]
    assert set(inside) <= {"default"}


def test_what_null_left_out_can_be_given_again(spec: Path) -> None:
    sets = ["parallel=null", "parallel.cluster=h200_8", "parallel.batch=8"]
    found = load(
        SPECS / "deepseek_v3.yaml", sets=[*sets, "parallel.sequence_length=64"]
    ).spec.parallel
    assert found is not None
    assert (found.cluster, found.batch, found.pipeline, found.schedule) == ("h200_8", 8, 1, "1f1b")


@pytest.mark.parametrize("path", ["sequence.eos_token_id", "train.document_mask", "about"])
def test_null_leaves_an_optional_value_out(path: str) -> None:
    description = load(TINY, sets=[f"{path}=null"])
    assert not description.sets(*path.split("."))
    assert all(r.origin == "default" for r in description.resolved() if r.path == path)


def test_null_removes_a_parameter(spec: Path) -> None:
    assert "mtp_concat" in load(spec).params
    assert "mtp_concat" not in load(spec, sets=["params.mtp_concat=null"]).params
    assert load(spec, sets=['params.mtp_concat="null"']).params["mtp_concat"].value == "null"
    assert codes(spec, "params.hidden_size=null") == ["E310"]


def test_a_description_knows_its_places(spec: Path) -> None:
    description = load(spec)
    assert description.spec.model == "tiny"
    assert description.params["head_dim"].value == 16
    assert description.params["head_dim"].span.text == "hidden_size // num_attention_heads"
    assert description.span("architecture", "layers", 0, "repeat").location == "spec.yaml:13:16"
    assert description.span("architecture", "layers", 0, "block").text.startswith("{repeat: 2")
    assert description.span("precision", "policy").location == "spec.yaml:2:1"
    assert {"CausalLM", "DecoderLayer", "MLA", "SwiGLU"} <= set(description.blocks)
    names = [source.name for source in description.sources]
    assert names[:2] == ["spec.yaml", "specs/blocks/causal_lm.dsl"]
    assert len(names) == 5


def test_a_block_file_of_the_user(spec: Path) -> None:
    text = "block MyFeedForward(x: [batch, seq]) -> [batch, seq]:\n  return x\n"
    Path("blocks").mkdir()
    Path("blocks/mine.dsl").write_text(text, encoding="utf-8")
    sets = ["blocks.3=./blocks/mine.dsl", "architecture.layers.0.feed_forward=MyFeedForward"]
    description = load(spec, sets=sets)
    assert description.blocks["MyFeedForward"].span.source.name == "blocks/mine.dsl"
    # Relative to the file that lists it, whoever extends that file.
    Path("blocks/theirs.yaml").write_text(
        VALID.replace("swiglu]", "swiglu, mine.dsl]"), encoding="utf-8"
    )
    Path("top.yaml").write_text("extends: blocks/theirs.yaml\n", encoding="utf-8")
    assert "MyFeedForward" in load("top.yaml").blocks


def test_problems_of_values_and_of_block_files_come_together(spec: Path) -> None:
    Path("bad.dsl").write_text("block A(x: [batch]) -> [batch]:\n  return (\n", encoding="utf-8")
    found = codes(spec, "blocks.3=bad.dsl", "params.hidden_size=1 // 0", "precision.policy=x")
    assert {"E312", "E305"} < set(found)
    assert any(code.startswith("E2") for code in found)


def test_a_missing_block_is_not_reported_where_a_file_could_not_be_read(spec: Path) -> None:
    assert codes(spec, "blocks.3=swiglo") == ["E116"]


def test_multi_token_prediction_needs_its_block_only_when_it_predicts(spec: Path) -> None:
    load(spec, sets=["architecture.mtp={depth: 0}"])
    assert codes(spec, "architecture.mtp={depth: 1, attention: MLA, feed_forward: SwiGLU}") == [
        "E306"
    ]


def test_files_that_are_no_text(spec: Path, tmp_path: Path) -> None:
    assert codes("missing.yaml") == ["E100"]
    assert codes(tmp_path) == ["E100"]
    assert codes("missing\0.yaml") == ["E100"]
    assert codes("x" * 5000) == ["E100"]
    os.mkfifo("pipe.yaml")
    assert codes("pipe.yaml") == ["E100"]
    os.symlink("loop.yaml", "loop.yaml")
    assert codes("loop.yaml") == ["E100"]
    Path("binary.yaml").write_bytes(b"model: \xff\xfe")
    assert codes("binary.yaml") == ["E101"]
    Path("large.yaml").write_bytes(b"#" * (MAX_SOURCE_BYTES + 1))
    assert codes("large.yaml") == ["E102"]
    assert codes(spec, "blocks.3=./large.yaml") == ["E102"]
    for name in ("pipe.yaml", "binary.yaml", "x" * 5000):
        Path("top.yaml").write_text(f"extends: {name}\n", encoding="utf-8")
        assert codes("top.yaml")[0] in ("E100", "E101")
        assert codes(spec, f"blocks.3=./{name}")[0] in ("E100", "E101")
    assert codes(spec, f"blocks.3={'x' * 5000}") == ["E116"]


def test_a_byte_order_mark_and_windows_lines_are_taken(spec: Path) -> None:
    spec.write_bytes(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode())
    description = load(spec)
    assert description.span("params", "hidden_size").location == "spec.yaml:5:16"
    assert description.span("params", "head_dim").text == "hidden_size // num_attention_heads"


@pytest.mark.slow
def test_loading_imports_nothing_heavy() -> None:
    code = (
        "import sys; from dsl.load import load; load(sys.argv[1]); heavy = "
        "{'torch', 'numpy', 'networkx', 'sympy', 'jinja2', 'rich'}; print(heavy & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(ERRORS / "valid.yaml")]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


LINES = VALID.splitlines()
WORDS = st.sampled_from(
    [
        "{}", "[]", "''", "~", "-", ":", ",", "#", "&a", "*a", "!!x", "yes", "3", "-1", "1e99",
        "4K", "1/0", "hidden_size", "MLA", "SwiGLU(x=1)", "MLA(", "repeat", "params",
        "extends:", "set:", "variants:", "valid.yaml", "\t", "é", "\\", '"', "'", "|", ">",
        "@", "%", "2**9**9",
    ]
)  # fmt: skip


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=300)
def test_a_damaged_spec_is_loaded_or_explained(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lines = list(LINES)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        cut = data.draw(st.integers(0, len(lines[at])))
        keep = data.draw(st.booleans())
        word = data.draw(WORDS | st.text(max_size=8))
        lines[at] = lines[at][:cut] + word + (lines[at][cut:] if keep else "")
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    try:
        load(path).resolved()
    except DiagnosticError as error:
        assert error.diagnostics
        assert all(d.message and d.code for d in error.diagnostics)
        render(error.diagnostics)


@pytest.mark.parametrize(
    ("train", "parallel"),
    [
        ("batch: [{until: 1M, start: 2, value: 4}, {value: 4}]", "batch: 16"),
        ("sequence_length: 64, batch: 16.0, micro_batch: 4", "batch: 16"),
        ("batch: 16, micro_batch: 2", "batch: 16, micro_batch: 2"),
    ],
)
def test_train_and_parallel_may_both_say_the_same(
    train: str, parallel: str, tmp_path: Path
) -> None:
    text = (ERRORS / "valid.yaml").read_text()
    text = re.sub(r"(?m)^train:.*\n(  .*\n)*", "", text)
    sizes = f"cluster: h800_2048, sequence_length: 64, {parallel}"
    (tmp_path / "a.yaml").write_text(f"{text}\ntrain: {{{train}}}\nparallel: {{{sizes}}}\n")
    load(tmp_path / "a.yaml")


def test_parallel_takes_its_sizes_from_train() -> None:
    """With their places there; and without a cluster there is one node with room for the ranks."""
    sizes = ["train.sequence_length=64", "train.batch=16", "train.micro_batch=4"]
    description = load(TINY, sets=[*sizes, "parallel={pipeline: 2, expert: 4, batch: null}"])
    parallel = description.spec.parallel
    assert parallel is not None
    assert (parallel.sequence_length, parallel.batch, parallel.micro_batch) == (64, 16, 4)
    assert description.span("parallel", "batch").source.text == "train.batch=16"
    assert description.cluster is not None
    assert (description.cluster.nodes, description.cluster.gpus_per_node) == (1, 8)


@pytest.mark.parametrize("batch", ["[{until: 1M, value: 4}, {value: 8}]", "null"])
def test_a_batch_that_grows_or_that_train_leaves_out_is_not_that_of_a_plan(batch: str) -> None:
    sets = ["train.sequence_length=64", f"train.batch={batch}", "parallel={pipeline: 2}"]
    with pytest.raises(DiagnosticError) as raised:
        load(TINY, sets=sets)
    [problem] = raised.value.diagnostics
    assert (problem.code, problem.message) == ("E301", "`parallel.batch` is missing")


@pytest.mark.parametrize(
    ("sets", "label"),
    [
        (["train.sequence_length=1"], "too short"),
        (["train.sequence_length=2", "architecture.mtp.depth=2"], "too short"),
        (["train.sequence_length=4096", "sequence.max_position_embeddings=4095"], "too long"),
        (["parallel={cluster: cpu_2x2, batch: 4, sequence_length: 1}"], "too short"),
    ],
)
def test_lengths_that_cannot_be_trained_are_found(sets: list[str], label: str) -> None:
    with pytest.raises(DiagnosticError) as raised:
        load(TINY, sets=sets)
    assert [(one.code, one.label) for one in raised.value.diagnostics] == [("E319", label)]


def test_a_sequence_just_long_enough_is_taken() -> None:
    depth = load(TINY).spec.architecture.mtp.depth
    assert load(TINY, sets=[f"train.sequence_length={depth + 1}"]).spec.train.sequence_length
