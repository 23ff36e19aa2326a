"""Which known name a person may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

# What other code bases and papers call a thing -> the names it may have here.
SYNONYMS = {
    "hidden_size": ("hidden", "hidden_dim", "dim", "d_model", "n_embd", "embed_dim", "width"),
    "vocab_size": ("vocab", "n_vocab", "padded_vocab_size"),
    "num_attention_heads": ("heads", "n_heads", "n_head", "num_heads"),
    "num_key_value_heads": ("kv_heads", "n_kv_heads", "num_kv_heads", "num_query_groups"),
    "head_dim": ("d_head", "head_size", "kv_channels"),
    "intermediate_size": ("inter_dim", "ffn_dim", "d_ff", "ffn_hidden_size", "mlp_dim"),
    "moe_intermediate_size": ("moe_inter_dim", "expert_dim", "moe_ffn_hidden_size", "expert_width"),
    "n_routed_experts": ("num_experts", "n_experts", "experts", "num_local_experts", "routed"),
    "n_shared_experts": ("num_shared_experts", "shared_experts", "shared"),
    "num_experts_per_tok": (
        "top_k", "topk", "k", "active", "n_activated_experts", "moe_top_k", "experts_per_token",
    ),
    "n_group": ("n_groups", "num_groups", "groups", "n_expert_groups", "num_expert_group"),
    "topk_group": ("groups_active", "n_limited_groups", "topk_groups", "top_k_group"),
    "routed_scaling_factor": ("route_scale", "routing_scale", "scale"),
    "norm_topk_prob": ("route_norm", "normalize_topk", "renormalize"),
    "q_lora_rank": ("q_rank", "query_rank"),
    "kv_lora_rank": ("kv_rank", "latent_dim", "d_c"),
    "qk_nope_head_dim": ("nope", "nope_dim", "qk_nope_dim"),
    "qk_rope_head_dim": ("rope", "rope_dim", "qk_rope_dim", "rotary_dim"),
    "v_head_dim": ("value_dim", "v_dim"),
    "rms_norm_eps": ("eps", "norm_eps", "epsilon", "layernorm_epsilon"),
    "rope_theta": ("theta", "rope_base", "rotary_base", "base"),
    "tie_word_embeddings": ("tied", "tie_embeddings", "weight_tying"),
    "max_position_embeddings": ("max_seq_len", "context_length", "max_length", "n_positions"),
    "yarn_factor": ("rope_factor", "rope_scaling", "factor"),
    "yarn_original_max_position_embeddings": ("original_max_position_embeddings",
                                              "original_seq_len"),
    "balance_alpha": ("aux_loss_alpha", "aux_loss_coef", "moe_aux_loss_coeff"),
    "mtp_weight": ("mtp_loss_weight", "mtp_lambda", "mtp_loss_scaling_factor"),
    "initializer_range": ("init_std", "init_range", "init_method_std"),
    "feed_forward": ("ffn", "mlp", "ff"),
    "attention": ("attn", "self_attn"),
    "repeat": ("num_layers", "n_layers", "num_hidden_layers", "count", "times"),
    "depth": ("num_nextn_predict_layers", "mtp_depth", "n_mtp_layers"),
    "learning_rate": ("lr", "base_lr", "max_lr", "peak_lr"),
    "weight_decay": ("wd", "adam_weight_decay"),
    "beta1": ("adam_beta1",),
    "beta2": ("adam_beta2",),
    "clip": ("grad_clip", "clip_grad", "clip_grad_norm", "gradient_clip", "gradient_clipping",
             "max_grad_norm"),
    "bias_update": ("bias_update_speed", "bias_update_rate", "moe_router_bias_update_rate"),
    "sequence_length": ("seq_len", "seq_length", "block_size", "max_seq_length"),
    "batch": ("batch_size", "global_batch_size", "gbs", "train_batch_size"),
    "micro_batch": ("mbs", "micro_batch_size", "microbatch_size",
                    "per_device_train_batch_size"),
    "steps": ("iterations", "max_iters", "max_steps", "num_steps", "train_iters", "train_steps"),
    "tokens": ("max_tokens", "num_tokens", "total_tokens", "train_tokens"),
    "document_mask": ("doc_mask", "reset_attention_mask", "intra_document_mask"),
    "fim": ("fill_in_the_middle",),
    "ema": ("ema_decay",),
    "pipeline": ("pp", "stages", "pipeline_parallel", "pipeline_parallel_size",
                 "pipeline_model_parallel_size"),
    "expert": ("ep", "ep_size", "expert_parallel", "expert_parallel_size",
               "expert_model_parallel_size"),
    "zero": ("zero_stage", "distributed_optimizer", "use_distributed_optimizer"),
    "eos_token_id": ("eos", "eos_id", "eod", "eos_token"),
    "bos_token_id": ("bos", "bos_id", "bos_token"),
    "scale_format": ("scale_fmt",),
    "precision": ("dtype",),
    "about": ("description", "doc"),
    "model": ("name",),
    "true": ("yes", "on", "True", "TRUE"),
    "false": ("no", "off", "False", "FALSE", "null", "none", "None"),
}  # fmt: skip

# What other code bases have and specs have not.
_TENSOR = (
    "there is no tensor parallelism, as in DeepSeek-V3 (report, 3.2): `pipeline` and `expert` "
    "cut a model"
)
_CONTEXT = "there is no context parallelism: a rank has whole sequences"
_DATA = "the ranks that `pipeline` and `expert` leave are replicas"
ABSENT = {
    **dict.fromkeys(("tensor", "tp", "tensor_parallel", "tensor_parallel_size",
                     "tensor_model_parallel_size"), _TENSOR),
    **dict.fromkeys(("context", "cp", "context_parallel", "context_parallel_size",
                     "sequence_parallel"), _CONTEXT),
    **dict.fromkeys(("data", "dp", "data_parallel", "data_parallel_size", "replicas"), _DATA),
}  # fmt: skip


def synonym(name: str, known: Collection[str]) -> str | None:
    """The name among `known` that means what others call `name`."""
    name = _plain(name)
    return next((m for m, others in SYNONYMS.items() if m in known and name in others), None)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.65) -> str | None:
    """The name among `known` most likely meant by `name`; None when nothing is near.

    `cutoff`, from 0 to 1, is how alike two names must be.
    """
    names = sorted(set(known))
    if meant := synonym(name, names):
        return meant
    # Case and the kind of separator are the commonest slips, and difflib counts them fully.
    plain = {_plain(n): n for n in names}
    close = difflib.get_close_matches(_plain(name)[:80], list(plain), n=1, cutoff=cutoff)
    return plain[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A help line that names the nearest known name, or an empty one."""
    near = nearest(name, known)
    return f"did you mean `{near}`?" if near else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
