"""Small models that together vary every feature, as keys of Hugging Face configs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

V3: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "num_nextn_predict_layers": 0,
    "aux_loss_alpha": 0.01,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
V2: dict[str, Any] = {
    **{k: v for k, v in V3.items() if k != "num_nextn_predict_layers"},
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class Case:
    """One model: its family in transformers, and the keys in which it differs from V3 or V2."""

    name: str
    keys: dict[str, Any]
    model_type: str = "deepseek_v3"

    @property
    def config(self) -> dict[str, Any]:
        family = {"deepseek_v3": V3, "deepseek_v2": V2}.get(self.model_type, {})
        return copy.deepcopy({**family, **self.keys})  # transformers writes into nested objects

    @property
    def depth(self) -> int:
        """How many MTP modules the model has."""
        return int(self.config.get("num_nextn_predict_layers", 0))


CASES = [
    Case("plain", {}),
    Case("no_q_compression", {"q_lora_rank": None}),
    Case("one_group", {"n_group": 1, "topk_group": 1}),
    Case("many_experts", {"n_routed_experts": 32, "n_group": 8, "topk_group": 3,
                          "num_experts_per_tok": 6}),
    # Not normalized: the only weight would always be 1, and the gate would learn nothing.
    Case("one_active_expert", {"num_experts_per_tok": 1, "topk_group": 1,
                               "norm_topk_prob": False}),
    Case("no_shared_experts", {"n_shared_experts": 0}),
    Case("two_shared_experts", {"n_shared_experts": 2, "routed_scaling_factor": 1.0}),
    Case("no_dense_layer", {"first_k_dense_replace": 0, "num_hidden_layers": 2}),
    Case("all_layers_dense", {"first_k_dense_replace": 3, "rope_scaling": YARN}),
    # The ramp between frequencies that stay and that shrink ends beyond the last frequency.
    Case("yarn", {"rope_scaling": {**YARN, "original_max_position_embeddings": 4096},
                  "rope_theta": 100.0, "max_position_embeddings": 16384}),
    Case("yarn_two_mscales", {"rope_scaling": {**YARN, "mscale_all_dim": 0.707}}),
    Case("yarn_no_mscale", {"rope_scaling": {k: v for k, v in YARN.items() if "mscale" not in k}
                            | {"factor": 8.0, "beta_fast": 4, "beta_slow": 2},
                             "max_position_embeddings": 512}),
    Case("head_sizes_differ", {"qk_nope_head_dim": 20, "qk_rope_head_dim": 4, "v_head_dim": 10,
                               "attention_bias": True}),
    Case("wide_values", {"qk_nope_head_dim": 6, "qk_rope_head_dim": 10, "v_head_dim": 24}),
    Case("weights_not_normalized", {"norm_topk_prob": False, "routed_scaling_factor": 1.7}),
    Case("tied_head", {"tie_word_embeddings": True, "q_lora_rank": None}),
    # Moonlight and GLM have another eps, which the two inner norms of MLA do not follow.
    Case("other_eps", {"rms_norm_eps": 0.05}),
    Case("mtp", {"num_nextn_predict_layers": 1}),
    Case("mtp_twice", {"num_nextn_predict_layers": 2, "rope_scaling": YARN, "q_lora_rank": None}),
    Case("mtp_tied", {"num_nextn_predict_layers": 1, "tie_word_embeddings": True,
                      "num_hidden_layers": 2, "n_shared_experts": 2}),
    Case("mtp_hidden_first", {"num_nextn_predict_layers": 1, "mtp_hidden_states_first": True}),
    Case("v2", {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
                "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
         "deepseek_v2"),
    Case("v2_lite", {"topk_method": "greedy", "q_lora_rank": None, "n_routed_experts": 12,
                     "n_group": 1, "topk_group": 1, "attention_bias": True}, "deepseek_v2"),
]  # fmt: skip
