"""Answers in a form: whatever is chosen within the masks is JSON of the schema."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.build import build
from dsl.load import load
from runtime.serve.grammar import MOST, GrammarError, Grammars, json_grammar
from runtime.serve.text import ByteVocabulary, LearnedVocabulary
from tests.support.places import TINY
from tests.support.tokenizers import byte_fallback, byte_level

ENGINE = ("engine", "grammar", "options", "request", "text")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 5}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}

KINDS = [
    (ByteVocabulary(), 300, frozenset({256})),
    (LearnedVocabulary(byte_level()), 400, frozenset({1})),
    (LearnedVocabulary(byte_fallback()), 320, frozenset({2})),
]


def write(
    grammars: Grammars, ends: frozenset[int], size: int, grammar: str, seed: int
) -> list[int]:
    """Ids up to an end token, each drawn from those that may come; ends as soon as it may."""
    matcher = grammars.matcher(grammar)
    draw = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while len(ids) < 2000:
        mask = matcher.mask()
        assert mask.shape == (size,) and mask.any()
        ended = [id for id in ends if mask[id]]
        choices = ended or mask.nonzero().flatten().tolist()
        id = choices[int(torch.randint(len(choices), (), generator=draw))]
        matcher.consume(id)
        if id in ends:
            return ids
        ids.append(id)
    raise AssertionError("it does not end")


NAMES = st.sampled_from(["a", "b", "ü", "long name"])
SCHEMAS = st.recursive(
    st.sampled_from([
        {"type": "integer", "minimum": 0, "maximum": 99}, {"type": "boolean"}, {"type": "null"},
        {"type": "string", "maxLength": 5}, {"enum": ["x", 1, None]}, {"const": "ö"},
    ]),
    lambda inner: st.one_of(
        st.builds(
            lambda properties: {
                "type": "object", "properties": properties, "required": list(properties),
                "additionalProperties": False,
            },
            st.dictionaries(NAMES, inner, min_size=1, max_size=3),
        ),
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 3}, inner),
        st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner),
    ),
    max_leaves=5,
)  # fmt: skip


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is of a schema, of the keywords above."""
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return any(value == one and type(value) is type(one) for one in
                   schema.get("enum", [schema.get("const")]))  # fmt: skip
    match schema["type"]:
        case "integer":
            return type(value) is int and 0 <= value <= 99
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "string":
            return isinstance(value, str) and len(value) <= 5
        case "array":
            items = isinstance(value, list) and len(value) <= 3
            return items and all(fits(one, schema["items"]) for one in value)
    properties = schema["properties"]
    return (
        isinstance(value, dict)
        and value.keys() == properties.keys()
        and all(fits(value[name], one) for name, one in properties.items())
    )


@pytest.mark.slow
@settings(max_examples=200)
@given(st.sampled_from(range(len(KINDS))), SCHEMAS, st.integers(0, 2**32))
def test_every_answer_is_of_its_schema(kind: int, schema: dict[str, Any], seed: int) -> None:
    vocabulary, size, ends = KINDS[kind]
    grammars = Grammars(vocabulary, size, ends)
    grammar = json_grammar(schema)
    ids = write(grammars, ends, size, grammar, seed)
    text = b"".join(vocabulary.piece(id) or b"" for id in ids).decode()
    assert fits(json.loads(text), schema), text


def test_what_a_schema_cannot_say_is_named() -> None:
    grammars = Grammars(*KINDS[1])
    for schema, message in (
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"type": "number of things"}, "number of things"),
        ({"$ref": "https://example.com/schema"}, "https://example.com/schema"),
    ):
        with pytest.raises(GrammarError, match=message):
            grammars.matcher(json_grammar(schema))
    with pytest.raises(GrammarError, match="more than"):
        json_grammar({"description": "x" * MOST})
    with pytest.raises(GrammarError, match="end token"):
        Grammars(ByteVocabulary(), 300, frozenset()).matcher(json_grammar(None))


def test_a_token_that_may_not_come_is_refused() -> None:
    matcher = Grammars(*KINDS[0]).matcher(json_grammar({"const": "ab"}))
    with pytest.raises(GrammarError, match="token 120 does not follow"):
        matcher.consume(ord("x"))


def test_without_a_schema_it_is_an_object() -> None:
    matcher = Grammars(*KINDS[0]).matcher(json_grammar(None))
    assert matcher.mask().nonzero().flatten().tolist() == [ord("{")]


@pytest.mark.slow
def test_answers_of_an_engine_are_of_their_schemas_with_and_without_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an untrained model, whose tokens are bytes; 256 ends an answer."""
    build(load(TINY, sets=["model=forming"]), tmp_path / "forming")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = importlib.import_module("forming").Model(seed=3)
    serve = {n: importlib.import_module(f"forming.runtime.serve.{n}") for n in ENGINE}
    grammars = serve["grammar"].Grammars(serve["text"].ByteVocabulary(), 512, frozenset({256}))
    schemas = [SCHEMA, {"enum": ["red", "green"]}, {"type": "boolean"}, {"const": [1, "a"]}] * 4
    asked = [
        serve["request"].Sampling(
            max_tokens=200, temperature=1.0, seed=i, end_tokens=frozenset({256}), min_tokens=3,
            grammar=json_grammar(schema),
        )
        for i, schema in enumerate(schemas)
    ]  # fmt: skip
    answers = []
    for speculate in (0, 2):
        options = serve["options"].Options(max_requests=8, speculate=speculate)
        engine = serve["engine"].Engine(model, options, grammars)
        found = engine.generate([([65, i + 1], one) for i, one in enumerate(asked)])
        answers.append([[token.id for token in answer] for answer in found])
    assert answers[0] == answers[1]
    for ids, schema in zip(answers[0], schemas, strict=True):
        assert ids[-1] == 256 and fits(json.loads(bytes(ids[:-1])), schema)
    # Modules whose scores are NaN draft nothing.
    with torch.no_grad():
        model.model.layers[3].hnorm.weight.fill_(math.nan)
    found = serve["engine"].Engine(model, options, grammars).generate([([65, 1], asked[0])])
    assert [token.id for token in found[0]] == answers[0][0]
    with pytest.raises(ValueError, match="propertyNames"):
        wrong = json_grammar({"type": "object", "propertyNames": {"pattern": "a"}})
        engine.add("x", [65], serve["request"].Sampling(max_tokens=9, grammar=wrong))
    with pytest.raises(ValueError, match="made without grammars"):
        serve["engine"].Engine(model).add("x", [65], asked[0])
