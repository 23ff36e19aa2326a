"""The engine: every request gives the same bits alone and in any company."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from runtime.compiled import CompiledModel, served
from runtime.pages import Pages
from runtime.serve.blocks import Blocks
from runtime.serve.engine import Engine
from runtime.serve.options import Options
from runtime.serve.request import Event, Sampling, Token
from runtime.serve.speculate import LUCK, TRIED
from tests.support.compiled import needs_compiler, package
from tests.support.tiny import Model

VOCAB = 96
Asked = tuple[list[int], Sampling]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(dtype=torch.float32, seed=3)


def compiled_model(factory: pytest.TempPathFactory) -> Model:
    """Its steps are compiled code."""
    built: Model = package(factory, "compiled_tiny").Model(seed=3)
    assert isinstance(served(built), CompiledModel)
    return built


BOTH = ["torch", pytest.param("compiled", marks=[needs_compiler, pytest.mark.slow])]


@pytest.fixture(scope="module", params=BOTH)
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The model above, and one whose steps are compiled code."""
    if request.param == "compiled":
        return compiled_model(tmp_path_factory)
    return Model(dtype=torch.float32, seed=3)


def asked(rng: random.Random) -> Asked:
    prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 15, 16, 17, 40, 90]))]
    return prompt, Sampling(
        max_tokens=rng.randrange(1, 16),
        temperature=rng.choice([0.0, 0.7, 1.5]),
        top_p=rng.choice([1.0, 0.9]),
        top_k=rng.choice([0, 20]),
        min_p=rng.choice([0.0, 0.01]),
        frequency_penalty=rng.choice([0.0, 0.5]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        seed=rng.randrange(1000),
        end_tokens=frozenset(rng.sample(range(VOCAB), 2)),
        logprobs=rng.choice([None, 2]),
    )


def run(engine: Engine) -> dict[str, list[Token]]:
    found: dict[str, list[Token]] = {}
    while engine.busy:
        for event in engine.step():
            found.setdefault(event.id, []).extend(event.tokens)
    return found


def alone(model: Model, requests: list[Asked], page: int = Options.page) -> list[list[Token]]:
    """Each request by itself, one after the other."""
    options = Options(max_requests=1, prefix_cache=False, page=page)
    engine, found = Engine(model, options), []
    for prompt, sampling in requests:
        engine.add("", prompt, sampling)
        found.append(run(engine)[""])
    return found


def together(
    model: Model, requests: list[Asked], options: Options, seed: int, blocks: int | None = None
) -> tuple[list[list[Token]], Engine]:
    """All requests, which arrive in some order while others run; `blocks` limits the cache."""
    engine, rng = Engine(model, options), random.Random(seed)
    if blocks is not None:
        engine.scheduler.blocks = Blocks(blocks)
    found: list[list[Token]] = [[] for _ in requests]
    ends = [0 for _ in requests]
    left = rng.sample(range(len(requests)), len(requests))
    while left or engine.busy:
        for i in left[: rng.randrange(4)]:
            engine.add(str(i), *requests[i])
            left.remove(i)
        for event in engine.step():
            found[int(event.id)] += event.tokens
            ends[int(event.id)] += event.finish is not None
        engine.scheduler.blocks.check()
    assert ends == [1] * len(requests)
    assert engine.scheduler.blocks.held == 0
    return found, engine


@pytest.mark.slow
def test_requests_give_the_same_bits_alone_and_in_any_company(either: Model) -> None:
    rng = random.Random(0)
    requests = [asked(rng) for _ in range(40)]
    # Some begin alike.
    requests += [(requests[i][0] + requests[i + 1][0], requests[i][1]) for i in range(8)]
    expected = alone(either, requests, page=8)
    for seed, options in enumerate(
        [
            Options(page=8),
            Options(page=8, max_requests=7, step_tokens=33),
            Options(page=8, max_requests=30, step_tokens=10, prefix_cache=False),
            Options(page=8, max_requests=9, step_tokens=40, speculate=1),
            Options(page=8, max_requests=9, step_tokens=40, speculate=3),
        ]
    ):
        found, engine = together(either, requests, options, seed)
        assert found == expected
        assert engine.stats()["cached_tokens"] > 0 or not options.prefix_cache
        assert engine.stats()["accepted_drafts"] > 0 or not options.speculate


@pytest.mark.slow
@pytest.mark.parametrize("speculate", [0, 3])
def test_preempted_requests_resume_with_the_same_bits(either: Model, speculate: int) -> None:
    rng = random.Random(1)
    requests = [
        (prompt[:8], replace(sampling, max_tokens=40, end_tokens=frozenset()))
        for prompt, sampling in (asked(rng) for _ in range(60))
    ]
    options = Options(
        page=4, max_requests=20, step_tokens=64, max_model_len=48, speculate=speculate
    )
    # Room for three of them.
    found, engine = together(either, requests, options, 2, blocks=37)
    assert engine.scheduler.preemptions >= 100
    # With room for all, nobody is preempted; that this equals each alone, the test above shows.
    assert found == together(either, requests, Options(page=4), 3)[0]


def test_a_few_in_company(model: Model) -> None:
    rng = random.Random(2)
    requests = [asked(rng) for _ in range(8)]
    found, _ = together(model, requests, Options(step_tokens=20), 0)
    assert found == alone(model, requests)


def test_greedy_is_that_of_the_whole_forward_pass(either: Model) -> None:
    prompt = [5, 9, 40, 2, 77]
    engine = Engine(either)
    engine.add("a", prompt, Sampling(max_tokens=20, logprobs=0))
    tokens = run(engine)["a"]
    text = torch.tensor([[*prompt, *(token.id for token in tokens)]])
    with torch.no_grad():
        scores = either(text).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert scores.argmax(-1).tolist() == [token.id for token in tokens]
    logprobs = torch.tensor([token.logprob for token in tokens])
    assert torch.allclose(scores.amax(-1), logprobs, atol=1e-5)


def test_prompts_of_different_lengths_in_one_call(model: Model) -> None:
    requests = [asked(random.Random(i)) for i in range(5)]
    came: list[tuple[int, Token]] = []
    found = Engine(model).generate(requests, lambda i, token: came.append((i, token)))
    assert found == alone(model, requests)
    assert [[token for i, token in came if i == row] for row in range(5)] == found
    with pytest.raises(FloatingPointError, match="NaN or infinite at token 1"):
        Engine(Broken(dtype=torch.float32, seed=3)).generate([([13], Sampling(max_tokens=1))])


def cached(engine: Engine, prompt: list[int], salt: bytes = b"") -> int:
    """How many tokens of a prompt are found when it is asked for now."""
    engine.add("x", prompt, Sampling(max_tokens=4), salt)
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    return sum(event.cached for event in events)


def test_prefix_hits_are_those_counted_by_hand(model: Model) -> None:
    engine = Engine(model, Options(page=8, max_requests=2))
    a, b = [1] * 30, [2] * 40
    assert cached(engine, a) == 0
    assert cached(engine, b) == 0
    assert cached(engine, a) == 24  # three pages of eight; the fourth is not full
    assert cached(engine, [*a[:24], 7, 7]) == 24
    assert cached(engine, [*a[:16], 7]) == 16
    assert cached(engine, a[:16]) == 8  # the last token is computed for its logits
    assert cached(engine, [7, *a]) == 0
    assert cached(engine, a, salt=b"another key") == 0
    assert cached(engine, a, salt=b"another key") == 24
    assert engine.scheduler.blocks.held == 0


def test_an_answer_is_found_again_as_a_prompt(model: Model) -> None:
    engine = Engine(model, Options(page=8))
    engine.add("a", [3] * 10, Sampling(max_tokens=20))
    answer = [token.id for token in run(engine)["a"]]
    # Of 30 tokens the last was never computed: three pages are full.
    assert cached(engine, [3] * 10 + answer + [4, 4, 4]) == 24


def test_abort_frees_at_once_and_may_be_repeated(model: Model) -> None:
    engine = Engine(model, Options(max_requests=2))
    for id in ("a", "b", "c"):
        engine.add(id, [1, 2, 3], Sampling(max_tokens=50))
    engine.step()
    assert engine.stats()["running"] == 2 and engine.scheduler.blocks.held == 2
    for id in ("a", "c", "a", "never"):
        engine.abort(id)
    assert engine.stats()["running"] == 1 and engine.scheduler.blocks.held == 1
    events = engine.step()
    assert [(e.id, e.finish) for e in events] == [("a", "abort"), ("c", "abort"), ("b", None)]
    engine.abort("b")
    assert engine.busy
    assert [(e.id, e.finish) for e in engine.step()] == [("b", "abort")]
    assert not engine.busy


def test_drafts_are_what_the_forward_pass_expects(either: Model) -> None:
    """Of the text that was made: each draft, whether it was right, and the steps it took."""
    prompt = [5, 9, 40, 2, 77, 31]
    engine = Engine(either, Options(speculate=1, step_tokens=4))
    engine.add("a", prompt, Sampling(max_tokens=40))
    request = engine.scheduler.waiting[0]
    drafts: dict[int, int] = {}
    told = []
    while engine.busy:
        told += engine.step()
        if request.drafts:
            (drafts[request.known],) = request.drafts
    text = [*prompt, *request.output]
    with torch.no_grad():
        ahead = either(torch.tensor([text])).mtp_logits[0][0].argmax(-1).tolist()
    # Score i of the module is that of token i + 2.
    assert drafts == {place: ahead[place - 2] for place in drafts}
    right = sum(text[place] == draft for place, draft in drafts.items())
    stats = engine.stats()
    assert (stats["drafts"], stats["accepted_drafts"]) == (len(drafts), right)
    assert sum(event.drafts for event in told) == len(drafts)
    assert sum(len(event.tokens) - 1 for event in told if event.drafts) == right
    # Two steps for the prompt, of which the second gives a token; a right draft saves one.
    assert stats["steps"] == 1 + 40 - right


class Broken(Model):
    """NaN for rows of token 13."""

    def decode(self, tokens: Tensor, position: Tensor, cache: Pages) -> Tensor:  # type: ignore[override]
        logits = super().decode(tokens, position, cache)
        return logits.masked_fill((tokens[0, cache.rows.scored] == 13).unsqueeze(-1), torch.nan)


class NoModule(Model):
    draft_offsets = ()


def test_nan_ends_the_request_that_has_it(model: Model) -> None:
    engine = Engine(Broken(dtype=torch.float32, seed=3))
    engine.add("good", [5, 6], Sampling(max_tokens=3))
    engine.add("bad", [5, 13], Sampling(max_tokens=3))
    ends = {}
    while engine.busy:
        ends |= {event.id: event for event in engine.step() if event.finish}
    assert ends["good"].finish == "length"
    assert ends["bad"].finish == "error"
    assert ends["bad"].message == "the logits are NaN or infinite at token 2"
    assert engine.scheduler.blocks.held == 0


def poison(model: Model) -> Model:
    """Token 13 is NaN from the embedding on."""
    with torch.no_grad():
        model.model.embed_tokens.weight[13] = torch.nan
    return model


@pytest.fixture(params=BOTH)
def poisoned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    if request.param == "compiled":
        return poison(compiled_model(tmp_path_factory))
    return poison(Model(dtype=torch.float32, seed=3))


def test_a_broken_request_harms_no_other(poisoned: Model) -> None:
    """Neither in the blocks that it leaves, nor in what it shared with others."""

    def ends(engine: Engine, prompt: list[int]) -> tuple[str | None, list[Token]]:
        engine.add("a", prompt, Sampling(max_tokens=4, logprobs=0))
        events: list[Event] = []
        while engine.busy:
            events += engine.step()
        return events[-1].finish, [token for event in events for token in event.tokens]

    engine = Engine(poisoned, Options(page=16, max_requests=1, max_model_len=64))
    good = ends(engine, [7] * 16 + [5])
    again = ends(engine, [9] * 20)
    assert good[0] == again[0] == "length"
    for bad in ([13] * 60, [7] * 16 + [13], [7] * 17 + [13] * 30, [9] * 16 + [13]):
        assert ends(engine, bad)[0] == "error"
        assert ends(engine, [7] * 16 + [5]) == good
        assert ends(engine, [9] * 20) == again
    # What was computed together with it, in one chunk, is not published.
    fresh = Engine(poisoned, Options(page=16, max_requests=1, max_model_len=64))
    assert ends(fresh, [7] * 16 + [13])[0] == "error"
    assert cached(fresh, [7] * 16 + [5]) == 0 and ends(fresh, [7] * 16 + [5]) == good


def test_a_broken_draft_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned = poison(Model(dtype=torch.float32, seed=3))
    requests = [([5, 6, 7], Sampling(max_tokens=8)), ([8, 9], Sampling(max_tokens=8))]
    expected = alone(poisoned, requests)

    def draft(_: Model, state: Tensor, tokens: Tensor, position: Tensor, cache: Pages) -> Tensor:
        scores = torch.zeros(len(cache.last(state)), VOCAB)
        scores[:, 13] = 1
        return scores

    monkeypatch.setattr(Model, "draft", draft)
    engine = Engine(poisoned, Options(speculate=1))
    assert engine.generate(requests) == expected
    assert engine.stats()["drafts"] > 0 and engine.stats()["accepted_drafts"] == 0


def test_drafting_ends_for_a_request_whose_drafts_are_wrong(model: Model) -> None:
    engine = Engine(model, Options(speculate=2, max_model_len=200))
    engine.add("a", [5, 9, 40], Sampling(max_tokens=150))
    engine.add("b", [5, 9, 40], Sampling(max_tokens=150, temperature=1.0))
    a, b = engine.scheduler.waiting
    run(engine)
    assert a.right < LUCK * a.tried and a.tried == TRIED
    assert b.right > LUCK * b.tried and b.tried > TRIED


def test_drafts_take_only_what_is_left_of_a_step(model: Model) -> None:
    """With two rows a step, drafts would take the rows of younger answers and prompts."""
    options = Options(max_requests=4, step_tokens=2, speculate=1)
    engine = Engine(model, options)
    for i in range(4):
        engine.add(str(i), [5, 6 + i], Sampling(max_tokens=20))
    first: dict[str, int] = {}
    for step in range(12):
        for event in engine.step():
            first.setdefault(event.id, step)
    assert len(first) >= 2


def test_end_tokens_do_not_end_before_the_least_number(model: Model) -> None:
    every = frozenset(range(VOCAB))
    engine = Engine(model)
    (answer,) = engine.generate([([5], Sampling(max_tokens=9, min_tokens=3, end_tokens=every))])
    assert len(answer) == 4


def test_no_tokens_at_all(model: Model) -> None:
    engine = Engine(model)
    engine.add("a", [1], Sampling(max_tokens=0))
    assert engine.busy and engine.step() == [Event("a", finish="length")] and not engine.busy


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        ([], 1, "the prompt is empty"),
        ([96], 1, "token ids must be from 0 to 95, got 96 to 96"),
        ([1] * 200, 57, "max_tokens can be 56 at most"),
        ([1] * 300, 1, "a prompt of 300 tokens leaves no room for an answer: .* has 256"),
        ([1] * 90, 90, "do not fit in the KV cache, which holds 128"),
    ],
)
def test_what_can_never_run_is_refused(
    model: Model, prompt: list[int], new: int, message: str
) -> None:
    engine = Engine(model)
    if "KV cache" in message:
        engine.pages.blocks = 3
        engine.scheduler.blocks = Blocks(3)
    with pytest.raises(ValueError, match=message):
        engine.add("a", prompt, Sampling(max_tokens=new))
    assert not engine.busy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: Engine(m, Options(max_model_len=257)), "exceeds max_position_embeddings"),
        (lambda m: Engine(m, Options(cache_bytes=5000)), r"holds 0 tokens.*give it 102400 bytes"),
        (lambda m: Engine(Model(device="meta")), "has no weights yet"),
        (lambda m: Options(page=0), "page must be 1 or more, got 0"),
        (lambda m: Options(speculate=5), "speculate must be from 0 to 4, got 5"),
        (lambda m: Engine(NoModule(), Options(speculate=1)), "no MTP module that could draft"),
    ],
)
def test_options_that_do_not_fit(
    model: Model, make: Callable[[Model], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(model)


@pytest.mark.parametrize("speculate", [0, 1])
def test_memory_is_what_was_asked_for(either: Model, speculate: int) -> None:
    options = Options(
        cache_bytes=200_000, max_model_len=64, max_requests=16, page=16, speculate=speculate
    )
    engine = Engine(either, options)
    engine.add("a", [1] * 30, Sampling(max_tokens=30))
    run(engine)
    assert 0 < 200_000 - engine.pages.bytes < engine.block_bytes
