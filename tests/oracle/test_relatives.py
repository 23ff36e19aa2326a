"""Shipped specs of relatives: sizes as published, and at small size what transformers computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from backends.build import build
from compiler.analysis import summary
from compiler.lower import lower
from compiler.pipeline import PIPELINES, after
from dsl.hf import hf_config
from dsl.load import load
from dsl.units import format_count
from tests.support.oracle import GRADIENTS, LOGITS, import_package, relative_rms
from tests.support.places import SPECS

SMALL = (
    "params.vocab_size=96", "params.hidden_size=32", "params.num_attention_heads=4",
    "params.n_routed_experts=8", "params.num_experts_per_tok=3", "params.moe_intermediate_size=24",
    "architecture.layers.1.repeat=2", "sequence.max_position_embeddings=256",
    "sequence.bos_token_id=null", "sequence.eos_token_id=null", "precision.policy=fp32",
)  # fmt: skip
LATENT = (
    "params.kv_lora_rank=16", "params.qk_nope_head_dim=12", "params.qk_rope_head_dim=8",
    "params.v_head_dim=10", "architecture.layers.0.feed_forward=SwiGLU(intermediate_size=56)",
)  # fmt: skip


@dataclass(frozen=True)
class Relative:
    """A spec, the model of transformers, and the parameters that its authors state, in words of
    the model card: of all, and active ones."""

    spec: str
    model: str
    parameters: str
    active: str
    sets: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of the config that do not follow from those of the DeepSeek family."""


NORMED = ("params.num_key_value_heads=2", "params.head_dim=8")
RELATIVES = [
    # arXiv 2502.16982, table 2, leaves embedding and head out: 15.29B and 2.24B.
    Relative("moonlight", "DeepseekV3", "15.96B", "2.91B", LATENT),
    Relative("kimi_k2", "DeepseekV3", "1.03T", "32.86B", (*LATENT, "params.q_lora_rank=20")),
    Relative("glm_4_7_flash", "Glm4MoeLite", "29.94B", "3.9B", (*LATENT, "params.q_lora_rank=20")),
    Relative("dots_llm1", "Dots1", "142.77B", "14.02B", (*NORMED, LATENT[-1])),
]


def config_of(relative: Relative, *sets: str) -> Any:
    """The config of transformers for a spec."""
    description = load(SPECS / f"{relative.spec}.yaml", sets=sets)
    keys = hf_config(description)
    if keys["model_type"] == "dslc":
        names = {p: v.value for p, v in description.params.items()}
        dense = description.spec.architecture.layers[0]
        slot = dense.slots["feed_forward"].arguments["intermediate_size"].value
        keys = {
            **names,
            "num_hidden_layers": sum(g.repeat for g in description.spec.architecture.layers),
            "first_k_dense_replace": dense.repeat,
            "intermediate_size": slot,
            "max_position_embeddings": description.spec.sequence.max_position_embeddings,
            "sliding_window": None,
        }
        keys["layer_types"] = ["full_attention"] * keys["num_hidden_layers"]
    keys = {n: v for n, v in keys.items() if n not in ("model_type", "architectures")}
    return getattr(transformers, f"{relative.model}Config")(**keys, attn_implementation="eager")


def class_of(relative: Relative) -> Any:
    return getattr(transformers, f"{relative.model}ForCausalLM")


@pytest.mark.parametrize("relative", RELATIVES, ids=lambda r: r.spec)
def test_a_spec_has_the_published_size(relative: Relative) -> None:
    description = load(SPECS / f"{relative.spec}.yaml")
    decode = after(description, "decode", PIPELINES["decode"][-1].name)
    found = summary(lower(description), decode)
    with torch.device("meta"):
        model = class_of(relative)(config_of(relative))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    theirs = sum(t.numel() for n, t in tensors if not n.endswith("inv_freq"))
    assert found.parameters == theirs
    assert format_count(found.parameters) == relative.parameters
    assert format_count(found.activated) == relative.active


@pytest.mark.parametrize("relative", RELATIVES, ids=lambda r: r.spec)
def test_at_small_size_it_computes_what_transformers_does(
    relative: Relative, tmp_path: Path
) -> None:
    sets = (*SMALL, *relative.sets)
    name = f"small_{relative.spec}"
    description = load(SPECS / f"{relative.spec}.yaml", sets=[*sets, f"model={name}"])
    build(description, tmp_path / name)
    ours = import_package(tmp_path / name, name).Model(seed=7)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(3).add_(0.05 * torch.randn_like(parameter))
        for buffer_name, buffer in ours.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    ours.save(tmp_path / "saved")
    config_of(relative, *sets).save_pretrained(tmp_path / "saved")
    theirs, info = class_of(relative).from_pretrained(
        tmp_path / "saved", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    theirs.set_attn_implementation("eager")
    tokens = torch.randint(96, (2, 33), generator=torch.manual_seed(0))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    logits = theirs(inputs).logits
    assert relative_rms(ours(inputs).logits, logits) <= LOGITS
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected.backward()
    loss = ours.loss(inputs, labels)
    loss.main.backward()
    assert loss.main.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = dict(theirs.named_parameters())
    for parameter_name in ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"):
        mine = dict(ours.named_parameters())[parameter_name].grad
        assert relative_rms(mine, gradients[parameter_name].grad) <= GRADIENTS
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    prompt = inputs[:, :9]
    text = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)
    assert ours.generate(prompt, max_new_tokens=12, temperature=0).tolist() == text.tolist()
