from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.cache import Cache
from runtime.config import freeze
from runtime.generate import _sample
from tests.support.tiny import CONFIG, Model


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(dtype=torch.float32, seed=3)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 96, shape, generator=torch.Generator().manual_seed(seed))


class Scripted:
    """Gives the scores that `script` says for each step, and records what it was asked."""

    config = CONFIG
    device = torch.device("cpu")

    def __init__(self, *script: dict[int, float]) -> None:
        self.script = [torch.full((96,), -5.0) for _ in script]
        for row, scores in zip(self.script, script, strict=True):
            for token, score in scores.items():
                row[token] = score
        self.asked: list[tuple[list[int], list[int]]] = []

    def decode(self, tokens: Tensor, position: Tensor, cache: Cache) -> Tensor:
        self.asked.append((tokens[0].tolist(), position[0].tolist()))
        return self.script[len(self.asked) - 1].expand(len(tokens), -1)

    def prefill(self, tokens: Tensor, position: Tensor, cache: Cache) -> Tensor:
        return self.decode(tokens, position, cache)


def generate(model: Any, prompt: Tensor, new: int, **settings: Any) -> list[list[int]]:
    return Model.generate(model, prompt, new, **settings).tolist()


def test_cached_decoding_equals_the_full_forward(model: Model) -> None:
    text = tokens(2, 12)
    full = model(text).logits
    cache, start = Cache(2, 12), 0
    for size in (5, 1, 3, 1, 2):
        position = torch.arange(start, start + size).expand(2, -1)
        last = model.decode(text[:, start : start + size], position, cache)
        start += size
        assert torch.allclose(last, full[:, start - 1], atol=1e-5)
    assert cache.bytes == 2 * 12 * 2 * (32 + 8) * 4


def test_greedy_equals_choosing_from_the_full_forward(model: Model) -> None:
    text = prompt = tokens(3, 7)
    for _ in range(20):
        text = torch.cat((text, model(text).logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.generate(prompt, 20, eos_token_id=None), text)


def test_each_step_feeds_only_what_is_new() -> None:
    model = Scripted({7: 1.0}, {8: 1.0}, {9: 1.0})
    assert generate(model, torch.tensor([[3, 4]]), 3) == [[3, 4, 7, 8, 9]]
    assert model.asked == [([3, 4], [0, 1]), ([7], [2]), ([8], [3])]


def test_of_equal_scores_the_lowest_id_wins() -> None:
    assert generate(Scripted({9: 1.0, 4: 1.0, 60: 1.0}), torch.tensor([[2]]), 1) == [[2, 4]]


def test_ended_rows_are_filled_until_all_have_ended() -> None:
    class Ends(Scripted):
        def decode(self, tokens: Tensor, position: Tensor, cache: Cache) -> Tensor:
            scores = super().decode(tokens, position, cache).clone()
            if len(self.asked) == 2:
                scores[0, 1] = 9.0  # row 0 ends at the second step
            return scores

    model = Ends({7: 1.0}, {7: 1.0}, {8: 1.0}, {1: 1.0}, {7: 1.0})
    assert generate(model, torch.tensor([[2], [3]]), 5) == [[2, 7, 1, 1, 1], [3, 7, 7, 8, 1]]


def test_the_end_can_be_another_token_or_none() -> None:
    script = [{7: 1.0}, {1: 1.0}, {8: 1.0}]
    prompt = torch.tensor([[2]])
    assert generate(Scripted(*script), prompt, 3) == [[2, 7, 1]]
    assert generate(Scripted(*script), prompt, 3, eos_token_id=7) == [[2, 7]]
    assert generate(Scripted(*script), prompt, 3, eos_token_id=None) == [[2, 7, 1, 8]]


SEVERAL_ENDS = {"max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": [5, 9]}


def test_any_of_several_tokens_ends_a_row() -> None:
    script = [{7: 1.0}, {9: 1.0}, {8: 1.0}]
    prompt = torch.tensor([[2]])
    assert generate(Scripted(*script), prompt, 3, eos_token_id=[5, 9]) == [[2, 7, 9]]
    assert generate(Scripted(*script), prompt, 3, eos_token_id=(7, 9)) == [[2, 7]]
    assert generate(Scripted(*script), prompt, 3, eos_token_id=[]) == [[2, 7, 9, 8]]
    listed = Scripted(*script)
    listed.config = freeze({name: CONFIG[name] for name in CONFIG} | {"sequence": SEVERAL_ENDS})
    assert generate(listed, prompt, 3) == [[2, 7, 9]]


def test_rows_that_ended_differently_are_filled_with_the_first() -> None:
    class Rows(Scripted):
        def decode(self, tokens: Tensor, position: Tensor, cache: Cache) -> Tensor:
            scores = super().decode(tokens, position, cache).clone()
            if len(self.asked) == 1:
                scores[0, 9] = 9.0
            return scores

    model = Rows({7: 1.0}, {8: 1.0}, {5: 1.0}, {6: 1.0})
    found = generate(model, torch.tensor([[2], [3]]), 4, eos_token_id=[5, 9])
    assert found == [[2, 9, 5, 5], [3, 7, 8, 5]]


def test_no_new_tokens_gives_the_prompt(model: Model) -> None:
    prompt = tokens(1, 3)
    result = model.generate(prompt, 0)
    assert torch.equal(result, prompt) and result.data_ptr() != prompt.data_ptr()


def test_sampling_repeats_with_its_seed_and_leaves_torchs_alone(model: Model) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a, b, c = (model.generate(tokens(2, 5), 20, temperature=2.0, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())


def frequencies(scores: list[float], temperature: float, top_p: float) -> list[float]:
    draws = 20_000
    logits = torch.tensor(scores).expand(draws, -1)
    drawn = _sample(logits, temperature, top_p, torch.Generator().manual_seed(0))
    return (drawn.bincount(minlength=len(scores)) / draws).tolist()


def test_sampling_follows_the_probabilities() -> None:
    scores = [0.0, 2.0, -1.0, 1.0]
    for temperature in (0.5, 1.0, 3.0):
        expected = (torch.tensor(scores) / temperature).softmax(0).tolist()
        assert frequencies(scores, temperature, 1.0) == pytest.approx(expected, abs=0.015)


def test_top_p_keeps_the_smallest_set_that_holds_it() -> None:
    scores = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().tolist()
    assert frequencies(scores, 1.0, 0.5) == [0, 1, 0, 0]
    assert frequencies(scores, 1.0, 0.51) == pytest.approx([0, 5 / 8, 0, 3 / 8], abs=0.015)
    kept = [15 / 95, 50 / 95, 0, 30 / 95]
    assert frequencies(scores, 1.0, 0.9) == pytest.approx(kept, abs=0.015)
    assert frequencies(scores, 1.0, 1e-9) == [0, 1, 0, 0]
    # One of two halves is exactly a half, and of equals the lowest id is kept.
    assert frequencies([0.0, 0.0], 1.0, 0.5) == [1, 0]


def test_a_very_low_temperature_is_greedy() -> None:
    assert frequencies([1.0, 2.0, 1.5], 1e-310, 1.0) == [0, 1, 0]


@pytest.mark.parametrize(
    ("prompt", "new", "settings", "message"),
    [
        (torch.ones(1, 2), 1, {}, "int64"),
        ([[3, 4]], 1, {}, "got a list"),
        (torch.ones(2, dtype=torch.int64), 1, {}, r"int64 \[batch, seq\]"),
        (torch.ones(1, 0, dtype=torch.int64), 1, {}, "at least one token"),
        (torch.tensor([[3, 96]]), 1, {}, "from 0 to 95, got 3 to 96"),
        (torch.tensor([[-1, 5]]), 1, {}, "from 0 to 95, got -1 to 5"),
        (torch.tensor([[3]]), -1, {}, "max_new_tokens must be 0 or more"),
        (tokens(1, 200), 57, {}, r"max_position_embeddings \(256\): max_new_tokens can be 56"),
        (torch.tensor([[3]]), 1, {"temperature": -0.1}, "temperature"),
        (torch.tensor([[3]]), 1, {"temperature": float("nan")}, "temperature"),
        (torch.tensor([[3]]), 1, {"top_p": 0.0}, "top_p"),
        (torch.tensor([[3]]), 1, {"top_p": 1.1}, "top_p"),
    ],
)
def test_what_makes_no_sense_is_explained(
    model: Model, prompt: Tensor, new: int, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, new, **settings)


def test_the_longest_text_is_allowed(model: Model) -> None:
    assert model.generate(tokens(1, 250), 6, eos_token_id=None).shape == (1, 256)


def test_a_model_without_weights_or_with_nan_is_reported() -> None:
    with pytest.raises(ValueError, match="no weights yet"):
        Model(device="meta").generate(tokens(1, 2), 1)
    with pytest.raises(FloatingPointError, match="NaN or infinite at token 2"):
        generate(Scripted({3: 1.0}, {5: float("nan")}), torch.tensor([[4]]), 2)
