"""The program `draft`: one MTP module, from states and the tokens after them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.build import build
from compiler.passes.draft import modules
from compiler.pipeline import compile
from dsl.load import load
from tests.support.places import SPECS, TINY


def test_its_arguments_are_states_and_the_tokens_after_them() -> None:
    main = compile(load(TINY)).programs["draft"].main
    words = [f"{value.name}: {value.type.words}" for value in main.args]
    assert words == [
        "state: [batch, seq, hidden_size (64)]",
        "tokens: [batch, seq]",
        "position: [batch, seq]",
    ]
    assert main.result_names == ("logits",)
    # Of two modules, the first.
    (called,) = [op for op in main.ops if op.kind == "call"]
    assert called.attrs["scope"] == "model.layers.3"


@pytest.mark.parametrize(
    ("spec", "sets"),
    [
        ("deepseek_v2_lite", []),
        ("deepseek_v3_tiny", ["architecture.mtp.depth=0"]),
        # Its module reads other states than the head does.
        ("deepseek_v3_tiny", ['params.mtp_hidden_state="before_norm"']),
    ],
)
def test_there_is_none_without_a_module_that_reads_what_the_head_reads(
    spec: str, sets: list[str]
) -> None:
    assert "draft" not in compile(load(SPECS / f"{spec}.yaml", sets=sets)).programs


@pytest.mark.slow
@pytest.mark.parametrize(("masked", "kind"), [(False, "drop_first"), (True, "drop_last")])
def test_positions_are_those_of_training(masked: bool, kind: str) -> None:
    description = load(TINY, sets=[f"train.document_mask={str(masked).lower()}"])
    found = modules(compile(description).lowered)
    assert [module.position.kind for module in found] == [kind] * 2


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_drafts_are_the_scores_of_the_forward_pass(
    masked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed in two parts, of two sequences at once, from a paged cache."""
    name = f"drafting_{masked}".lower()
    sets = [f"train.document_mask={str(masked).lower()}", f"model={name}"]
    build(load(TINY, sets=sets), tmp_path / name)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = importlib.import_module(name).Model(seed=3)
    paged = importlib.import_module(f"{name}.runtime.pages")
    tokens = torch.randint(512, (2, 12), generator=torch.manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).mtp_logits[0]
        pages, blocks = paged.Pages(8, 4), [[1, 5, 2], [7, 3, 4]]
        for first, count in ((0, 7), (7, 4)):
            sequences = [(b, first, count) for b in blocks]
            last = [count - 1, 2 * count - 1]
            rows, position = paged.make_rows(sequences, last, 4)
            pages.begin(rows)
            now, after = tokens[:, first : first + count], tokens[:, first + 1 : first + 1 + count]
            model.decode(now.reshape(1, -1), position, pages)
            state, place = pages.states, position + model.draft_offsets[0]
            scores = model.draft(state, after.reshape(1, -1), place, pages)
            assert torch.allclose(scores, expected[:, first + count - 1], atol=1e-5)
    # Two modules in a row, inside the engine.
    serve = importlib.import_module(f"{name}.runtime.serve.engine")
    check_drafts_of(model, serve)


def check_drafts_of(model: Any, serve: Any) -> None:
    """Each draft is what `forward` says of the text that came out, where the ones before are right;
    and each right one saves a step."""
    engine = serve.Engine(model, serve.Options(speculate=2, page=8, step_tokens=5))
    sampling = serve.Sampling(max_tokens=60, temperature=1.0, seed=4)
    engine.add("a", list(range(100, 107)), sampling)
    request = engine.scheduler.waiting[0]
    drafts: dict[int, list[int]] = {}
    while engine.busy:
        engine.step()
        if request.drafts:
            drafts[request.known] = request.drafts
    text = [*request.prompt, *request.output]
    with torch.no_grad():
        scores = model(torch.tensor([text])).mtp_logits

    def expected(depth: int, place: int) -> int:
        """Score i of module k, from 0, is that of token i + k + 2."""
        ahead = request.output[: place - len(request.prompt)]
        row = scores[depth][0, place - depth - 2]
        return int(serve.choose(row, sampling, request.prompt, ahead))

    right = [0, 0]
    for known, (first, *second) in drafts.items():
        assert first == expected(0, known)
        if second and first == text[known]:
            right[0] += 1
            assert second == [expected(1, known + 1)]
            right[1] += second == [text[known + 1]]
        elif not second:
            right[0] += first == text[known]
    stats = engine.stats()
    assert [stats["accepted_drafts_1"], stats["accepted_drafts_2"]] == right
    assert right[1] > 10
    # The prompt takes two steps, of which the second gives a token.
    assert stats["steps"] == 1 + 60 - sum(right)
