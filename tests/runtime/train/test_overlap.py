"""Exchanges and messages beside computing, on streams that are stand-ins: nothing is read before
it is there, no memory given back before it has been read, and chunks take turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.saved import Deferred, Gradients, Grads, Saved
from runtime.train import overlap
from runtime.train.overlap import InOrder, SideStreams, Turns
from runtime.train.pipeline import Chunk, Execution, Row
from runtime.train.waits import Waits
from runtime.unit import deferring, differentiable
from tests.support.races import Races, Watch


def test_two_chunks_take_turns() -> None:
    turns, log = Turns(), []

    def chunk(name: str, parts: int) -> str:
        for part in range(parts):
            log.append(f"{name}{part}")
            turns.give()
        log.append(f"{name} ends")
        return name

    for _ in range(2):
        assert turns.both(partial(chunk, "F", 2), partial(chunk, "B", 3)) == ("F", "B")
        assert log == ["F0", "B0", "F1", "B1", "F ends", "B2", "B ends"]
        log.clear()
    chunk("F", 2)  # alone
    assert log == ["F0", "F1", "F ends"]


@pytest.mark.parametrize("failing", ["F", "B"])
def test_where_one_chunk_fails_the_other_ends_at_its_next_turn(failing: str) -> None:
    turns, log = Turns(), []

    def chunk(name: str) -> None:
        for part in range(3):
            log.append(f"{name}{part}")
            turns.give()
            if name == failing:
                raise ValueError(name)

    with pytest.raises(ValueError, match=failing):
        turns.both(partial(chunk, "F"), partial(chunk, "B"))
    assert log == {"F": ["F0", "B0"], "B": ["F0", "B0", "F1"]}[failing]


# ---- happens before ----------------------------------------------------------------------------


def chunk(races: Races, streams: SideStreams, log: list[str], name: str) -> Tensor:
    """Two layers whose experts multiply by 2, and what it receives and sends."""
    with Watch(races):
        x, arrived = streams.receive(lambda: torch.ones(8) * 1.0)
        streams.wait(arrived)
        for layer in range(2):
            log.append(f"{name}{layer}")
            rows = x + 1
            del x  # may be given to the next that is received
            x = streams.exchange(lambda rows: (rows * 4) / 2, rows)
            x = x * torch.full((8,), 3.0)
        sent = x * 2
        made = streams.mark()
        x = x + torch.ones(8)  # behind the event
        streams.send(made, partial(torch.neg, sent), [sent])
        return x


def run(races: Races, fault: Callable[[SideStreams], None] | None = None) -> list[str]:
    streams, log = races.streams(overlap), list[str]()
    if fault:
        fault(streams)
    for _ in range(2):
        first, second = streams.both(
            partial(chunk, races, streams, log, "F"), partial(chunk, races, streams, log, "B")
        )
        assert torch.equal(first, second) and first[0] == (12 + 1) * 6 + 1
    streams.finish()
    with Watch(races):
        torch.ones(8)
    return log


def test_nothing_is_read_before_it_is_there() -> None:
    races = Races()
    assert run(races) == ["B0", "F0", "B1", "F1"] * 2
    assert races.found == []
    assert min(races.computing.clock.values()) > 4


def test_gradients_of_weights_are_computed_before_a_chunk_waits() -> None:
    races = Races()
    streams, log, weight = races.streams(overlap), list[str](), torch.zeros(8)
    wait = streams.wait

    def product(name: str, x: Tensor) -> Tensor:
        log.append(name)
        return x * 2

    def waited(event: object) -> None:
        log.append("wait")
        wait(event)

    def chunk(name: str, products: bool) -> None:
        with Watch(races):
            x = torch.ones(8)
            for layer in range(2):
                log.append(f"{name}{layer}")
                if products:
                    streams.deferred.add(weight, partial(product, f"W{layer}", x))
                x = streams.exchange(lambda x: x * 3, x)

    streams.wait = waited
    streams.both(partial(chunk, "F", False), partial(chunk, "B", True))
    assert log == ["B0", "F0", "W0", "wait", "B1", "W1", "wait", "F1", "wait", "wait"]
    assert races.found == [] and weight.grad is not None and weight.grad[0] == 2 + 6


def test_what_waits_is_forgotten_where_a_pair_fails() -> None:
    """Else the next pair would add it to gradients of another step, and hold its operands."""
    streams, weight = Races().streams(overlap), torch.zeros(2)

    def backward() -> None:
        streams.deferred.add(weight, partial(torch.ones, 2))
        raise ValueError("fails")

    with pytest.raises(ValueError, match="fails"):
        streams.both(nothing, backward)
    streams.both(nothing, nothing)
    assert weight.grad is None


def test_a_chunk_without_its_gradients_of_weights_is_noticed() -> None:
    held: Any = SimpleNamespace(overlap=InOrder(), waits=Waits())
    step = Execution(Row((), ()), held, [], 0)
    step.deferred = {(2, 1): Deferred(), (0, 3): Deferred()}
    step.weights(Chunk("W", 2, 1))
    with pytest.raises(RuntimeError, match="no chunk W for chunk 0I3: gradients are missing"):
        step.finish()
    step.weights(Chunk("W", 0, 3))
    step.finish()


def test_what_waits_is_added_as_autograd_adds_it() -> None:
    module = torch.nn.Linear(3, 2, bias=False, dtype=torch.bfloat16)
    weight, x = module.weight, torch.randn(5, 3, dtype=torch.bfloat16)

    def forward(x: Tensor, saved: Saved) -> Tensor:
        saved.save(module, x)
        return x @ weight.T

    def backward(d: Tensor, saved: Saved, grads: Grads) -> None:
        (x,) = saved.pop(module)
        grads.defer(weight, torch.matmul, d.T, x)

    products, found = Deferred(), []
    for waiting in (None, products):
        weight.grad = None
        for scale in (0.3, 0.7, 1.1):  # one chunk after the other
            y = differentiable(forward, backward, Gradients((0,), ()), (weight,), x * scale)
            with deferring(waiting):
                (y * scale).sum().backward()
        assert (weight.grad is None) == (waiting is not None)
        products.compute()
        assert weight.grad is not None
        found.append(weight.grad)
    assert torch.equal(*found)


def test_what_waits_has_the_precision_of_the_spec_under_autocast() -> None:
    products, weight, d, x = Deferred(), torch.zeros(4, 3), torch.randn(4, 5), torch.randn(5, 3)
    products.add(weight, partial(torch.matmul, d, x))
    with torch.autocast("cpu", torch.bfloat16):
        products.compute()
    assert weight.grad is not None and torch.equal(weight.grad, d @ x)


def nothing(*_: object) -> None:
    pass


def not_held(streams: SideStreams) -> None:
    send = streams.send
    streams.send = lambda made, sending, _: send(made, sending, [])  # type: ignore[method-assign]


def unordered(name: str, method: str) -> Callable[[SideStreams], None]:
    def fault(streams: Any) -> None:
        setattr(getattr(streams, name) if name else streams, method, nothing)

    return fault


FAULTS = {
    "computing reads what exchanges uses": unordered("", "wait"),
    "exchanges reads what computing uses": unordered("exchanges", "wait_stream"),
    "messages reads what computing uses": unordered("messages", "wait_event"),
    "messages takes what computing uses": unordered("messages", "wait_stream"),
    "computing takes what messages uses": not_held,
}
"""What is found, and how to get it."""


@pytest.mark.parametrize("found", FAULTS)
def test_what_could_happen_too_early_is_noticed(found: str) -> None:
    races = Races()
    run(races, FAULTS[found])
    assert any(one.endswith(found) for one in races.found), races.found
