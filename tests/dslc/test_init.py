"""`dslc init`: a new spec builds, an old file survives, a refusal names its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsl.load import load
from dslc.commands.init import write_new
from tests.support.command import Run
from tests.support.places import ROOT

V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 256,
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_shared_experts": 1, "n_routed_experts": 8, "routed_scaling_factor": 2.5,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "qk_nope_head_dim": 16, "topk_method": "noaux_tc", "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "moe_layer_freq": 1, "first_k_dense_replace": 1,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "hidden_act": "silu",
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": None, "tie_word_embeddings": False, "attention_bias": False,
    "num_nextn_predict_layers": 1, "initializer_range": 0.02,
    "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.slow
def test_a_new_spec_is_right_and_named(dslc: Run) -> None:
    outcome = dslc("init", "my_model")
    assert (outcome.status, outcome.err) == (0, "")
    assert "dslc check my_model.yaml" in outcome.out
    assert dslc("check", "my_model.yaml").status == 0
    assert load("my_model.yaml").spec.model == "my_model"


@pytest.mark.slow
def test_a_new_spec_is_trained_as_its_help_says(dslc: Run) -> None:
    outcome = dslc("init", "my_model")
    told = "or: dslc train my_model.yaml --data FILE --out runs/my_model"
    assert told in outcome.out
    Path("text.txt").write_bytes((ROOT / "data/tinyshakespeare.txt").read_bytes()[:6000])
    words = told.removeprefix("or: dslc ").replace("FILE", "text.txt").split()
    # As it is, but for its length: one step of one sequence.
    outcome = dslc(*words, "--set", "train.tokens=256", "--set", "train.batch=1")
    assert outcome.status == 0, outcome.err
    assert "step 1" in outcome.err


def test_the_name_follows_the_file(dslc: Run) -> None:
    assert dslc("init", "-o", "other.yaml").status == 0
    assert load("other.yaml").spec.model == "other"


def test_nothing_is_overwritten(dslc: Run) -> None:
    Path("mine.yaml").write_text("precious", encoding="utf-8")
    outcome = dslc("init", "mine")
    assert outcome.status == 1 and "mine.yaml exists" in outcome.err
    assert Path("mine.yaml").read_text(encoding="utf-8") == "precious"


@pytest.mark.slow
def test_a_name_that_python_cannot_import_is_refused(dslc: Run) -> None:
    for name in ("my-model", "torch", "class", 'a"\nblocks: [x'):
        outcome = dslc("init", name, "-o", "x.yaml")
        assert outcome.status == 1 and "cannot name a model" in outcome.err
    assert not Path("x.yaml").exists()


def test_without_name_and_file_it_is_wrong_usage(dslc: Run) -> None:
    assert dslc("init").status == 2


@pytest.mark.slow
def test_from_a_config_or_its_folder(dslc: Run) -> None:
    Path("hf").mkdir()
    Path("hf/config.json").write_text(json.dumps(V3), encoding="utf-8")
    for source, target in (("hf", "a.yaml"), ("hf/config.json", "b.yaml")):
        assert dslc("init", "--from-hf", source, "-o", target).status == 0
        assert dslc("check", target).status == 0
    assert load("a.yaml").params["q_lora_rank"].value == 24


def test_what_a_spec_cannot_say_is_named_and_refused(dslc: Run) -> None:
    config = json.dumps(V3 | {"mlp_bias": True, "hidden_act": "gelu"}, indent=1)
    Path("config.json").write_text(config, encoding="utf-8")
    outcome = dslc("init", "--from-hf", "config.json", "-o", "a.yaml")
    assert outcome.status == 1 and not Path("a.yaml").exists()
    assert "mlp_bias" in outcome.err and "hidden_act" in outcome.err
    assert "config.json:" in outcome.err


def test_a_missing_config_is_named(dslc: Run) -> None:
    outcome = dslc("init", "--from-hf", str(ROOT / "specs"), "-o", "a.yaml")
    assert outcome.status == 1 and "config.json" in outcome.err


def test_a_spec_that_cannot_be_written_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str, **settings: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_new(tmp_path / "new.yaml", "model: new\n")
    assert not list(tmp_path.iterdir())
