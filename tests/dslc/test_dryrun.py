"""`dslc dryrun`: one rank of a plan, executed without data, against the plan and a real run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from runtime.train.dryrun import DryRun, Transfer, unmatched
from tests.support.command import Run
from tests.support.places import TINY

pytestmark = pytest.mark.slow
SMALL = [
    "train.sequence_length=16", "train.batch=8", "train.micro_batch=1", "train.learning_rate=1e-3",
    "train.steps=1", "architecture.layers.1.repeat=3", "architecture.mtp={depth: 0}",
]  # fmt: skip


def parallel(pipeline: int, expert: int, schedule: str = "1f1b", zero: int = 1) -> list[str]:
    layout = f"cluster: cpu_2x2, pipeline: {pipeline}, expert: {expert}, schedule: {schedule}"
    section = f"parallel={{{layout}, zero: {zero}, batch: 8, sequence_length: 16, micro_batch: 1}}"
    return [word for change in (*SMALL, section) for word in ("--set", change)]


def record(dslc: Run, *arguments: str) -> Any:
    outcome = dslc("dryrun", *arguments, "--format", "json")
    assert outcome.status == 0, outcome.err
    return json.loads(outcome.out)


Sent = dict[str, tuple[int, int]]


def planned(found: Any) -> Sent:
    """Messages and bytes of each purpose."""
    return {
        one["purpose"]: (
            one["inside"]["messages"] + one["across"]["messages"],
            one["inside"]["bytes"] + one["across"]["bytes"],
        )
        for one in found["planned"]["sent"]
    }


def sums(found: Any) -> Sent:
    """The same as executed, but for sums of losses and the like, which plans leave out."""
    sent = found["sent"].items()
    return {name: (one["messages"], one["bytes"]) for name, one in sent if name != "sums"}


@pytest.mark.parametrize("rank", [0, 2047])
def test_ranks_of_2048_hold_and_send_what_is_planned(dslc: Run, rank: int) -> None:
    """All but the tokens of a step, of which the plan counts those in flight."""
    found = record(dslc, "deepseek_v3", "--rank", str(rank))
    memory, sent = found["planned"]["memory_bytes"], found["sent"]
    assert (found["pipeline"], found["micro_batches"]) == (rank // 128, 120)
    for name in ("weights", "fp8_copies", "gradients"):
        assert found[name] == memory[name], name
    assert found["optimizer"] == memory["master_weights"] + memory["moments"]
    # And loads of experts and sums of losses: less than 0.1 MB.
    tokens, in_flight = 120 * 4097 * 8, 16 * 4096 * 8
    rest = found["activations"] - memory["activations"] - tokens
    assert -in_flight <= rest < 100_000
    assert sums(found) == planned(found)
    # Around rings of 256 ranks, and of 4 for experts.
    assert sent["gradients"]["messages"] == sent["parameters"]["messages"] == 255 + 3
    # A token goes to 4 of 8 nodes and to 8 ranks inside them, in 120 micro-batches through a layer
    # on one stage and two on the other: in FP8 with scales, weights and experts, and so its
    # gradient, without those. Before that ranks say how many.
    tokens, counts = 3 * 60 * 4096, 3 * 60 * (7 + 7) * 8
    fp8 = 7168 + 4 * 56
    row = fp8 + 4 * 8 + 2 * 8
    assert sent["dispatch"]["bytes"] == (4 + 8) * tokens * 7 // 8 * (row + fp8) + counts
    assert sent["combine"]["bytes"] == (4 + 8) * tokens * 7 // 8 * (2 * 2 * 7168 + 4 * 8)


@pytest.mark.parametrize(
    ("pipeline", "expert", "schedule", "zero"),
    [(4, 1, "zero_bubble", 1), (2, 2, "dualpipe_v", 1), (1, 4, "1f1b", 0)],
)
def test_every_layout_and_rank_is_executed(
    pipeline: int, expert: int, schedule: str, zero: int, dslc: Run
) -> None:
    """Without and with experts on other ranks; each micro-batch crosses each cut."""
    layout = parallel(pipeline, expert, schedule, zero)
    for rank in (0, 3):
        found = record(dslc, str(TINY), "--rank", str(rank), *layout)
        memory = found["planned"]["memory_bytes"]
        assert found["weights"] == memory["weights"]
        assert found["gradients"] == memory["gradients"]
        assert found["optimizer"] == memory["master_weights"] + memory["moments"]
        assert sums(found) == planned(found)
        stages, each = len(found["planned"]["stages"]), 8 * pipeline // 4
        # Activations to the next stage and gradients to the one before, but for the ends.
        ends = (found["pipeline"] in (0, pipeline - 1)) + (schedule == "dualpipe_v")
        messages = (2 * stages - ends) * each if pipeline > 1 else 0
        assert found["sent"].get("pipeline", {"messages": 0})["messages"] == messages
        assert ("dispatch" in found["sent"]) == (expert > 1)


def test_rows_send_and_receive_the_same_messages(dslc: Run) -> None:
    outcome = dslc("dryrun", TINY, "--all-rows", "--rank", "1", *parallel(2, 2, "dualpipe_v"))
    assert outcome.status == 0, outcome.err
    # 4 micro-batches, each three times over the cut between the ranks and back; no turn of them.
    assert outcome.out.endswith(
        "all 16 messages are received in the order in which they are sent\n"
    )
    assert [line.split()[:2] for line in outcome.out.splitlines()[1:3]] == [["0", "1"], ["1", "3"]]


def test_a_message_that_is_lost_swapped_or_of_another_size_is_named() -> None:
    def rows(*received: Transfer) -> list[DryRun]:
        first, second = (DryRun(rank, 2, rank, 1) for rank in (0, 1))
        first.transfers += [Transfer("send", n, 1, 64) for n in (3, 5)]
        second.transfers += received
        return [first, second]

    one, two = (Transfer("receive", n, 0, 64) for n in (3, 5))
    assert not list(unmatched(rows(one, two)))
    assert list(unmatched(rows(one))) == ["row 0 sends 2 messages to row 1, which receives 1"]
    assert len(list(unmatched(rows(two, one)))) == 2
    assert list(unmatched(rows(one, replace(two, bytes=32)))) == [
        "row 0 sends message 5 of 64 bytes to row 1, which receives message 5 of 32"
    ]


def test_what_cannot_be_executed_is_refused(dslc: Run) -> None:
    outcome = dslc("dryrun", TINY, "--rank", "4", *parallel(2, 2))
    assert outcome.status == 1
    assert outcome.err == "error: there is no rank 4 of 4: they count from 0\n"
    assert "E532" in dslc("dryrun", TINY).err
    outcome = dslc("dryrun", TINY, *parallel(1, 1))
    assert outcome.status == 1 and "stages.py" in outcome.err
