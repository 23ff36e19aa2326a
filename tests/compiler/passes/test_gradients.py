"""The derived backward pass: its graphs are sound, and it computes what autograd does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compiler.graph.core import Op, Program
from compiler.graph.types import Type
from compiler.graph.verify import verify
from compiler.passes.differentiate import DIFFERENTIATE
from compiler.pipeline import after
from dsl.diagnostic import DiagnosticError
from tests.compiler.passes.test_passes import VARIANTS, description, model


def derived(*sets: str) -> Program:
    return after(description(*sets), "train", "differentiate")


@pytest.mark.parametrize("sets", VARIANTS)
def test_gradients_are_those_of_autograd(sets: tuple[str, ...], tmp_path: Path) -> None:
    ours, autograd = model(tmp_path, *sets), model(tmp_path, *sets, skip=("differentiate",))
    tokens = torch.randint(512, (2, 19), generator=torch.manual_seed(0))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(5)  # away from the start, where all experts are nearly alike
    autograd.load_state_dict(ours.state_dict())
    losses = [m.loss(tokens[:, :-1], tokens[:, 1:]) for m in (ours, autograd)]
    assert torch.allclose(losses[0].total, losses[1].total, rtol=1e-12)
    for loss in losses:
        loss.total.backward()
    expected = dict(autograd.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert torch.allclose(parameter.grad, expected[name].grad, rtol=1e-9, atol=1e-13), name


def test_every_loss_can_be_differentiated_by_itself(tmp_path: Path) -> None:
    ours, autograd = model(tmp_path), model(tmp_path, skip=("differentiate",))
    tokens = torch.randint(512, (2, 19), generator=torch.manual_seed(0))
    for part in ("main", "balance"):
        for one in (ours, autograd):
            one.zero_grad()
            getattr(one.loss(tokens[:, :-1], tokens[:, 1:]), part).backward()
        for (name, a), b in zip(ours.named_parameters(), autograd.parameters(), strict=True):
            absent = torch.zeros_like(a)
            grads = [absent if p.grad is None else p.grad for p in (a, b)]
            assert torch.allclose(*grads, rtol=1e-9, atol=1e-13), f"{part}: {name}"


@pytest.mark.parametrize("break_it", ["type", "name", "region", "unread"])
def test_a_backward_graph_reads_what_its_forward_graph_keeps(break_it: str) -> None:
    program = derived()
    forward, backward = program.graphs["MLA"], program.graphs["MLA_backward"]
    verify(program)
    name = next(iter(forward.kept))
    if break_it == "type":
        backward.kept[name] = Type("i64")
    elif break_it == "name":
        forward.kept["other"] = forward.kept.pop(name)
    elif break_it == "unread":
        backward.kept["more"] = Type("f32")
        forward.kept["more"] = Type("f32")
    else:
        (repeat, *_) = [op for op in program.main.ops if op.kind == "repeat"]
        spans = repeat.spans
        repeat.regions[0].ops.insert(0, Op("keep", attrs={"entries": ()}, spans=spans))
    with pytest.raises(DiagnosticError) as error:
        verify(program)
    assert {d.code for d in error.value.diagnostics} <= {"E513", "E518"}


def test_what_has_no_derivative_is_named_and_left_to_autograd() -> None:
    program = after(description(), "train", "outline")
    moe = program.graphs["DeepSeekMoE"]
    (route,) = [op for op in moe.ops if op.kind == "topk_groups"]
    route.kind = "head_linear"  # has no derivative
    (miss,) = DIFFERENTIATE.run(program, description())
    assert miss.reason == "head_linear has no derivative" and not program.backward
    assert "attention" in [op.kind for op in program.graphs["MLA"].ops]
