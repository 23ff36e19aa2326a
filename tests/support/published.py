"""The keys of published `config.json` files of the DeepSeek family."""

from __future__ import annotations

from typing import Any

YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
# The keys of the published files.
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI_K2 = {
    **V3,
    "model_type": "kimi_k2",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "pad_token_id": 163839,
    "vocab_size": 163840,
}
MOONLIGHT = {
    **{k: v for k, v in V3.items() if k not in ("quantization_config", "rope_scaling")},
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
}
V2_LITE = {
    **{k: v for k, v in V3.items() if k not in ("quantization_config", "num_nextn_predict_layers")},
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "q_lora_rank": None,
    "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
}
V2 = {
    **V2_LITE,
    "n_group": 8,
    "topk_group": 3,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_method": "group_limited_greedy",
}
EXPERTS = {
    "first_k_dense_replace", "moe_intermediate_size", "moe_layer_freq", "n_group",
    "n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_experts_per_tok",
    "num_nextn_predict_layers", "routed_scaling_factor", "scoring_func", "topk_group",
    "topk_method",
}  # fmt: skip
YOUTU = {k: v for k, v in MOONLIGHT.items() if k not in EXPERTS} | {
    "architectures": ["YoutuForCausalLM"],
    "model_type": "youtu",
    "mlp_bias": False,
    "rope_interleave": True,
    "tie_word_embeddings": True,
}
GLM_LITE = {k: v for k, v in V3.items() if k != "first_k_dense_replace"} | {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "model_type": "glm4_moe_lite",
    "mlp_layer_types": ["dense"] + ["sparse"] * 60,
    "rms_norm_eps": 1e-5,
}
PUBLISHED = {
    "v3": V3, "kimi_k2": KIMI_K2, "moonlight": MOONLIGHT, "v2": V2, "v2_lite": V2_LITE,
    "youtu": YOUTU, "glm_lite": GLM_LITE,
}  # fmt: skip
