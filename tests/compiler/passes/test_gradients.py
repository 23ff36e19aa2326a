"""The derived backward pass: its graphs are sound, and it computes what autograd does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compiler.analysis.saved import saved_bytes_per_token
from compiler.graph.core import Op, Program
from compiler.graph.types import Type
from compiler.graph.verify import verify
from compiler.ops import OPS
from compiler.passes.differentiate import DIFFERENTIATE
from compiler.pipeline import after
from dsl.diagnostic import DiagnosticError
from dsl.load import load
from tests.support.models import VARIANTS, description, model
from tests.support.places import ROOT


def derived(*sets: str) -> Program:
    return after(description(*sets), "train", "differentiate")


@pytest.mark.slow
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


@pytest.mark.slow
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


def change_a_type(program: Program) -> None:
    value = program.graphs["MLA_backward"].ops[0].results[0]
    value.type = Type("i64", value.type.dims)


def save_one_less(program: Program) -> None:
    program.graphs["MLA"].saved.pop()


def save_in_a_region(program: Program) -> None:
    (repeat, *_) = [op for op in program.main.ops if op.kind == "repeat"]
    repeat.regions[0].ops.insert(0, Op("save", spans=repeat.spans))


def save_twice(program: Program) -> None:
    graph = program.graphs["MLA"]
    graph.ops.insert(0, Op("save", [graph.args[0]], spans=graph.ops[0].spans))


def read_by_nobody(program: Program) -> None:
    del program.derivatives["MLA"]


def change_derivative(**changes: Any) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        program.derivatives["MLA"] = replace(program.derivatives["MLA"], **changes)

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_a_type, "E51[38].*"),
        (save_one_less, "E518: derivative @MLA = .*: @MLA_backward reads .*, and @MLA saves .*"),
        (save_in_a_region, "E518: .* stands in a region.*"),
        (save_twice, "E518: .* is the second of its graph"),
        (read_by_nobody, "E518: graph @MLA saves what no graph reads"),
        (change_derivative(backward="Other"), "E516: derivative .*: there is no graph @Other"),
        (change_derivative(weights="Other"), "E51[68]: .*"),
        (change_derivative(results=(7,)), "E518: .* has no argument or result of such a number"),
        (change_derivative(results=()), "E518: .*: @MLA_backward takes .*, not .*"),
        (change_derivative(lifted=(0, 0)), "E518: .*: @MLA_backward takes .*, not .*"),
        (change_derivative(arguments=(1,)), "E518: .*: @MLA_backward gives .*, not .*"),
        (change_derivative(weights="SwiGLU_192"), "E518: .*: @SwiGLU_192 takes or gives something"),
    ],
)
def test_graphs_of_gradients_fit_the_graphs_that_they_are_of(
    change: Callable[[Program], None], message: str
) -> None:
    program = derived()
    verify(program)
    change(program)
    with pytest.raises(DiagnosticError) as error:
        verify(program)
    problems = [f"{d.code}: {d.message}" for d in error.value.diagnostics]
    assert any(re.fullmatch(message, problem) for problem in problems), problems


def test_what_has_no_derivative_is_named_and_left_to_autograd() -> None:
    program = after(description(), "train", "outline")
    moe = program.graphs["DeepSeekMoE"]
    (route,) = [op for op in moe.ops if op.kind == "gate_saving"]
    route.kind = "head_linear"  # has no derivative
    (miss,) = DIFFERENTIATE.run(program, description())
    assert miss.reason == "head_linear has no derivative" and not program.backward
    assert "attention" in [op.kind for op in program.graphs["MLA"].ops]


def total(folder: Path, *sets: str, skip: tuple[str, ...] = ()) -> list[torch.Tensor]:
    """The loss and all gradients, in bits, of the tiny model in float32."""
    one = model(folder, *sets, skip=skip).float()
    tokens = torch.randint(512, (2, 19), generator=torch.manual_seed(0))
    loss = one.loss(tokens[:, :-1], tokens[:, 1:]).total
    loss.backward()
    return [loss.detach(), *(p.grad for p in one.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize("budget", [None, 100_000, 17_000])
def test_what_is_computed_again_has_the_same_bits(budget: int | None, tmp_path: Path) -> None:
    sets = () if budget is None else (f"train.saved_bytes_per_token={budget}",)
    again, kept = total(tmp_path, *sets), total(tmp_path, *sets, skip=("recompute",))
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))


@pytest.mark.slow
def test_a_budget_is_kept_and_the_best_ratio_goes_first() -> None:
    usual = saved_bytes_per_token(after(description(), "train", "recompute"))
    everything = saved_bytes_per_token(derived())
    least = 17_000
    tight = after(description(f"train.saved_bytes_per_token={least}"), "train", "recompute")
    ample = after(description("train.saved_bytes_per_token=10M"), "train", "recompute")
    assert (
        saved_bytes_per_token(tight) <= least < usual <= saved_bytes_per_token(ample) < everything
    )
    again = [
        s for op in tight.graphs["MLA_backward"].ops if op.kind == "linear" for s in op.symbols
    ]
    assert {"q_b_proj.weight", "kv_b_proj.weight"} <= set(again)


@pytest.mark.slow
def test_a_budget_that_cannot_be_kept_says_what_can() -> None:
    with pytest.raises(DiagnosticError) as error:
        after(description("train.saved_bytes_per_token=1K"), "train", "recompute")
    (problem,) = error.value.diagnostics
    assert problem.code == "E420" and "raise it to at least" in problem.help


def test_what_v3_keeps_and_computes_again() -> None:
    """Norms, SwiGLU outputs, the up-projections of MLA (report, section 3.2.3); expert outputs."""
    v3 = load(ROOT / "specs" / "deepseek_v3.yaml", sets=["precision.policy=bf16"])
    program = after(v3, "train", "recompute")
    mla, moe = program.graphs["MLA_backward"], program.graphs["DeepSeekMoE_backward"]
    again = [s for op in mla.ops if op.kind == "linear" for s in op.symbols]
    assert sorted(again) == ["kv_b_proj.weight", "q_b_proj.weight"]
    again = [s for op in moe.ops if op.kind == "grouped_linear" for s in op.symbols]
    assert again == ["experts.*.down_proj.weight"]
    for graph in program.graphs.values():
        views = {v.name for op in graph.ops if OPS[op.kind].view for v in op.results}
        normed = {v.name for op in graph.ops if op.kind == "rms_norm" for v in op.results}
        assert not (views | normed) & {v.name for v in graph.saved}
