"""The sampler: it draws from the probabilities that its filters leave, and says what it saw."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chisquare

from runtime.normal import tensor_key, uniform
from runtime.serve.request import Sampling, Token
from runtime.serve.sampler import choose, with_logprobs

LOGITS = torch.tensor([0.0, 2.0, -1.0, 1.0, 1.0, -3.0])
DRAWS = 4000


def draws(**settings: object) -> list[int]:
    """How often each token is chosen, over as many seeds."""
    found = [0] * len(LOGITS)
    for seed in range(DRAWS):
        sampling = Sampling(max_tokens=1, seed=seed, **settings)  # type: ignore[arg-type]
        found[choose(LOGITS, sampling, [0], [])] += 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "kept", "temperature"),
    [
        ({"temperature": 1.0}, range(6), 1.0),
        ({"temperature": 0.7}, range(6), 0.7),
        ({"temperature": 1.0, "top_k": 2}, (1, 3), 1.0),  # of 3 and 4, equals, the lower id
        ({"temperature": 2.0, "top_p": 0.6}, (1, 3, 4), 2.0),
        ({"temperature": 1.0, "min_p": 0.3}, (1, 3, 4), 1.0),
        ({"temperature": 1.0, "logit_bias": {1: -100.0}}, (0, 2, 3, 4, 5), 1.0),
    ],
)
def test_chance_follows_the_probabilities(
    settings: dict[str, object], kept: tuple[int, ...], temperature: float
) -> None:
    found = draws(**settings)
    assert all(found[i] == 0 for i in range(6) if i not in kept)
    expected = (LOGITS[list(kept)].double() / temperature).softmax(0) * DRAWS
    assert chisquare([found[i] for i in kept], expected.tolist()).pvalue > 0.001


def test_chance_depends_on_seed_and_place_alone() -> None:
    flat, sampling = torch.zeros(1000), Sampling(max_tokens=9, temperature=1.0, seed=5)
    here = choose(flat, sampling, [1, 2], [3])
    assert here == choose(flat, sampling, [7], [8, 9]) == choose(flat + 1, sampling, [1, 2], [3])
    assert here != choose(flat, sampling, [1, 2], [3, 4])
    assert here != choose(flat, Sampling(max_tokens=9, temperature=1.0, seed=6), [1, 2], [3])


def test_uniform_numbers_are_between_zero_and_one() -> None:
    numbers = uniform(100_000, tensor_key(1, "x"))
    assert 0 < numbers.min() < 1e-4 and 1 - 1e-4 < numbers.max() < 1
    assert chisquare(numbers.histc(50, 0, 1).tolist()).pvalue > 0.001


def test_greedy_takes_the_best_and_of_equals_the_lowest() -> None:
    greedy = Sampling(max_tokens=9)
    assert choose(LOGITS, greedy, [0], []) == 1
    assert choose(torch.tensor([1.0, 3.0, 3.0]), greedy, [0], []) == 1


def test_the_lowest_temperatures_are_greedy() -> None:
    for temperature in (5e-324, 1e-300, 1e-6):
        sampling = Sampling(max_tokens=9, temperature=temperature)
        assert choose(torch.tensor([1.0, 5.0, 3.0]), sampling, [0], []) == 1


def test_penalties() -> None:
    def best(output: list[int], **settings: float) -> int:
        return choose(LOGITS, Sampling(max_tokens=9, **settings), [5], output)  # type: ignore[arg-type]

    assert best([1], presence_penalty=0.9) == 1 and best([1], presence_penalty=1.1) == 3
    assert best([1, 1], presence_penalty=0.9) == 1
    assert best([1, 1], frequency_penalty=0.6) == 3
    assert best([1], repetition_penalty=1.9) == 1 and best([1], repetition_penalty=2.1) == 3
    # Of negative logits a penalty makes more negative ones; the prompt counts, too.
    logits = torch.tensor([-1.0, -1.1])
    assert choose(logits, Sampling(max_tokens=9, repetition_penalty=2.0), [0], []) == 1


def test_no_end_before_the_least_number_of_tokens() -> None:
    sampling = Sampling(max_tokens=9, end_tokens=frozenset({1}), min_tokens=2)
    assert [choose(LOGITS, sampling, [0], [3] * n) for n in range(3)] == [3, 3, 1]


def test_log_probabilities_are_the_model_s_own() -> None:
    assert with_logprobs(LOGITS, 3, None) == Token(3)
    token = with_logprobs(LOGITS, 4, 3)
    assert token.logprob == pytest.approx(float(LOGITS.log_softmax(0)[4]))
    assert [id for id, _ in token.top] == [1, 3, 4]
    assert sum(math.exp(p) for _, p in with_logprobs(LOGITS, 0, 6).top) == pytest.approx(1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1, "temperature must be 0 or more, got -1"),
        ("temperature", math.nan, "temperature must be 0 or more, got nan"),
        ("temperature", math.inf, "temperature must be 0 or more, got inf"),
        ("top_p", 0, "top_p must be above 0 and at most 1, got 0"),
        ("min_p", 1.5, "min_p must be from 0 to 1, got 1.5"),
        ("max_tokens", -1, "max_tokens must be 0 or more, got -1"),
        ("min_tokens", 5, "min_tokens must be from 0 to 4, got 5"),
        ("end_tokens", frozenset({6}), "token ids must be from 0 to 5, got 6"),
        ("logit_bias", {0: 101.0}, "logit_bias must be from -100 to 100, got 101.0 for 0"),
        ("logit_bias", {0: math.nan}, "logit_bias must be from -100 to 100, got nan for 0"),
    ],
)
def test_wrong_settings(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_tokens": 4, field: value}).check(6)  # type: ignore[arg-type]
