"""The `config.json` of a description, so that transformers loads what a built model saves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsl.hf.keys import ARCHITECTURES, LONGCAT, LONGCAT_EXPERTS
from dsl.hf.rope import yarn_mscale
from dsl.hf.values import OtherModelError, Values, is_shipped, require
from dsl.schema import MTP, BlockUse, LayerGroup

if TYPE_CHECKING:
    from dsl.load import Description

INDEXER = ("index_n_heads", "index_head_dim", "index_topk")
GROUPED = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "use_qk_norm",
)  # fmt: skip
ATTENTION = (
    "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
EXPERTS = (
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
    "n_group", "topk_group", "norm_topk_prob",
)  # fmt: skip
SCALED = ("mla_scale_q_lora", "mla_scale_kv_lora")
LONGCAT_SLOTS = {"attention": "MLA", "feed_forward": "SwiGLU", "mixture": "ZeroExpertMoE"}
PLAIN = {"use_qk_norm": True, "attention_bias": False, "partial_rotary_factor": 1}
"""What dots.llm1 is among models of `NormedGQA`."""
YARN = (
    "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim",
)  # fmt: skip


def hf_config(description: Description) -> dict[str, Any]:
    """The `config.json` that stands beside the weights of the model.

    For a model of the DeepSeek V2/V3 family and its relatives it is the inverse of `spec_from_hf`,
    in the keys of the published files, which transformers loads. Any other model gets
    `"model_type": "dslc"` and the values of its spec.
    """
    for family in (_of_family, _of_longcat):
        try:
            return family(description)
        except OtherModelError:
            continue
    return _of_own_kind(description)


def _of_family(description: Description) -> dict[str, Any]:
    architecture = description.spec.architecture
    groups = list(architecture.layers)
    dense = [g for g in groups if _feed_forward(g).name == "SwiGLU"]
    modules = [architecture.mtp] if architecture.mtp.depth else []
    parts: list[LayerGroup | MTP] = [*groups, *modules]
    experts = [_feed_forward(part) for part in parts[len(dense) :]]
    kind = experts[0].name if experts else "DeepSeekMoE"
    attention = [_attention(part) for part in parts]
    layers = [*(group.block for group in groups), *([BlockUse("DecoderLayer")] * len(modules))]
    around = [architecture.block]
    mtp = [module.block for module in modules]
    require(groups[: len(dense)] == dense and kind in ("DeepSeekMoE", "SoftmaxMoE"))
    require(attention[0].name in ("MLA", "SparseMLA", "NormedGQA"))
    expected = {"CausalLM": around, "DecoderLayer": layers, attention[0].name: attention}
    expected |= {"MTP": mtp, kind: experts, "SwiGLU": [_feed_forward(group) for group in dense]}
    for name, uses in expected.items():
        require(all(use.name == name for use in uses))
        require(not uses or is_shipped(description, name))
    values = Values(description)
    everything = [use for uses in expected.values() for use in uses]
    attends = _grouped_keys if attention[0].name == "NormedGQA" else _latent_keys
    config: dict[str, Any] = {
        "architectures": [],
        "model_type": _model_type(values, attention, kind, bool(experts), bool(modules)),
        "vocab_size": values.shared("vocab_size", around),
        "hidden_size": values.shared("hidden_size", everything),
        "num_hidden_layers": sum(group.repeat for group in groups),
        "first_k_dense_replace": sum(group.repeat for group in dense),
        "rms_norm_eps": values.real("rms_norm_eps", [*around, *layers, *mtp]),
        "tie_word_embeddings": values.shared("tie_word_embeddings", around),
        "hidden_act": "silu",
    }
    config["architectures"] = [n for n, k in ARCHITECTURES.items() if k == config["model_type"]]
    if dense:
        config["intermediate_size"] = values.shared("intermediate_size", expected["SwiGLU"])
    config |= attends(values, attention)
    if config["model_type"] == "dots1":  # which says so by its name
        config = {n: v for n, v in config.items() if n not in PLAIN} | {"sliding_window": None}
    config |= _scale_keys(values, around, layers, config)
    if experts:
        config |= _expert_keys(values, experts, kind)
    if kind == "DeepSeekMoE" and config["model_type"] not in ("minicpm3", "dots1"):
        config["num_nextn_predict_layers"] = architecture.mtp.depth
    if modules:
        config |= _mtp_keys(values, around, mtp, architecture.mtp.depth)
    return config | _common_keys(description)


def _model_type(
    values: Values, attention: Sequence[BlockUse], kind: str, experts: bool, mtp: bool
) -> str:
    """What transformers calls a model of these blocks."""
    if kind == "SoftmaxMoE":
        require(
            not mtp and attention[0].name == "MLA" and not values.shared("rope_halves", attention)
        )
        return "deepseek_v2"
    if attention[0].name == "SparseMLA":
        return "deepseek_v32"
    if attention[0].name == "MLA":
        if not values.shared("rope_halves", attention):
            return "deepseek_v3"
        require(not experts and values.shared("yarn_factor", attention) == 1)
        return "minicpm3"
    alike = all(values.shared(name, attention) == value for name, value in PLAIN.items())
    return "dots1" if alike and not mtp else "glm4_moe"


def _scale_keys(
    values: Values,
    around: Sequence[BlockUse],
    layers: Sequence[BlockUse],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """What embeddings, branches and states before the head are scaled by, in MiniCPM alone."""
    embedding, head = (values.real(n, around) for n in ("embedding_multiplier", "logits_scaling"))
    branch = values.real("residual_multiplier", layers)
    if config["model_type"] != "minicpm3":
        require(embedding == head == branch == 1)
        return {}
    base = config["hidden_size"] / head
    require(base.is_integer())
    depth = round(branch * math.sqrt(config["num_hidden_layers"]), 12)
    return {"scale_emb": embedding, "scale_depth": depth, "dim_model_base": int(base)}


def _grouped_keys(values: Values, uses: Sequence[BlockUse]) -> dict[str, Any]:
    keys = {name: values.shared(name, uses) for name in GROUPED}
    keys["partial_rotary_factor"] = values.real("partial_rotary_factor", uses)
    keys["rope_theta"] = values.real("rope_theta", uses)
    return {**keys, "attention_dropout": 0.0}


def _latent_keys(values: Values, uses: Sequence[BlockUse], scaled: bool = False) -> dict[str, Any]:
    """`scaled`: whether latents are, as the kind of model says."""
    if uses[0].name == "MLA":
        require(values.shared("latent_norm_eps", uses) == 1e-6)
        require(values.shared("window", uses) == 0)
        require({values.shared(name, uses) for name in SCALED} == {scaled})
    keys: dict[str, Any] = {name: values.shared(name, uses) for name in ATTENTION}
    if uses[0].name == "SparseMLA":
        keys |= {name: values.shared(name, uses) for name in INDEXER}
    keys["num_key_value_heads"] = keys["num_attention_heads"]
    keys["q_lora_rank"] = values.shared("q_lora_rank", uses) or None
    keys["attention_bias"] = values.shared("attention_bias", uses)
    keys["attention_dropout"] = 0.0
    keys["rope_theta"] = values.real("rope_theta", uses)
    keys["rope_scaling"] = None
    if values.shared("yarn_factor", uses) != 1:
        yarn: dict[str, Any] = {name: values.shared(f"yarn_{name}", uses) for name in YARN}
        keys["rope_scaling"] = {"type": "yarn", **yarn, **_attention_factor(yarn)}
    return keys


def _attention_factor(yarn: Mapping[str, Any]) -> dict[str, float]:
    """The factor of the rotary table, where transformers would assume another."""
    factor, mscale, all_dim = yarn["factor"], yarn["mscale"], yarn["mscale_all_dim"]
    ratio = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    assumed = ratio if mscale and all_dim else yarn_mscale(factor, 1)
    return {} if math.isclose(ratio, assumed) else {"attention_factor": ratio}


def _expert_keys(values: Values, uses: Sequence[BlockUse], kind: str) -> dict[str, Any]:
    keys: dict[str, Any] = {name: values.shared(name, uses) for name in EXPERTS}
    keys["routed_scaling_factor"] = values.real("routed_scaling_factor", uses)
    keys["moe_layer_freq"] = 1
    if kind == "DeepSeekMoE":
        return keys | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    require(not keys["norm_topk_prob"])
    method = "greedy" if keys["n_group"] == 1 else "group_limited_greedy"
    return keys | {"scoring_func": "softmax", "topk_method": method}


def _of_longcat(description: Description) -> dict[str, Any]:
    """LongCat-Flash: of one kind of layer, which holds two attentions and the experts beside."""
    architecture = description.spec.architecture
    groups, around = list(architecture.layers), [architecture.block]
    layers = [group.block for group in groups]
    require(architecture.mtp.depth == 0)
    require(all({n: u.name for n, u in g.slots.items()} == LONGCAT_SLOTS for g in groups))
    attention, dense, experts = ([g.slots[slot] for g in groups] for slot in LONGCAT_SLOTS)
    for name, uses in {"CausalLM": around, "ShortcutLayer": layers}.items():
        require(all(use.name == name for use in uses))
    for use in (*around, *layers, *(use for group in groups for use in group.slots.values())):
        require(is_shipped(description, use.name))
    values = Values(description)
    require(all(values.real(n, around) == 1 for n in ("embedding_multiplier", "logits_scaling")))
    require(not values.shared("norm_topk_prob", experts))
    require(not values.shared("rope_halves", attention))
    latent = _latent_keys(values, attention, scaled=True)
    require(latent["q_lora_rank"])
    return {
        "architectures": [n for n, kind in ARCHITECTURES.items() if kind == LONGCAT],
        "model_type": LONGCAT,
        "vocab_size": values.shared("vocab_size", around),
        "hidden_size": values.shared("hidden_size", [*around, *layers]),
        "num_layers": sum(group.repeat for group in groups),
        "rms_norm_eps": values.real("rms_norm_eps", [*around, *layers]),
        "tie_word_embeddings": values.shared("tie_word_embeddings", around),
        "hidden_act": "silu",
        "ffn_hidden_size": values.shared("intermediate_size", dense),
        "attention_method": "MLA",
        **dict.fromkeys(SCALED, True),
        **latent,
        **{key: values.shared(name, experts) for key, name in LONGCAT_EXPERTS.items()},
        "zero_expert_type": "identity",
        "router_bias": False,
        "routed_scaling_factor": values.real("routed_scaling_factor", experts),
        **_common_keys(description),
    }


def _mtp_keys(
    values: Values, around: Sequence[BlockUse], mtp: Sequence[BlockUse], depth: int
) -> dict[str, Any]:
    keys = {}
    if values.shared("mtp_concat", mtp) == "hidden_first":
        keys["mtp_hidden_states_first"] = True
    if values.shared("mtp_hidden_state", [*around, *mtp]) == "before_norm":
        # Further modules receive a normed state in transformers.
        require(depth == 1)
        keys["tie_last_hidden_states"] = False
    return keys


def _common_keys(description: Description) -> dict[str, Any]:
    spec = description.spec
    # Weights are saved as they are trained, in bf16 where products are in FP8.
    dtype = "float32" if spec.precision.policy == "fp32" else "bfloat16"
    eos = spec.sequence.eos_token_id
    # Under the name that DeepSeek-V3.1 has it by in its `quantization_config`.
    powers = {"scale_fmt": "ue8m0"} if spec.precision.scale_format == "ue8m0" else {}
    return {
        "max_position_embeddings": spec.sequence.max_position_embeddings,
        "bos_token_id": spec.sequence.bos_token_id,
        "eos_token_id": [*eos] if isinstance(eos, tuple) else eos,
        "initializer_range": spec.train.initializer_range,
        "aux_loss_alpha": spec.train.loss.balance_alpha,
        "seq_aux": True,
        "dtype": dtype,
        **powers,
    }


def _of_own_kind(description: Description) -> dict[str, Any]:
    spec = description.spec
    layers = [_uses(group) | {"repeat": group.repeat} for group in spec.architecture.layers]
    architecture: dict[str, Any] = {"block": str(spec.architecture.block), "layers": layers}
    if spec.architecture.mtp.depth:
        mtp = spec.architecture.mtp
        architecture["mtp"] = _uses(mtp) | {"depth": mtp.depth}
    params = {name: value.value for name, value in description.params.items()}
    config = {"model_type": "dslc", "model": spec.model, "params": params}
    return config | {"architecture": architecture} | _common_keys(description)


def _uses(group: LayerGroup | MTP) -> dict[str, Any]:
    slots = {name: str(use) for name, use in group.slots.items()}
    return {"block": str(group.block), **slots}


def _attention(group: LayerGroup | MTP) -> BlockUse:
    require(group.slots.keys() == {"attention", "feed_forward"})
    return group.slots["attention"]


def _feed_forward(group: LayerGroup | MTP) -> BlockUse:
    require("feed_forward" in group.slots)
    return group.slots["feed_forward"]
