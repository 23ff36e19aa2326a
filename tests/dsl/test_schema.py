"""What a spec may say. Rendered messages are in test_diagnostic."""

from __future__ import annotations

import keyword
import re

import pytest

from dsl.diagnostic import Diagnostic
from dsl.evaluate import Value
from dsl.schema import BlockUse, Spec, json_schema, validate
from dsl.source import Source
from dsl.yaml import Mapping, parse_yaml
from runtime import config

VALID = """\
model: tiny
blocks: [mla]
architecture:
  layers:
    - {repeat: 2, attention: MLA, feed_forward: 'SwiGLU(intermediate_size=4 * width, act="silu")'}
sequence: {max_position_embeddings: 4K}
"""


def check(text: str) -> tuple[Spec | None, list[Diagnostic]]:
    root = parse_yaml(Source("a.yaml", text))
    assert isinstance(root, Mapping)
    place = Source("", "").span(0, 0)
    return validate(root, {"width": Value(8, place), "half": Value(0.5, place)})


def valid(text: str) -> Spec:
    spec, problems = check(text)
    assert not problems
    assert spec is not None
    return spec


def codes(text: str) -> list[str]:
    spec, problems = check(text)
    assert spec is None
    return [d.code for d in problems]


def test_defaults() -> None:
    spec = valid(VALID)
    assert (spec.about, spec.params, spec.precision.policy) == ("", {}, "bf16")
    assert spec.architecture.block == BlockUse("CausalLM")
    assert spec.architecture.layers[0].block == BlockUse("DecoderLayer")
    assert spec.architecture.mtp.block == BlockUse("MTP")
    assert (spec.architecture.mtp.depth, dict(spec.architecture.mtp.slots)) == (0, {})
    assert (spec.sequence.bos_token_id, spec.sequence.eos_token_id) == (None, None)
    assert spec.train.initializer_range == 0.02
    assert spec.train.loss.mtp_weight.value_at(0) == 0.3
    assert spec.train.loss.balance_alpha == 0


@pytest.mark.parametrize(
    ("written", "meant"), [("7", 7), ("[7]", (7,)), ("[2, width - 1]", (2, 7))]
)
def test_one_token_or_several_end_a_text(written: str, meant: object) -> None:
    spec = valid(VALID.replace("4K}", f"4K, eos_token_id: {written}}}"))
    assert spec.sequence.eos_token_id == meant


@pytest.mark.parametrize(
    ("written", "code"),
    [("[]", "E303"), ("[[1]]", "E302"), ("[-1]", "E303"), ("{a: 1}", "E302"), ("[1.5]", "E302")],
)
def test_lists_of_tokens_that_are_wrong(written: str, code: str) -> None:
    assert codes(VALID.replace("4K}", f"4K, eos_token_id: {written}}}")) == [code]


def test_numbers_are_expressions_and_slots_are_blocks() -> None:
    spec = valid(VALID)
    assert spec.sequence.max_position_embeddings == 4000
    [group] = spec.architecture.layers
    assert group.repeat == 2
    assert list(group.slots) == ["attention", "feed_forward"]
    use = group.slots["feed_forward"]
    assert str(use) == 'SwiGLU(intermediate_size=32, act="silu")'
    value = use.arguments["intermediate_size"]
    assert (value.value, value.span.text) == (32, "4 * width")
    assert use.span is not None and use.span.text.startswith("SwiGLU(")


def test_a_spec_is_frozen() -> None:
    spec = valid(VALID)
    with pytest.raises(ValueError, match="frozen"):
        spec.model = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.5", {0: 0.5, 10**15: 0.5}),
        ("half / 2", {0: 0.25}),
        ("[{value: 2}]", {0: 2.0}),
        (
            "[{until: 10T, value: 0.3}, {until: 12T, value: 0.2}, {value: 0.1}]",
            {0: 0.3, 10**13 - 1: 0.3, 10**13: 0.2, 12 * 10**12: 0.1, 10**15: 0.1},
        ),
    ],
)
def test_schedules(text: str, values: dict[int, float]) -> None:
    schedule = valid(f"{VALID}train: {{loss: {{mtp_weight: {text}}}}}").train.loss.mtp_weight
    assert {tokens: schedule.value_at(tokens) for tokens in values} == values


@pytest.mark.parametrize(
    "text", ["[]", "[{until: 1, value: 1}]", "[{value: 1}, {value: 2}]",
             "[{until: 2, value: 1}, {until: 1, value: 1}, {value: 2}]",
             "[{until_step: 2, value: 1}, {until_step: 1, value: 1}, {value: 2}]",
             "[{until: 2, until_step: 2, value: 1}, {value: 2}]",
             "[{until: 2, shape: cosine, value: 1}, {value: 2}]",
             "[{until: 2, value: 1}, {start: 1, value: 2}]",
             "[{until_step: 2, value: 1}, {until: 9, start: 1, value: 2}, {value: 2}]"],
)  # fmt: skip
def test_schedules_that_make_no_sense(text: str) -> None:
    assert codes(f"{VALID}train: {{learning_rate: {text}}}") == ["E308"]


def test_schedules_of_the_model_go_by_tokens() -> None:
    phases = "[{until_step: 2, value: 1}, {value: 2}]"
    assert codes(f"{VALID}train: {{loss: {{mtp_weight: {phases}}}}}") == ["E308"]


def test_a_schedule_means_the_same_in_a_build() -> None:
    phases = """[{until_step: 4, start: 0, value: 4}, {until: 100, value: 4},
                 {until: 200, start: 4, value: 2, shape: cosine}, {value: 1}]"""
    schedule = valid(f"{VALID}train: {{learning_rate: {phases}}}").train.learning_rate
    assert schedule is not None
    built = config.Schedule(tuple(config.Phase(**phase.model_dump()) for phase in schedule.root))
    for tokens in range(0, 250, 7):
        for steps in (0, 1, 3, 4, 9):
            assert schedule.value_at(tokens, steps) == built.value_at(tokens, steps)


@pytest.mark.parametrize("name", ["v3", "deepseek_v3", "V3", "a" * 64])
def test_model_names(name: str) -> None:
    assert valid(VALID.replace("tiny", name)).model == name


@pytest.mark.parametrize(
    "name", ["3v", "a-b", "a b", "größe", "_x", "class", "block", "torch", "Triton", "json",
             "runtime", "dslc", "a" * 65, "../x", "x;import os", '"a\\nb"'],
)  # fmt: skip
def test_names_that_are_no_package_names(name: str) -> None:
    spec, [problem] = check(VALID.replace("tiny", name))
    assert spec is None
    assert problem.code == "E304"
    example = re.fullmatch("for example `(.*)`", problem.help)
    assert example is not None
    assert valid(VALID.replace("tiny", example[1])).model == example[1]


def test_parameters_are_not_named_by_words_of_the_languages() -> None:
    for name in [*keyword.kwlist, "true", "params", "slots", "min", "ä", "a.b", "__class__"]:
        assert codes(f"{VALID}params: {{{name}: 1}}") == ["E304"], name


def test_numbers_with_a_point_do_not_count() -> None:
    assert codes(VALID.replace("repeat: 2", "repeat: 2.0")) == ["E302"]
    assert codes(VALID.replace("repeat: 2", "repeat: half")) == ["E302"]
    assert codes(VALID.replace("repeat: 2", "repeat: width / 2")) == ["E302"]
    assert (
        valid(VALID.replace("repeat: 2", "repeat: width // 2")).architecture.layers[0].repeat == 4
    )


def test_expressions_over_failed_parameters_are_passed_over() -> None:
    spec, problems = check(
        f"{VALID.replace('repeat: 2', 'repeat: 2 * broken')}params: {{broken: 1 // 0}}"
    )
    assert (spec, problems) == (None, [])


def test_a_misspelt_required_key_is_one_mistake() -> None:
    _, [problem] = check(VALID.replace("sequence:", "sequences:"))
    assert (problem.code, problem.help) == ("E300", "did you mean `sequence`?")


def test_json_schema_describes_every_key() -> None:
    schema = json_schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert {*Spec.model_fields, "extends", "set", "variants"} == set(schema["properties"])
    assert schema["then"]["required"] == ["model", "blocks", "architecture", "sequence"]
    for name, section in {"Spec": schema, **schema["$defs"]}.items():
        if section.get("type") == "object":
            assert section["additionalProperties"] is not True, name
            for key, about in section["properties"].items():
                assert about.get("description"), (name, key)
    repeat = schema["$defs"]["LayerGroup"]["properties"]["repeat"]
    assert repeat["anyOf"][0] == {"type": "integer", "minimum": 1}
    slots = schema["$defs"]["LayerGroup"]["additionalProperties"]
    assert re.match(slots["pattern"], "SwiGLU(intermediate_size=18432)")
    assert re.match(slots["pattern"], "MLA") and not re.match(slots["pattern"], "3")
