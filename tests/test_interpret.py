"""The interpreter against generated code, and that it knows every operator."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from backends.build import build
from compiler.graph.core import Program, copy_program
from compiler.graph.types import Dim
from compiler.ops import OPS
from compiler.pipeline import PIPELINES, after
from dsl.load import load
from tests.interpret import RUN, State, random_inputs, random_weights, run
from tests.support.places import TINY


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    description = load(TINY)
    done = {name: after(description, name, PIPELINES[name][-1].name) for name in PIPELINES}
    return {"all": after(description, "train", "lower"), **done}


def test_every_operator_has_a_meaning() -> None:
    assert set(RUN) == set(OPS)


@pytest.mark.slow
def test_graphs_mean_what_generated_code_computes(
    programs: dict[str, Program], tmp_path: Path
) -> None:
    build(load(TINY), tmp_path / "interpreted_tiny")
    sys.path.insert(0, str(tmp_path))
    try:
        model = importlib.import_module("interpreted_tiny").Model(dtype=torch.float64)
    finally:
        sys.path.remove(str(tmp_path))
    weights = random_weights(programs["all"], dtype=torch.float64)
    copies = {copy: weights[original] for copy, original in programs["all"].aliases.items()}
    model.load_state_dict({**weights, **copies})
    inputs = random_inputs(programs["train"], seed=1)
    inputs["position"] = model_position = torch.arange(7).expand(2, 7) + 3
    inputs["mtp_weight"], inputs["balance_alpha"] = torch.tensor(0.3), torch.tensor(1e-4)
    tokens, labels = inputs["tokens"], inputs["labels"]

    def meaning(name: str, state: State | None = None) -> list[torch.Tensor]:
        return run(programs[name], inputs, weights, state=state, dtype=torch.float64)

    logits, *mtp_logits = meaning("forward")
    out = model(tokens, model_position)
    torch.testing.assert_close([logits, *mtp_logits], [out.logits, *out.mtp_logits])
    total, main, *rest = meaning("train")
    loss = model.loss(tokens, labels, model_position)
    assert len(rest) == len(loss.mtp) + 1 + len(loss.load)
    torch.testing.assert_close([total, main], [loss.total, loss.main])
    (last,) = meaning("prefill")
    torch.testing.assert_close(last, logits[:, -1])


def test_a_recorded_type_that_lies_is_noticed(programs: dict[str, Program]) -> None:
    program = copy_program(programs["forward"])
    norm = next(op for op in program.main.ops if op.kind == "rms_norm")
    wrong = norm.result.type.with_last(Dim("hidden_size", 65))
    norm.result.type = wrong
    with pytest.raises(AssertionError, match=r"CausalLM: %normed : .*65\] is .*64\]"):
        run(program, random_inputs(program), random_weights(program))
