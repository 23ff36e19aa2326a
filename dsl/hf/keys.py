"""Which model a `config.json` is of, and its keys that need no more than a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Families: the same equations under several names. Moonlight calls itself deepseek_v3.
FAMILIES = {
    "deepseek_v3": "v3",
    "kimi_k2": "v3",
    "glm4_moe_lite": "v3",
    "youtu": "v3",
    "deepseek_v32": "v3",
    "dots1": "v3",
    "glm4_moe": "v3",
    "minicpm3": "v3",
    "deepseek_v2": "v2",
    "longcat_flash": "longcat_flash",
}
LONGCAT = "longcat_flash"
# What LongCat's files call the parameters of experts.
LONGCAT_EXPERTS = {
    "n_routed_experts": "n_routed_experts",
    "zero_expert_num": "zero_expert_num",
    "moe_topk": "num_experts_per_tok",
    "expert_ffn_hidden_size": "moe_intermediate_size",
}
# The blocks of those whose attention is not `MLA`, and the files that hold them.
ATTENTIONS = {
    "deepseek_v32": ("SparseMLA", "sparse_mla"),
    "dots1": ("NormedGQA", "gqa_norm"),
    "glm4_moe": ("NormedGQA", "gqa_norm"),
}
DENSE = ("youtu", "minicpm3")  # that have no experts at all
ARCHITECTURES = {
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "KimiK2ForCausalLM": "kimi_k2",
    "Glm4MoeLiteForCausalLM": "glm4_moe_lite",
    "YoutuForCausalLM": "youtu",
    "DeepseekV32ForCausalLM": "deepseek_v32",
    "Dots1ForCausalLM": "dots1",
    "Glm4MoeForCausalLM": "glm4_moe",
    "MiniCPM3ForCausalLM": "minicpm3",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "LongcatFlashForCausalLM": "longcat_flash",
}
# Near relatives that compute something else; their files are read on to name every difference.
RELATIVES = {
    "deepseek_v4": "DeepSeek-V4 has another attention",
    "bailing_moe_v2": "Ling names its weights otherwise, and has q, k and v in one",
    "bailing_hybrid": "Ling has linear attention beside MLA from version 2.5 on",
    "axk1": "A.X-K1 has a norm after every feed-forward block",
    "kimi_k25": "Kimi-K2.5 reads images",
    "kimi_linear": "Kimi Linear has linear attention",
    "mistral4": "Mistral 4 has another gate",
}
# Keys that change neither the weights nor what is computed from them.
IGNORED = frozenset({
    "_attn_implementation", "_name_or_path", "add_cross_attention", "architectures",
    "attn_implementation", "auto_map", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "dtype", "ep_size", "finetuning_task", "id2label",
    "is_decoder", "is_encoder_decoder", "label2id", "model_type", "name_or_path", "num_labels",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "prefix",
    "pretraining_tp", "problem_type", "quantization_config", "return_dict", "sep_token_id",
    "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class",
    "torch_dtype", "torchscript", "transformers_version", "unsloth_fixed", "use_bfloat16",
    "use_cache",
})  # fmt: skip
# Keys with the one value that the blocks compute.
FIXED: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "the feed-forward blocks are SwiGLU"),
    "mlp_bias": (False, "no projection of a feed-forward block has a bias"),
    "attention_dropout": (0, "the attention has no dropout"),
    "moe_layer_freq": (1, "every layer after the dense ones is a mixture of experts"),
    "rope_interleave": (True, "the rotated elements are the pairs (2i, 2i+1)"),
    "pruned_heads": ({}, "no head of a layer is left out"),
}
# How transformers continues a text, with its defaults; it writes them into nested configs.
GENERATION: dict[str, Any] = {
    "bad_words_ids": None, "begin_suppress_tokens": None, "diversity_penalty": 0,
    "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "length_penalty": 1, "max_length": 20, "max_new_tokens": None,
    "min_length": 0, "min_new_tokens": None, "min_p": None, "no_repeat_ngram_size": 0,
    "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1, "output_scores": False,
    "remove_invalid_values": False, "repetition_penalty": 1, "return_dict_in_generate": False,
    "suppress_tokens": None, "temperature": 1, "top_k": 50, "top_p": 1, "typical_p": 1,
}  # fmt: skip
# Where the config of a model of several parts has that of its language model, and which keys of
# the whole are meant for it, too.
PART = "text_config"
OF_THE_WHOLE = (
    "bos_token_id", "dtype", "eos_token_id", "quantization_config", "tie_word_embeddings",
    "torch_dtype",
)  # fmt: skip
ROPE_TYPE_KEYS = ("rope_type", "type")  # the new and the old spelling
EXPERT_KEYS = frozenset({
    "moe_intermediate_size", "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob",
    "num_experts_per_tok", "routed_scaling_factor", "scoring_func", "topk_group", "topk_method",
})  # fmt: skip
# float16 is rounded to bfloat16, whose range is larger: the blocks of a spec have no float16.
POLICIES = {"bfloat16": "bf16", "float32": "fp32", "float16": "bf16"}
# Modules whose weights FP8 files keep in BF16, in `quantization_config`; beside weights in BF16 a
# key of its own.
KEPT = "modules_to_not_convert"
FP8_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def model_type(config: Mapping[str, Any]) -> Any:
    """`model_type`, or what `architectures` says where it is absent."""
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    return config.get("model_type") or ARCHITECTURES.get(str(first), first)


def language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model: `config`, or its part if that is of a known family."""
    part = config.get(PART)
    if not isinstance(part, dict) or str(model_type(config)) in FAMILIES:
        return config
    if str(model_type(part)) not in FAMILIES:
        return config
    return {key: config[key] for key in OF_THE_WHOLE if key in config} | part
