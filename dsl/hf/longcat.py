"""LongCat-Flash: what its `config.json` calls by other names, and tensors that no model reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dsl.hf.config_file import Reader
from dsl.hf.families import Family, Layers
from dsl.hf.keys import LONGCAT, LONGCAT_EXPERTS, model_type

_EXPERT = re.compile(r"model\.layers\.\d+\.mlp\.experts\.(\d+)\.(gate|up)_proj\.\w+")


class LongCat(Family):
    """Each layer has two attentions, two dense blocks and a mixture beside them."""

    def layers(self, reader: Reader) -> Layers:
        count = reader.integer("num_layers")
        reader.only("num_hidden_layers", [2 * count], "each layer has two attentions")
        return Layers(0, count, 0)

    def dense_params(self, reader: Reader, layers: Layers) -> dict[str, int]:
        return {"intermediate_size": reader.integer("ffn_hidden_size")}

    def latent_params(self, reader: Reader, q_lora_rank: int | float | bool) -> dict[str, bool]:
        """transformers compresses queries and scales both latents, which no key says."""
        reader.only("attention_method", ["MLA"], "attention is latent")
        if not q_lora_rank:
            message = "LongCat-Flash compresses its queries"
            reader.refuse("q_lora_rank", message, "give the rank that they are compressed to")
        for key in ("mla_scale_q_lora", "mla_scale_kv_lora"):
            reader.only(key, [True], "transformers scales the latents in any case")
        return {"mla_scale_q_lora": True, "mla_scale_kv_lora": True}

    def expert_params(self, reader: Reader) -> dict[str, Any]:
        """Those of the experts that compute nothing included."""
        reader.only("zero_expert_type", ["identity"], "zero experts give back what they are given")
        reader.only("router_bias", [False], "transformers does not add a bias of the router")
        reader.only("router_dtype", ["float32"], "the router is computed in float32")
        reader.only("norm_topk_prob", [False], "transformers does not divide weights by their sum")
        least = {"zero_expert_num": 0}
        params: dict[str, Any] = {
            name: reader.integer(key, least.get(key), minimum=least.get(key, 1))
            for key, name in LONGCAT_EXPERTS.items()
        }
        return params | {"routed_scaling_factor": reader.number("routed_scaling_factor")}

    def blocks(self, layers: Layers, attention: str) -> list[str]:
        return ["causal_lm", "shortcut", attention, "swiglu", "zero_expert_moe"]

    def architecture(self, layers: Layers, attention: str) -> list[str]:
        slots = f"attention: {attention}, feed_forward: SwiGLU, mixture: ZeroExpertMoE"
        group = f"{{repeat: {layers.sparse}, block: ShortcutLayer, {slots}}}"
        return ["architecture:", "  layers:", f"    - {group}"]


def unread_tensors(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, list[str]]:
    """Tensors of a folder that are no part of the model, by what they are.

    Published files hold an MTP module, which transformers leaves out, too; transformers makes and
    saves gate and up of the experts that compute nothing.
    """
    if model_type(config) != LONGCAT:
        return {}
    found: dict[str, list[str]] = {}
    for name in names:
        expert = _EXPERT.fullmatch(name)
        count, zero = config["n_routed_experts"], config.get("zero_expert_num") or 0
        if name.startswith("model.mtp."):
            found.setdefault("of an MTP module, which this model has no block for", []).append(name)
        elif expert and count <= int(expert[1]) < count + zero:
            found.setdefault("of experts that compute nothing", []).append(name)
    return found
