"""Prompts on one engine, answers on another: the same bits as on one, whatever is lost between."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from runtime.serve.engine import Engine
from runtime.serve.handoff import BlockOf, DecodeEngine, InProcess, Message, PrefillEngine
from runtime.serve.options import Options
from runtime.serve.request import Sampling, Token
from tests.support.tiny import Model

VOCAB = 96
LOST = 0.05


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(dtype=torch.float32, seed=3)


class Lossy(InProcess):
    """Loses some blocks."""

    def __init__(self, lost: float) -> None:
        super().__init__()
        self.rng, self.lost, self.losses = random.Random(0), lost, 0

    def send(self, message: Message) -> None:
        if isinstance(message, BlockOf) and self.rng.random() < self.lost:
            self.losses += 1
        else:
            super().send(message)


def asked(count: int) -> list[tuple[list[int], Sampling]]:
    rng = random.Random(0)
    found = []
    for i in range(count):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 7, 8, 40, 90]))]
        ends = frozenset(rng.sample(range(VOCAB), 4))
        temperature = rng.choice([0.0, 0.7])
        found.append(
            (prompt, Sampling(rng.choice([1, 4, 8]), temperature, seed=i, end_tokens=ends))
        )
    found += [(found[i][0] + [5, 6], found[i][1]) for i in range(4)]  # some begin alike
    return found


def divided(
    model: Model, requests: list[Any], transport: InProcess, options: Options, seconds: float
) -> tuple[list[list[Token]], DecodeEngine]:
    prefill = PrefillEngine(Engine(model, options), transport)
    decode = DecodeEngine(Engine(model, options), transport, seconds)
    found: list[list[Token]] = [[] for _ in requests]
    ends = [0] * len(requests)
    for i, request in enumerate(requests):
        prefill.add(str(i), *request)
    while prefill.busy or decode.busy:
        if prefill.busy:
            prefill.step()
        for event in decode.step():
            found[int(event.id)] += event.tokens
            ends[int(event.id)] += event.finish is not None
        decode.engine.scheduler.blocks.check()
    assert ends == [1] * len(requests)
    assert prefill.engine.scheduler.blocks.held == decode.engine.scheduler.blocks.held == 0
    return found, decode


@pytest.mark.slow
@pytest.mark.parametrize("speculate", [0, 2])
def test_the_bits_of_one_engine(model: Model, speculate: int) -> None:
    """Also where blocks are lost, and where there is no room for all at once."""
    requests = asked(16)
    expected = Engine(model, Options(page=8)).generate(requests)
    options = Options(page=8, step_tokens=40, max_requests=5, speculate=speculate)
    found, decode = divided(model, requests, InProcess(), options, 60)
    assert found == expected and decode.recomputed == 0
    assert decode.engine.stats()["steps"] < sum(len(answer) for answer in expected)
    lossy = Lossy(LOST)
    found, decode = divided(model, requests, lossy, options, 0.0)
    assert found == expected and lossy.losses > 0 and decode.recomputed > 0


def test_a_prompt_is_not_computed_again(model: Model) -> None:
    """A step of the decode engine has one row of each answer; blocks are found by their text."""
    prompt = [*range(40)]
    requests = [(prompt, Sampling(12))]
    _, decode = divided(model, requests, InProcess(), Options(page=8), 60)
    assert decode.engine.stats()["steps"] == 11
    decode.engine.add("again", prompt, Sampling(1))
    (event,) = decode.engine.step()
    assert event.cached == 32


def test_engines_that_do_not_fit_end_requests_and_nothing_else(model: Model) -> None:
    """One is too long for the other, one has blocks of another size."""
    transport = InProcess()
    prefill = PrefillEngine(Engine(model, Options(page=8)), transport)
    decode = DecodeEngine(Engine(model, Options(page=8, max_model_len=40)), transport, 5)
    for i, length in enumerate((4, 60, 5)):
        prefill.add(str(i), [7] * length, Sampling(max_tokens=3))
    errors, ends = {}, {}
    while prefill.busy or decode.busy:
        if prefill.busy:
            prefill.step()
        for event in decode.step():
            if event.finish is not None:
                ends[event.id], errors[event.id] = event.finish, event.message
    assert ends == {"0": "length", "1": "error", "2": "length"}
    assert "a prompt of 60 tokens leaves no room" in errors["1"]
    prefill = PrefillEngine(Engine(model, Options(page=8, speculate=1)), transport)
    prefill.add("3", [5, 9], Sampling(max_tokens=3))
    prefill.step()
    *_, last = decode.step()
    assert last.finish == "error" and "need the same model" in last.message
    assert decode.engine.scheduler.blocks.held == 0 and not decode.busy
