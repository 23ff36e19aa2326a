"""Programs of random specs, run in float64: each pass computes what was computed before it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compiler.graph.core import Program, copy_program
from compiler.graph.verify import verify
from compiler.lower import lower
from compiler.pipeline import PIPELINES, after
from dsl.load import Description, load
from tests.interpret import State, random_inputs, random_weights, run
from tests.property.random_specs import accepted, few, fitted, specs

TINY = Path(__file__).parents[2] / "specs" / "deepseek_v3_tiny.yaml"
CHUNKS = (4, 1, 2)
"""Tokens that a decoder is given at a time."""


class Case:
    """A random model with weights and inputs, the same ones for all of its programs.

    Without `dtype`, element types are those that programs declare.
    """

    def __init__(
        self, description: Description, batch: int = 2, dtype: torch.dtype | None = torch.float64
    ) -> None:
        self.description = description
        self.dtype = dtype
        self.lowered = lower(description)
        self.weights = random_weights(self.lowered, dtype=dtype)
        sizes = {"batch": batch, "seq": sum(CHUNKS)}
        self.inputs = random_inputs(self.lowered, sizes, dtype=dtype)
        self.inputs["position"] = torch.arange(sizes["seq"]).expand(batch, -1)

    def run(self, program: Program, at: slice = slice(None), state: State | None = None) -> Any:
        """Results for the tokens `at`."""
        inputs = {n: t[:, at] if t.dim() > 1 else t for n, t in self.inputs.items()}
        return run(program, inputs, self.weights, state=state, dtype=self.dtype)

    def observe(self, program: Program) -> dict[str, Tensor]:
        """All that can be seen of a program, by name.

        A decoder is given some tokens at a time; what scores all positions could stand for it.
        """
        if any(graph.caches for graph in program.graphs.values()):
            return self.decoded([program] * len(CHUNKS))
        seen: dict[str, Tensor] = {}
        for name, value in zip(program.main.result_names, self.run(program), strict=True):
            seen[f"{name} {sum(n.split()[0] == name for n in seen)}"] = value
        if "logits 0" in seen:
            seen |= {f"after {n}": seen["logits 0"][:, n - 1] for n in self.lengths()}
        return seen

    def decoded(self, programs: Sequence[Program]) -> dict[str, Tensor]:
        """The scores after each chunk, each made by a program of its own on the same cache."""
        seen, state, start = {}, State(), 0
        for program, end in zip(programs, self.lengths(), strict=True):
            (seen[f"after {end}"],) = self.run(program, slice(start, end), state)
            start = end
        return seen

    def gradients(self, program: Program) -> dict[str, Tensor]:
        """Of `total` by weight: as the program says, or by torch's autograd."""
        if program.backward:
            state = State()
            self.run(program, state=state)
            backward = program.graphs[program.backward]
            seeds = {v.name: torch.ones((), dtype=self.dtype) for v in backward.args}
            run(program, seeds, self.weights, graph=backward.name, state=state, dtype=self.dtype)
            return state.grads
        weights = {name: weight.clone().requires_grad_() for name, weight in self.weights.items()}
        results = run(program, self.inputs, weights, dtype=self.dtype)
        total = results[program.main.result_names.index("total")]
        found = torch.autograd.grad(total, [*weights.values()], allow_unused=True)
        return {name: grad for name, grad in zip(weights, found, strict=True) if grad is not None}

    def lengths(self) -> list[int]:
        return [sum(CHUNKS[: i + 1]) for i in range(len(CHUNKS))]


def case(spec: dict[str, Any], batch: int) -> Case:
    with tempfile.TemporaryDirectory() as folder:
        made = accepted(spec, Path(folder), "random_spec", lambda d: Case(d, batch))
    assert made, "refused"
    return made


def close(a: Tensor, b: Tensor, what: str) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}")


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
        assert one.name != "differentiate" or later.backward, "a derivative is missing"
        if later.backward:
            found = model.gradients(later)
            same_gradients(found, gradients, one.name)
            gradients = found
        program, seen = later, now


def same_gradients(found: dict[str, Tensor], before: dict[str, Tensor], name: str) -> None:
    """What is computed again is computed from the same values, to the bit."""
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
