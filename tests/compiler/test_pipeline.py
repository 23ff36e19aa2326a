"""The runner: what it tells of each pass, and which passes it leaves out."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.build import package
from compiler.analysis import summary
from compiler.graph.core import Program
from compiler.pipeline import PIPELINES, Compiled, compile, select_passes
from dsl.diagnostic import DiagnosticError
from dsl.load import Description, load
from tests.support.differences import equal
from tests.support.models import GQA
from tests.support.places import TINY

DESCRIPTION = load(TINY)
PASSES = {one.name: one for passes in PIPELINES.values() for one in passes}
OPTIONAL = [name for name, one in PASSES.items() if not one.essential]


def kinds(program: Program) -> Counter[str]:
    return Counter(op.kind for graph in program.graphs.values() for op in graph.walk())


@pytest.mark.slow
@pytest.mark.parametrize("program", PIPELINES)
def test_every_pass_is_a_step_that_tells_what_changed(program: str) -> None:
    before, *steps = compile(DESCRIPTION).steps_of(program)
    assert [before.name, *(s.name for s in steps)] == [
        "lower",
        *(p.name for p in PIPELINES[program]),
    ]
    for step in steps:
        expected = kinds(before.program)
        expected.update(step.delta)
        assert +expected == kinds(step.program)
        assert 0 not in step.delta.values()
        assert step.changed != equal(before.program, step.program)
        assert step.changed or not step.delta
        assert step.seconds > 0
        before = step


@pytest.mark.slow
def test_programs_that_begin_alike_share_what_passes_make() -> None:
    compiled = compile(DESCRIPTION)
    steps = {name: compiled.steps_of(name) for name in PIPELINES}
    assert {id(step[1].program) for step in steps.values()} == {id(steps["train"][1].program)}
    names = [one.name for one in steps["prefill"]]
    alike = names.index("insert_cache") + 1
    for one, other in zip(steps["prefill"][:alike], steps["decode"], strict=False):
        assert one.program is other.program
        assert one.name == "lower" or (one.program_name, other.program_name) == (
            "prefill",
            "decode",
        )
    assert steps["prefill"][alike].program is not steps["decode"][alike].program


@pytest.mark.slow
def test_a_step_says_it_in_words() -> None:
    steps = {s.name: s for s in compile(DESCRIPTION).steps_of("decode")}
    assert steps["absorb"].summary == "attention -1, head_linear +2, latent_attention +1"
    assert steps["select_outputs"].summary == "same operators"
    nothing = {s.name: s for s in compile(gqa()).steps_of("decode")}
    assert nothing["absorb"].summary == "no change"


def gqa() -> Description:
    return load(TINY, sets=GQA)


def test_why_a_rule_did_not_apply_is_kept_also_where_nothing_changed() -> None:
    steps = {s.name: s for s in compile(gqa()).steps_of("decode")}
    (miss,) = steps["absorb"].misses
    assert (miss.block, miss.op.kind) == ("GQA", "attention")
    assert miss.reason == "queries and keys are not joined from two parts"


def test_until_and_skip_leave_out_what_is_not_essential() -> None:
    names = [p.name for p in select_passes(PIPELINES["decode"], until="insert_cache")]
    all_names = [p.name for p in PIPELINES["decode"]]
    before = all_names[: all_names.index("insert_cache") + 1]
    behind = [name for name in all_names[len(before) :] if name not in OPTIONAL]
    assert names == [*before, *behind] and "absorb" not in names
    names = [p.name for p in select_passes(PIPELINES["decode"], skip=["absorb"])]
    assert names == [p.name for p in PIPELINES["decode"] if p.name != "absorb"]
    # A pass that a program does not have changes nothing for it.
    assert select_passes(PIPELINES["train"], until="absorb") == list(PIPELINES["train"])


@pytest.mark.slow
@settings(max_examples=12)
@given(st.sets(st.sampled_from(OPTIONAL)), st.none() | st.sampled_from(list(PASSES)))
def test_a_package_can_be_written_without_any_optional_passes(
    skip: set[str], until: str | None
) -> None:
    compiled: Compiled = compile(DESCRIPTION, skip=skip, until=until)
    files = package(DESCRIPTION, compiled, summary(compiled.lowered, compiled.programs["decode"]))
    builtin_compile(files["model.py"].decode())


def builtin_compile(source: str) -> None:
    import builtins

    builtins.compile(source, "model.py", "exec")


@pytest.mark.slow
@pytest.mark.parametrize("program", PIPELINES)
def test_a_mask_between_documents_is_where_whole_sequences_are(program: str) -> None:
    path = TINY
    masked = kinds(compile(load(path, sets=["train.document_mask=true"])).programs[program])
    plain = kinds(compile(DESCRIPTION).programs[program])
    if program in ("prefill", "decode"):
        assert masked == plain
    else:
        assert not any("attention" in kind and "document" not in kind for kind in masked)
        assert masked.keys() - plain.keys() == {
            kind.replace("attention", "document_attention") for kind in plain if "attention" in kind
        }


def test_only_train_asks_for_a_mask() -> None:
    """The outermost block's parameter of that name is the spec's key, and nothing else."""
    path = TINY
    with pytest.raises(DiagnosticError) as raised:
        compile(load(path, sets=["params.document_mask=true"]))
    assert [d.code for d in raised.value.diagnostics] == ["E407"]
