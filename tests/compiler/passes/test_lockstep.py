"""A step by a schedule, on all ranks together, computes what one rank does.

Gradients of several micro-batches are summed, in the order of the schedule, over all ranks that
hold a weight; they are clipped by the norm of all of them, and every rank updates its share.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compiler.parallel.layout import Layout
from compiler.parallel.mesh import Mesh
from compiler.pipeline import PIPELINES, after
from compiler.plan.schedule import SCHEDULES, schedule
from compiler.plan.transfers import with_transfers
from tests.interpret import State, random_inputs, random_weights, run
from tests.interpret.operators import LEARNING_RATE
from tests.support.lockstep import train_step
from tests.support.models import description
from tests.support.ranks import end_of, gradients, layout, rank_programs

SEQ = 5


def check_step(name: str, mesh: Mesh, batches: int, *sets: str) -> None:
    """That all weights after a step are those of one rank, in float64; gradients are clipped."""
    of = description(*sets)
    where = replace(layout(mesh, of, schedule=name), micro_batches=batches)
    single = after(of, "train", PIPELINES["train"][-1].name)
    weights = random_weights(single, dtype=torch.float64)
    sizes = {"batch": mesh.data * batches, "seq": SEQ}
    whole = random_inputs(single, sizes, dtype=torch.float64)
    state = State()
    run(single, whole, weights, state=state, dtype=torch.float64)
    grads = gradients(single, weights, state)
    cut = {name: x.chunk(batches) if x.dim() else [x] * batches for name, x in whole.items()}
    inputs = [{name: parts[n] for name, parts in cut.items()} for n in range(batches)]
    programs = rank_programs(of, where)
    ends = [end_of(of, where, i, program) for i, program in enumerate(programs)]
    order = with_transfers(schedule(name, mesh.pipeline, batches))
    found = train_step(where, order, programs, ends, inputs, weights)
    assert found.keys() == grads.keys()
    # Of all elements of all weights, each once, whatever ranks hold it.
    factor = min(1, 1 / sum(grad.square().sum() for grad in grads.values()).sqrt())
    assert factor < 1
    for key, grad in grads.items():
        expected = weights[key] - LEARNING_RATE * factor * grad
        torch.testing.assert_close(found[key], expected, rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_by_a_schedule_is_that_of_one_rank(name: str) -> None:
    """Under DualPipe two pipeline ranks hold each weight: their gradients add up. Under DualPipeV a
    rank holds two stages, the first rank embedding and head."""
    check_step(name, Mesh(2, 1, 2, 2), 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1f1b", "zero_bubble", "dualpipe"])
@pytest.mark.parametrize(
    ("mesh", "batches"), [(Mesh(4, 1, 1, 2), 10), (Mesh(2, 2, 2, 2), 4), (Mesh(2, 2, 1, 1), 6)]
)
def test_a_step_on_other_meshes(name: str, mesh: Mesh, batches: int) -> None:
    check_step(name, mesh, batches, "train.document_mask=true", "params.window=3")


FORMATS = "train.saved_formats={attention: e5m6, experts: fp8}"
NO_MTP = "architecture.mtp.depth=0"


@pytest.mark.slow
def test_a_step_with_saved_formats() -> None:
    """Rows are encoded by themselves, on whatever rank they are."""
    check_step("1f1b", Mesh(1, 1, 2, 2), 2, FORMATS, NO_MTP)


@pytest.mark.slow
def test_a_step_in_fp8() -> None:
    """A pipeline computes each micro-batch with the bits of one stage; their sums differ in order.

    Where experts are on several ranks, tiles of tokens are of other tokens, and so are their bits.
    """
    of, batches = description("precision.policy=fp8_blockwise", FORMATS, NO_MTP), 4
    found = {}
    for name, ranks in (("1f1b", 1), ("dualpipe", 2)):
        where = replace(layout(Mesh(ranks, 1, 1, 1), of, schedule=name),
                        micro_batches=batches)  # fmt: skip
        programs = rank_programs(of, where)
        ends = [end_of(of, where, i, program) for i, program in enumerate(programs)]
        whole = after(of, "train", "simplify")
        weights = random_weights(whole, dtype=torch.float64)
        inputs = [
            random_inputs(whole, {"batch": 1, "seq": SEQ}, seed=n, dtype=torch.float64)
            for n in range(batches)
        ]
        order = with_transfers(schedule(name, ranks, batches))
        found[ranks] = train_step(where, order, programs, ends, inputs, weights)
    for key, expected in found[1].items():
        torch.testing.assert_close(found[2][key], expected, rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.slow
def test_a_stage_that_is_not_summed_over_its_mirror_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Layout, "gradient_axes", property(lambda self: self.mesh.data_axes))
    with pytest.raises(AssertionError):
        check_step("dualpipe", Mesh(2, 1, 1, 1), 4)
