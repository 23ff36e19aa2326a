from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.cache import Cache
from runtime.config import freeze
from runtime.pages import Pages
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
    draft_offsets = ()
    paged_latent_attention = None

    def __init__(self, *script: dict[int, float], prompt: int = 1) -> None:
        """For prompts of so many tokens."""
        self.script = [torch.full((96,), -5.0) for _ in script]
        for row, scores in zip(self.script, script, strict=True):
            for token, score in scores.items():
                row[token] = score
        self.prompt = prompt
        self.asked: list[tuple[list[int], list[int]]] = []

    def decode(self, tokens: Tensor, position: Tensor, cache: Pages) -> Tensor:
        self.asked.append((tokens[0].tolist(), position[0].tolist()))
        cache.last(torch.zeros(1, tokens.shape[1], 4))
        places = position[0, cache.rows.scored] + 1 - self.prompt
        rows = [self.script[max(i, 0)] for i in places.tolist()]
        return torch.stack(rows) if rows else torch.zeros(0, 96)


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
    model = Scripted({7: 1.0}, {8: 1.0}, {9: 1.0}, prompt=2)
    assert generate(model, torch.tensor([[3, 4]]), 3) == [[3, 4, 7, 8, 9]]
    steps = [asked for asked in model.asked if asked != ([0], [0])]  # that count memory
    assert steps == [([3, 4], [0, 1]), ([7], [2]), ([8], [3])]


def test_of_equal_scores_the_lowest_id_wins() -> None:
    assert generate(Scripted({9: 1.0, 4: 1.0, 60: 1.0}), torch.tensor([[2]]), 1) == [[2, 4]]


class Ends(Scripted):
    """Row 0, which began with token 2, is given another token at its step `at`."""

    def __init__(self, *script: dict[int, float], at: int, token: int) -> None:
        super().__init__(*script)
        self.at, self.token = at, token

    def decode(self, tokens: Tensor, position: Tensor, cache: Pages) -> Tensor:
        scores = super().decode(tokens, position, cache)
        first = cache.rows.scored[:1]
        if len(self.asked) > 2 and int(position[0, first]) == self.at:
            scores[0, self.token] = 9.0
        return scores


def test_ended_rows_are_filled_until_all_have_ended() -> None:
    model = Ends({7: 1.0}, {7: 1.0}, {8: 1.0}, {1: 1.0}, {7: 1.0}, at=1, token=1)
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
    model = Ends({7: 1.0}, {8: 1.0}, {5: 1.0}, {6: 1.0}, at=0, token=9)
    found = generate(model, torch.tensor([[2], [3]]), 4, eos_token_id=[5, 9])
    assert found == [[2, 9, 5, 5], [3, 7, 8, 5]]


def test_prompts_of_any_lengths_give_lists(model: Model) -> None:
    prompts = [[5, 9, 40], [7], [*range(2, 40)]]
    found = model.generate(prompts, 6, eos_token_id=None)
    assert [len(text) for text in found] == [9, 7, 44]
    for prompt, text in zip(prompts, found, strict=True):
        assert model.generate(torch.tensor([prompt]), 6, eos_token_id=None).tolist() == [text]


def test_a_sample_does_not_depend_on_its_neighbours(model: Model) -> None:
    prompts = [[5, 9, 40], [7], [5, 9, 40], [8, 8]]
    settings: dict[str, Any] = {"temperature": 1.5, "top_k": 50, "eos_token_id": None}
    found = model.generate(prompts, 12, seed=3, **settings)
    assert found[0] != found[2]
    for i, prompt in enumerate(prompts):
        assert model.generate([prompt], 12, seed=[3 + i], **settings) == [found[i]]
    drafted = model.generate(prompts, 12, seed=3, speculate=1, **settings)
    assert drafted == found


def test_tokens_are_shown_as_they_come(model: Model) -> None:
    shown: list[tuple[int, int]] = []
    found = model.generate(
        [[5, 9], [7]], 4, eos_token_id=None, show=lambda i, token: shown.append((i, token.id))
    )
    assert [id for i, id in shown if i == 0] == found[0][2:]
    assert sorted(i for i, _ in shown[:2]) == [0, 1] and len(shown) == 8


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


@pytest.mark.parametrize(
    ("prompt", "new", "settings", "message"),
    [
        (torch.ones(1, 2), 1, {}, "int64"),
        ([], 1, {}, "must be prompts"),
        ([3, 4], 1, {}, "must be prompts"),
        ([[3, 4], []], 1, {}, "at least one token"),
        ([[3, 4.0]], 1, {}, "must be ints"),
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
        (torch.tensor([[3]]), 1, {"top_q": 1.1}, "unexpected keyword argument 'top_q'"),
        (torch.tensor([[3]]), 1, {"seed": [1, 2]}, "2 seeds for 1 prompts"),
        (torch.tensor([[3]]), 1, {"speculate": 9}, "from 0 to 4"),
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
