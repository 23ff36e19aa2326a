"""Configs of the DeepSeek V2/V3 family become specs, exactly, or are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsl.diagnostic import Diagnostic, DiagnosticError, render
from dsl.hf import hf_config, read_config, spec_from_hf
from dsl.hf.keys import GENERATION
from dsl.load import Description, load
from dsl.schema import MTP, LayerGroup
from dsl.source import Source
from tests.support.golden import Golden
from tests.support.published import KIMI_K2, MOONLIGHT, PUBLISHED, V2, V3, YARN


def convert(config: dict[str, Any], name: str = "converted") -> str:
    source = Source("config.json", json.dumps(config, indent=2))
    return spec_from_hf(read_config(source), source, name)


def problems(config: dict[str, Any]) -> list[Diagnostic]:
    with pytest.raises(DiagnosticError) as caught:
        convert(config)
    return caught.value.diagnostics


def described(text: str, folder: Path) -> Description:
    path = folder / "spec.yaml"
    path.write_text(text)
    return load(path)


def values(description: Description) -> dict[str, Any]:
    return {name: value.value for name, value in description.params.items()}


def uses(group: LayerGroup | MTP) -> list[str]:
    return [str(getattr(group, "repeat", 1)), str(group.block), *map(str, group.slots.values())]


def test_v3_becomes_the_spec_that_people_would_write(golden: Golden) -> None:
    golden("hf/deepseek_v3.yaml", convert(V3, "deepseek_v3"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_spec_says_the_numbers_of_the_config(name: str, tmp_path: Path) -> None:
    config = PUBLISHED[name]
    description = described(convert(config), tmp_path)
    params = values(description)
    for key in params.keys() & config.keys() - {"q_lora_rank"}:
        assert params[key] == config[key], key
    assert params["q_lora_rank"] == (config["q_lora_rank"] or 0)
    yarn = config["rope_scaling"] or {}
    for key in yarn.keys() - {"type"}:
        assert params[f"yarn_{key}"] == yarn[key], key
    layers = description.spec.architecture.layers
    assert sum(group.repeat for group in layers) == config["num_hidden_layers"]
    depth = config.get("num_nextn_predict_layers", 0)
    assert description.spec.architecture.mtp.depth == depth
    assert description.spec.train.loss.balance_alpha == config.get("aux_loss_alpha", 0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_written_from_a_spec_gives_the_spec_again(name: str, tmp_path: Path) -> None:
    first = described(convert(PUBLISHED[name]), tmp_path)
    written = hf_config(first)
    second = described(convert(written), tmp_path)
    assert hf_config(second) == written
    assert values(second) == values(first)
    for section in ("blocks", "sequence", "precision", "train"):
        assert getattr(second.spec, section) == getattr(first.spec, section)
    one, other = (d.spec.architecture for d in (first, second))
    assert [uses(g) for g in (*one.layers, one.mtp)] == [
        uses(g) for g in (*other.layers, other.mtp)
    ]
    assert one.mtp.depth == other.mtp.depth


def test_both_spellings_of_rope_mean_the_same() -> None:
    yarn = {k: v for k, v in YARN.items() if k != "type"}
    new = {k: v for k, v in V3.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {**yarn, "rope_type": "yarn", "rope_theta": 10000}
    assert convert(new) == convert(V3)
    plain = {k: v for k, v in MOONLIGHT.items() if k not in ("rope_scaling", "rope_theta")}
    plain["rope_parameters"] = {"rope_type": "default", "rope_theta": 50000.0}
    assert convert(plain) == convert(MOONLIGHT)


def test_keys_that_change_nothing_change_nothing() -> None:
    extra = {"pretraining_tp": 1, "output_router_logits": False, "_name_or_path": "x/y"}
    assert convert({**V3, **extra, "use_cache": False}) == convert(V3)


def test_what_transformers_writes_into_a_nested_config_changes_nothing() -> None:
    others = {"pruned_heads": {}, "tie_encoder_decoder": False, "prefix": None}
    absent = dict.fromkeys(GENERATION, None)
    assert convert({**V3, **GENERATION, **others}) == convert({**V3, **absent}) == convert(V3)


def test_settings_of_generation_are_told_and_change_nothing_else(tmp_path: Path) -> None:
    changed = {"temperature": 0.6, "do_sample": True, "suppress_tokens": ["\u2028params: 1"]}
    text = convert({**V3, **changed})
    plain, comment = text.removesuffix("\n").rsplit("\n\n", 1)
    assert f"{plain}\n" == convert(V3)
    assert all(line.startswith("# ") for line in comment.splitlines())
    assert comment.replace("\n# ", " ").endswith("do_sample True, suppress_tokens, temperature 0.6")
    described(text, tmp_path)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_float16_becomes_bfloat16_and_the_spec_says_so(key: str, tmp_path: Path) -> None:
    config = {k: v for k, v in V3.items() if k != "torch_dtype"}
    text = convert({**config, key: "float16"})
    assert "# float16 in the config.json" in text
    assert described(text, tmp_path).spec.precision.policy == "bf16"
    assert "float16 in" not in convert({**config, key: "bfloat16"})


@pytest.mark.parametrize(
    ("written", "meant"), [([5, 3, 5], (5, 3)), ([7], (7,)), (7, 7), (None, None)]
)
def test_all_tokens_that_end_a_text_are_kept(written: Any, meant: Any, tmp_path: Path) -> None:
    description = described(convert({**V3, "eos_token_id": written}), tmp_path)
    assert description.spec.sequence.eos_token_id == meant
    assert hf_config(description)["eos_token_id"] == ([*meant] if written == [5, 3, 5] else written)


@pytest.mark.parametrize("bad", [[], [True], ["2"], [1.5], [[1]], [1e400], {"a": 1}, -1])
def test_tokens_that_are_none_are_refused(bad: Any) -> None:
    text = json.dumps({**V3, "eos_token_id": bad}).replace("Infinity", "1e400")
    with pytest.raises(DiagnosticError) as caught:
        spec_from_hf(read_config(Source("config.json", text)), Source("config.json", text), "m")
    (problem,) = caught.value.diagnostics
    assert "`eos_token_id` must be" in problem.message


@pytest.mark.parametrize(
    "where", [{"quantization_config": {**V3["quantization_config"], "scale_fmt": "ue8m0"}},
              {"quantization_config": None, "scale_fmt": "ue8m0"}],
)  # fmt: skip
def test_scales_that_are_powers_of_two_stay_so(where: dict[str, Any], tmp_path: Path) -> None:
    description = described(convert({**V3, **where}), tmp_path)
    assert description.spec.precision.scale_format == "ue8m0"
    written = hf_config(description)
    assert written["scale_fmt"] == "ue8m0"
    assert "scale_format: ue8m0" in convert(written)
    assert "scale_fmt" not in hf_config(described(convert(V3), tmp_path))


@pytest.mark.parametrize("outer", ["kimi_k25", "llava", None])
def test_the_language_model_of_a_larger_one(outer: str | None, tmp_path: Path) -> None:
    """Keys of the whole count where the part does not give them."""
    part = {k: v for k, v in KIMI_K2.items() if k not in ("torch_dtype", "eos_token_id")}
    whole = {"model_type": outer, "architectures": ["AnyForConditionalGeneration"],
             "torch_dtype": "float32", "eos_token_id": 7, "bos_token_id": 8, "vision_config": {},
             "hidden_size": 1}  # fmt: skip
    text = convert({**whole, "text_config": part})
    assert "from the `text_config` of a config.json, kimi_k2" in text
    alone = convert({**KIMI_K2, "torch_dtype": "float32", "eos_token_id": 7})
    assert text.partition("blocks:")[2] == alone.partition("blocks:")[2]
    assert described(text, tmp_path).spec.precision.policy == "fp32"


def test_what_the_language_model_cannot_be_is_told_in_its_part() -> None:
    whole = {"model_type": "llava", "text_config": {**KIMI_K2, "hidden_act": "gelu"}}
    (problem,) = problems(whole)
    assert problem.span is not None and problem.span.text == '"hidden_act"'
    part = {k: v for k, v in KIMI_K2.items() if k != "kv_lora_rank"}
    (problem,) = problems({"model_type": "llava", "text_config": part})
    assert problem.message == "`text_config` does not give `kv_lora_rank`"
    for other in ({"model_type": "llama"}, {"model_type": []}, {}, [], None):
        (problem,) = problems({"model_type": "llava", "text_config": other})
        assert problem.message == '"llava" is no model of the DeepSeek V2/V3 family'
    # A model of the family that has other parts, too, is not read as their sum.
    assert any("`text_config`" in p.message for p in problems({**V3, "text_config": KIMI_K2}))


REFUSED: dict[str, Any] = {
    "attention_bias": "yes",
    "attention_dropout": 0.1,
    "hidden_act": "gelu",
    "moe_layer_freq": 2,
    "rope_interleave": False,
    "partial_rotary_factor": 0.5,
    "mlp_bias": True,
    "num_key_value_heads": 8,
    "head_dim": 96,
    "qk_head_dim": 100,
    "q_lora_rank": 0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "eos_token_id": [1, -2],
    "torch_dtype": "float8_e4m3fn",
    "pruned_heads": {"1": [0]},
    "scale_fmt": "e4m3",
    "index_topk": 2048,
    "vision_config": {},
    "sliding_window": None,
    "no_such_key": 1,
    "vocab_size": "129280",
    "hidden_size": 0,
    "rms_norm_eps": -1,
    "num_hidden_layers": True,
    "n_routed_experts": 1e400,
    "norm_topk_prob": "yes",
    "rope_theta": [],
    "mlp_layer_types": ["dense"] * 3 + ["sparse", "dense"] * 29,
    "architectures": ["DeepseekV3ForSequenceClassification"],
    "model_type": "kimi_linear",
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_a_spec_cannot_say_is_refused_at_its_place(key: str) -> None:
    text = json.dumps({**V3, key: REFUSED[key]}, indent=2).replace("Infinity", "1e400")
    source = Source("config.json", text)
    with pytest.raises(DiagnosticError) as caught:
        spec_from_hf(read_config(source), source, "m")
    places = [d.span.text for d in caught.value.diagnostics if d.span]
    assert places == [f'"{key}"']


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("rope_scaling", "type", "linear"),
        ("rope_scaling", "factor", 0.5),
        ("rope_scaling", "truncate", False),
        ("rope_scaling", "attention_factor", 2.0),
        ("rope_scaling", "long_factor", [1.0]),
        ("rope_scaling", "original_max_position_embeddings", None),
        ("quantization_config", "quant_method", "awq"),
        ("quantization_config", "weight_block_size", [64, 64]),
        ("quantization_config", "scale_fmt", "fp32"),
    ],
)
def test_nested_keys_are_refused_too(section: str, key: str, value: Any) -> None:
    (problem,) = problems({**V3, section: {**V3[section], key: value}})
    assert problem.span is not None
    assert problem.span.text in (f'"{key}"', f'"{section}"')
    assert key in problem.message


def test_mscales_on_whose_use_the_sources_disagree_are_refused() -> None:
    for changes in ({"mscale": None}, {"mscale_all_dim": None, "mscale": 0.7}, {"mscale": 0}):
        (problem,) = problems({**V3, "rope_scaling": {**YARN, **changes}})
        assert "transformers scales the rotary table by" in problem.message
    without = {k: v for k, v in YARN.items() if "mscale" not in k}
    assert "yarn_mscale: 1.0\n  yarn_mscale_all_dim: 0.0" in convert(
        {**V3, "rope_scaling": without}
    )


def test_all_problems_are_named_at_once() -> None:
    config = {**V3, "hidden_act": "gelu", "index_topk": 1, "n_group": None, "vocab_size": "x"}
    found = problems(config)
    assert len(found) == 4
    for name in ("hidden_act", "index_topk", "n_group", "vocab_size"):
        assert any(f"`{name}" in problem.message for problem in found)


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "kv_lora_rank", "n_routed_experts", "first_k_dense_replace", "n_group"],
)
def test_a_missing_key_is_named(key: str) -> None:
    (problem,) = problems({k: v for k, v in V3.items() if k != key})
    assert problem.message == f"the config does not give `{key}`"


def test_another_model_is_refused_without_further_complaints() -> None:
    (problem,) = problems({"model_type": "llama", "hidden_act": "gelu"})
    assert problem.message == '"llama" is no model of the DeepSeek V2/V3 family'
    (problem,) = problems({})
    assert problem.message == "null is no model of the DeepSeek V2/V3 family"


def test_v2_divides_by_no_sum_and_has_no_mtp() -> None:
    (problem,) = problems({**V2, "norm_topk_prob": True})
    assert problem.message == "`norm_topk_prob: true` cannot be expressed"
    (problem,) = problems({**V2, "num_nextn_predict_layers": 1})
    assert problem.message == "DeepSeek-V2 has no MTP modules"


def test_a_name_that_is_no_identifier_is_refused() -> None:
    with pytest.raises(DiagnosticError, match="`my-model` cannot name a model"):
        convert(V3, "my-model")


@pytest.mark.parametrize(
    ("text", "message", "place"),
    [
        ('{"a": 1,\n "b" 2}', "not valid JSON: Expecting ':' delimiter", (2, 6)),
        ("", "not valid JSON: Expecting value", (1, 1)),
        ("[1]", "a config is a JSON object", (1, 1)),
        ('{"a": 1,\n "a": 2}', "the key `a` is given twice", (2, 2)),
        ('{"a": NaN}', "not valid JSON: NaN is not a number of JSON", (1, 1)),
    ],
)
def test_json_that_is_wrong(text: str, message: str, place: tuple[int, int]) -> None:
    with pytest.raises(DiagnosticError) as caught:
        read_config(Source("config.json", text))
    (problem,) = caught.value.diagnostics
    assert problem.message == message
    assert problem.span is not None
    assert (problem.span.line, problem.span.column) == place


def test_hostile_json_gives_diagnostics() -> None:
    for text in ("[" * 100_000, '{"a": ' * 100_000, "9" * 10_000, '{"a": ' + "9" * 10_000 + "}"):
        with pytest.raises(DiagnosticError):
            read_config(Source("config.json", text))


SPEC = """
model: other
blocks: {blocks}
params:
  vocab_size: 64
  hidden_size: 32
  intermediate_size: 48
  num_attention_heads: 4
  num_key_value_heads: 2
  head_dim: 8
architecture:
  layers: [{{repeat: 2, attention: {attention}, feed_forward: SwiGLU}}]
sequence: {{max_position_embeddings: 64}}
"""


def test_a_model_of_another_kind_gets_a_config_of_its_own(tmp_path: Path) -> None:
    text = SPEC.format(blocks="[causal_lm, decoder, gqa, swiglu]", attention="GQA")
    config = hf_config(described(text, tmp_path))
    assert config["model_type"] == "dslc"
    assert config["params"]["num_key_value_heads"] == 2
    assert config["architecture"]["layers"] == [
        {"block": "DecoderLayer", "attention": "GQA", "feed_forward": "SwiGLU", "repeat": 2}
    ]
    assert json.loads(json.dumps(config)) == config


def test_a_users_block_of_a_known_name_is_not_taken_for_it(tmp_path: Path) -> None:
    described(convert(V3), tmp_path)  # the shipped block is
    own = Path("specs/blocks/mla.dsl").read_text()
    (tmp_path / "mine.dsl").write_text(own)
    text = convert(V3).replace(" mla,", " ./mine.dsl,")
    assert hf_config(described(text, tmp_path))["model_type"] == "dslc"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "attention: MLA, feed_forward: SwiGLU",
            "attention: 'MLA(v_head_dim=64)', feed_forward: SwiGLU",
        ),
        ('mtp_hidden_state: "after_norm"', 'mtp_hidden_state: "before_norm"'),
        ("  # attention", "  latent_norm_eps: 1e-5"),
        ("  # attention", "  window: 512"),
    ],
)
def test_what_a_config_has_no_room_for_makes_another_model(
    old: str, new: str, tmp_path: Path
) -> None:
    text = convert({**V3, "num_nextn_predict_layers": 2})
    assert old in text
    assert hf_config(described(text.replace(old, new), tmp_path))["model_type"] == "dslc"


def test_arguments_of_blocks_are_the_values(tmp_path: Path) -> None:
    text = convert(V3).replace("SwiGLU}", "SwiGLU(intermediate_size=2 * hidden_size)}")
    assert hf_config(described(text, tmp_path))["intermediate_size"] == 2 * 7168


@pytest.mark.parametrize(
    ("mscale", "all_dim"), [(1.0, 0.707), (0.5, 0.0), (0.0, 1.0), (0.0, 0.0), (1.0, 0.0)]
)
def test_every_pair_of_mscales_survives(mscale: float, all_dim: float, tmp_path: Path) -> None:
    text = convert(V3).replace("yarn_mscale: 1.0", f"yarn_mscale: {mscale}")
    text = text.replace("yarn_mscale_all_dim: 1.0", f"yarn_mscale_all_dim: {all_dim}")
    again = convert(hf_config(described(text, tmp_path)))
    params = values(described(again, tmp_path))
    assert (params["yarn_mscale"], params["yarn_mscale_all_dim"]) == (mscale, all_dim)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=60)
@given(st.dictionaries(st.sampled_from(sorted(V3)), JSON, max_size=4))
def test_a_changed_config_becomes_a_spec_that_loads_or_a_diagnostic(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    try:
        text = convert({**V3, **changes})
    except DiagnosticError as error:
        assert render(error.diagnostics)
        return
    folder = tmp_path_factory.mktemp("spec")
    config = hf_config(described(text, folder))
    assert hf_config(described(convert(config), folder)) == config


@given(st.dictionaries(st.text(max_size=9), JSON, max_size=4))
def test_any_object_is_answered(config: dict[str, Any]) -> None:
    with pytest.raises(DiagnosticError):
        convert(config)
