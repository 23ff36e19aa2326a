"""Programs of random specs, run in float64: each pass computes what was computed before it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compiler.graph.core import copy_program
from compiler.graph.verify import verify
from compiler.pipeline import PIPELINES, after
from dsl.load import load
from tests.support.cases import Case, close
from tests.support.places import TINY
from tests.support.random_specs import accepted, few, fitted, specs


def case(spec: dict[str, Any], batch: int) -> Case:
    with tempfile.TemporaryDirectory() as folder:
        made = accepted(spec, Path(folder), "random_spec", lambda d: Case(d, batch))
    assert made, "refused"
    return made


def every_pass_computes_the_same(model: Case, name: str) -> None:
    program, seen = model.lowered, model.observe(model.lowered)
    gradients = model.gradients(program) if name == "train" else {}
    for one in PIPELINES[name]:
        later = copy_program(program)
        one.run(later, model.description)
        verify(later)
        now = model.observe(later)
        if one.name not in ("select_outputs", "insert_cache"):
            assert now.keys() == seen.keys(), one.name
        assert now
        for what, value in now.items():
            close(value, seen[what], f"{what} after {one.name}")
        # Experts that are no grouped products are left to autograd.
        loop = any(op.kind == "experts" for graph in later.graphs.values() for op in graph.walk())
        assert one.name != "differentiate" or later.backward or loop, "a derivative is missing"
        if later.backward:
            found = model.gradients(later)
            same_gradients(found, gradients, one.name)
            gradients = found
        program, seen = later, now


def same_gradients(found: dict[str, Tensor], before: dict[str, Tensor], name: str) -> None:
    """What is recomputed is made from the same values, to the bit."""
    for weight, gradient in before.items():
        if name == "recompute":
            assert torch.equal(found[weight], gradient), f"gradient of {weight} after recompute"
        else:
            zeros = torch.zeros_like(gradient)
            close(found.get(weight, zeros), gradient, f"gradient of {weight} after {name}")
    assert found.keys() <= before.keys()


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pass_computes_the_same_for_the_tiny_v3(name: str) -> None:
    every_pass_computes_the_same(Case(load(TINY)), name)


@pytest.mark.parametrize("name", PIPELINES)
@few(12)
@given(spec=specs().map(fitted), batch=st.integers(1, 2))
def test_every_pass_computes_the_same(name: str, spec: dict[str, Any], batch: int) -> None:
    every_pass_computes_the_same(case(spec, batch), name)


def programs_agree(model: Case) -> None:
    """Scores of a prompt, of its parts and of one more token; and the loss that they make."""
    ends = {name: PIPELINES[name][-1].name for name in PIPELINES}
    programs = {name: after(model.description, name, end) for name, end in ends.items()}
    forward, train = model.observe(programs["forward"]), model.observe(programs["train"])
    logits, labels = forward["logits 0"], model.inputs["labels"]
    main = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    close(train["main 0"], main, "loss")
    prefill, decode = programs["prefill"], programs["decode"]
    for order in ([prefill, decode, decode], [decode, prefill, decode], [prefill] * 3):
        for what, scores in model.decoded(order).items():
            close(scores, forward[what], what)


def test_programs_agree_for_the_tiny_v3() -> None:
    programs_agree(Case(load(TINY)))


@few(12)
@given(spec=specs().map(fitted), batch=st.integers(1, 2))
def test_programs_agree(spec: dict[str, Any], batch: int) -> None:
    programs_agree(case(spec, batch))
