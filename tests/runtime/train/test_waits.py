"""Who is named where ranks wait for ever, and how long they waited."""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from runtime.config import Config
from runtime.train import pipeline
from runtime.train.overlap import InOrder
from runtime.train.waits import HangReport, RankState, Waits, report

HOSTS = [f"node{rank}" for rank in range(4)]


def waits_for(rank: int, *others: int) -> RankState:
    return RankState(HOSTS[rank], f"what {rank} needs", others)


def test_a_rank_that_does_not_answer_is_named_through_others() -> None:
    """0 waits for 1, and 1 for 2, which is gone."""
    states = {0: waits_for(0, 1), 1: waits_for(1, 2), 3: waits_for(3, 0)}
    assert report(0, 12.3, states, HOSTS) == (
        "rank 2 on node2 does not answer, and rank 1 on node1 waits for it, the first for 12 s: "
        "what 1 needs"
    )


def test_a_rank_that_computes_is_named_unless_another_is_gone() -> None:
    computes = RankState(HOSTS[1], None, ())
    states = {0: waits_for(0, 0, 1, 2, 3), 1: computes, 2: waits_for(2, 0), 3: waits_for(3, 0)}
    assert report(0, 5, states, HOSTS).startswith("rank 1 on node1 goes on computing, and rank 0")
    del states[3]
    assert report(0, 5, states, HOSTS).startswith("rank 3 on node3 does not answer, and rank 0")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each process printed as it ended; here threads end instead."""
    found: list[str] = []

    def end(watching: HangReport, line: str = "") -> None:
        if not watching.ended.is_set():
            found.append(line)
            watching.ended.set()

    monkeypatch.setattr(HangReport, "_end", end)
    return found


def test_one_line_is_printed_by_all_ranks_together(ended: list[str]) -> None:
    """0 waits for 1 and 1 for 2, which has stopped; 3 waits for all."""
    store, there = HashStore(), (0, 1, 3)
    store.set("host 2", "node2")
    waits = {rank: Waits() for rank in there}
    needed = {0: [0, 1], 1: [2], 3: [0, 1, 2, 3]}
    ranks = [HangReport(waits[rank], store, rank, 4, patience=1) for rank in there]
    with ExitStack() as stack:
        for rank in there:
            stack.enter_context(waits[rank].waiting(f"what {rank} needs", needed[rank]))
        for thread in (thread for one in ranks for thread in one.threads):
            thread.join(10)
    (line,) = (line for line in ended if line)
    assert re.fullmatch(
        r"rank 2 on node2 does not answer, and rank [13] on \S+ waits for it, .*: what [13] needs",
        line,
    )
    assert all(one.ended.is_set() for one in ranks)


def test_a_rank_tells_what_it_knows_if_the_store_has_gone(ended: list[str]) -> None:
    """As it does where the first rank has it, and is the one that stopped."""

    class Gone:
        def set(self, key: str, value: str) -> None:
            pass

        def check(self, keys: list[str]) -> bool:
            raise RuntimeError("connection reset")

        def add(self, key: str, amount: int) -> int:
            raise RuntimeError("connection reset")

    waits, store = Waits(), Gone()
    with waits.waiting("receive 4", [0]):
        rank = HangReport(waits, store, 1, 2, patience=0.2)  # type: ignore[arg-type]
        rank.threads[0].join(10)
    (line,) = ended
    assert re.fullmatch(r"rank 1 on \S+ waits for receive 4", line)


def test_ranks_that_do_not_wait_long_are_left_alone(ended: list[str]) -> None:
    waits = Waits()
    rank = HangReport(waits, HashStore(), 0, 2, patience=0.8)
    for _ in range(10):
        with waits.waiting("a message", [1]):
            time.sleep(0.1)
    rank.close()
    assert ended == [] and waits.seconds > 0.9


def test_ranks_that_wait_for_one_another_are_told() -> None:
    states = {0: waits_for(0, 1), 1: waits_for(1, 0)}
    assert report(0, 5, states, HOSTS) == (
        "rank 0 on node0 has waited 5 s for ranks that wait, too: what 0 needs"
    )


def test_time_is_counted_and_an_operation_is_named_with_its_chunk() -> None:
    waits = Waits()
    with waits.computing("chunk 1F3"), waits.waiting("the exchange of tokens", [0, 1]):
        assert waits.now is not None and waits.now.what == "the exchange of tokens in chunk 1F3"
        time.sleep(0.02)
    with pytest.raises(RuntimeError), waits.waiting("receive 4", [0]):
        assert waits.now is not None and waits.now.what == "receive 4"
        raise RuntimeError
    assert waits.now is None and 0.02 <= waits.seconds < 1


def test_a_message_is_named_by_its_place_in_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Number, micro-batch and stage, and the rank at the other end: here 5 of the run."""
    waits, told = Waits(), []

    def arrives(tensor: Tensor, sender: int, group: object) -> None:
        assert waits.now is not None
        told.append((waits.now.what, list(waits.now.ranks), sender))

    monkeypatch.setattr(pipeline, "recv", arrives)
    row = pipeline.Row.forward([0, 1], rank=1)
    stage: Any = SimpleNamespace(received=lambda batch, seq: (torch.empty(batch, seq),))
    group: Any = None
    held = pipeline.Held(Config({}), {1: stage}, 2, [5, 9], group, waits, InOrder())
    pipeline.Execution(row, held, [torch.zeros(1, 4)], 0).transfer(("receive", 0))
    assert told == [("receive 0, activations of micro-batch 0 for stage 1", [5], 5)]
