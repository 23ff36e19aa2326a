"""Both halves of the backward pass together compute what the whole does, bit for bit."""

from __future__ import annotations

import pytest
import torch

from compiler.graph.core import Program, copy_program
from compiler.graph.parse import parse_program
from compiler.graph.text import print_graph, print_program
from compiler.graph.verify import spans_missing, verify
from compiler.passes.split_backward import SPLIT_BACKWARD
from compiler.pipeline import PIPELINES, after
from dsl.diagnostic import DiagnosticError
from dsl.load import load
from dsl.source import Source
from tests.interpret import State, random_inputs, random_weights, run
from tests.support.golden import Golden
from tests.support.places import TINY

SETS = [
    (),
    ("architecture.mtp.depth=0",),
    ("params.q_lora_rank=0", "params.n_shared_experts=0", "params.num_experts_per_tok=2"),
]


def joint(*sets: str, last: str = PIPELINES["train"][-1].name) -> Program:
    return after(load(TINY, sets=sets), "train", last)


def split(program: Program) -> Program:
    made = copy_program(program)
    assert SPLIT_BACKWARD.run(made, load(TINY)) == ()
    verify(made)
    assert not spans_missing(made)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("sets", SETS)
def test_gradients_are_the_same_to_the_bit(sets: tuple[str, ...]) -> None:
    program = joint(*sets)
    halves = split(program)
    again = parse_program(Source("halves.graph", print_program(halves)))
    assert print_program(again) == print_program(halves)
    inputs = random_inputs(program, dtype=torch.float64)
    weights = random_weights(program, dtype=torch.float64)
    seeds = {"d_total": torch.ones((), dtype=torch.float64)}
    states = []
    for one in (program, halves):
        state = State()
        run(one, inputs, weights, state=state, dtype=torch.float64)
        run(one, seeds, weights, graph=one.backward, state=state, dtype=torch.float64)
        assert bool(state.grads) == (one is program)
        if one.weights:
            run(one, {}, weights, graph=one.weights, state=state, dtype=torch.float64)
        states.append(state.grads)
    assert states[0].keys() == states[1].keys()
    for name, gradient in states[0].items():
        assert torch.equal(gradient, states[1][name]), name


def test_products_are_where_they_belong() -> None:
    """Every gradient of a weight is apart, and every product is there once."""
    program = joint()
    halves = split(program)

    def kinds(of: Program, weights: bool) -> list[str]:
        late = {derivative.weights for derivative in of.derivatives.values()}
        return sorted(
            op.kind
            for name, graph in of.graphs.items()
            if (name in late) == weights
            for op in graph.walk()
            if op.kind not in ("call", "save", "saved", "return", "yield", "repeat_backward")
        )

    late = kinds(halves, True)
    assert sorted([*kinds(halves, False), *late]) == kinds(program, False)
    assert not {k for k in kinds(halves, False) if "weight_grad" in k or k == "accumulate_grad"}
    assert not {k for k in late if "input_grad" in k}


def test_both_halves_of_a_block(golden: Golden) -> None:
    halves = split(joint(last="differentiate"))
    names = ("SwiGLU_32_backward", "SwiGLU_32_weights")
    texts = [print_graph(halves.graphs[name]) for name in names]
    golden("passes/split_backward.graph", "\n".join(texts))


def test_what_is_not_saved_between_the_halves_is_noticed() -> None:
    halves = split(joint())
    halves.graphs["SwiGLU_32_backward"].saved.pop()
    with pytest.raises(DiagnosticError, match=r"reads .*, and @SwiGLU_32_backward saves"):
        verify(halves)


@pytest.mark.slow
def test_a_program_is_split_once() -> None:
    halves = split(joint())
    text = print_program(halves)
    assert print_program(split(halves)) == text
