"""What the families of models have of their own: layers, experts and blocks.

A family asks a `config.json` for its part, and names the blocks that compute it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from dsl.hf.config_file import Reader
from dsl.hf.keys import DENSE, model_type


@dataclass(frozen=True)
class Layers:
    """How many layers are dense, how many mixtures of experts, how many MTP modules follow."""

    dense: int
    sparse: int
    mtp: int

    @property
    def has_experts(self) -> bool:
        return self.sparse + self.mtp > 0


class Family:
    """What DeepSeek-V2 and V3 have in common; the others differ from it."""

    experts: ClassVar[tuple[str, str]]
    """The file and the block of the mixture of experts."""

    def layers(self, reader: Reader) -> Layers:
        count = reader.integer("num_hidden_layers")
        kind = str(model_type(reader.config))
        # GLM reads `mlp_layer_types` only.
        dense = {**dict.fromkeys(DENSE, count), "glm4_moe_lite": 1}.get(kind)
        if reader.take("mlp_layer_types") is not None:
            dense = _leading_dense(reader, count)
        if dense is None:
            dense = min(reader.integer("first_k_dense_replace", minimum=0), count)
        else:
            reader.only("first_k_dense_replace", [dense], "transformers makes so many layers dense")
        return Layers(dense, count - dense, self.mtp(reader))

    def mtp(self, reader: Reader) -> int:
        """How many MTP modules there are."""
        return reader.integer("num_nextn_predict_layers", 0, minimum=0)

    def dense_params(self, reader: Reader, layers: Layers) -> dict[str, int]:
        """Parameters of dense layers."""
        size = reader.integer("intermediate_size", None if layers.dense else 1)
        return {"intermediate_size": size} if layers.dense else {}

    def latent_params(self, reader: Reader, q_lora_rank: int | float | bool) -> dict[str, bool]:
        """Further parameters of latent attention."""
        return {}

    def expert_params(self, reader: Reader) -> dict[str, Any]:
        """Parameters of the mixture of experts."""
        params: dict[str, Any] = {
            "n_routed_experts": reader.integer("n_routed_experts"),
            "n_shared_experts": reader.integer("n_shared_experts", 0, minimum=0),
            "num_experts_per_tok": reader.integer("num_experts_per_tok"),
            "moe_intermediate_size": reader.integer("moe_intermediate_size"),
            **self.gate_params(reader),
        }
        params["routed_scaling_factor"] = reader.number("routed_scaling_factor")
        return params

    def gate_params(self, reader: Reader) -> dict[str, Any]:
        """Parameters of the gate: of groups of experts, and how many of them a token goes to."""
        raise NotImplementedError

    def blocks(self, layers: Layers, attention: str) -> list[str]:
        """The block files that the spec needs; `attention` is that of the attention."""
        # The experts are SwiGLU blocks too.
        used = {"causal_lm": True, "decoder": True, attention: True, "swiglu": True}
        used |= {self.experts[0]: layers.has_experts, "mtp": layers.mtp > 0}
        return [name for name, is_used in used.items() if is_used]

    def architecture(self, layers: Layers, attention: str) -> list[str]:
        """The lines of that section; `attention` is the block of the attention."""
        _, experts = self.experts
        lines = ["architecture:", "  layers:"]
        for repeat, block in ((layers.dense, "SwiGLU"), (layers.sparse, experts)):
            if repeat:
                slots = f"attention: {attention}, feed_forward: {block}"
                lines.append(f"    - {{repeat: {repeat}, {slots}}}")
        if layers.mtp:
            slots = f"attention: {attention}, feed_forward: {experts}"
            lines.append(f"  mtp: {{depth: {layers.mtp}, {slots}}}")
        return lines


class V3(Family):
    """DeepSeek-V3 and those with its gate: sigmoids, and a bias that selects alone."""

    experts = ("deepseek_moe", "DeepSeekMoE")

    def gate_params(self, reader: Reader) -> dict[str, Any]:
        reader.only("scoring_func", ["sigmoid"], "the gate of this family")
        reader.only("topk_method", ["noaux_tc"], "the gate of this family")
        return {
            "norm_topk_prob": reader.flag("norm_topk_prob"),
            "n_group": reader.integer("n_group"),
            "topk_group": reader.integer("topk_group"),
        }


class V2(Family):
    """DeepSeek-V2 and those with its gate: a softmax. They have no MTP modules."""

    experts = ("softmax_moe", "SoftmaxMoE")

    def mtp(self, reader: Reader) -> int:
        count = super().mtp(reader)
        if count:
            reader.refuse("num_nextn_predict_layers", "DeepSeek-V2 has no MTP modules")
        return count

    def gate_params(self, reader: Reader) -> dict[str, Any]:
        reader.only("scoring_func", ["softmax"], "the gate of this family")
        methods = ["greedy", "group_limited_greedy"]
        grouped = reader.only("topk_method", methods, "the gate of this family") == methods[1]
        # transformers never divides by the sum, DeepSeek's own code does when this is true.
        reader.only("norm_topk_prob", [False], "the sources disagree on its meaning")
        groups = {
            key: reader.integer(key, None if grouped else 1) for key in ("n_group", "topk_group")
        }
        return groups if grouped else dict.fromkeys(groups, 1)


def _leading_dense(reader: Reader, count: int) -> int:
    """How many layers `mlp_layer_types` lists as dense, all of which must come first."""
    kinds = reader.take("mlp_layer_types")
    kinds = kinds if isinstance(kinds, list) else []
    dense = next((i for i, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    if kinds[dense:] != ["sparse"] * (len(kinds) - dense) or len(kinds) != count:
        message = "`mlp_layer_types` must name dense layers first and sparse ones after them"
        reader.refuse("mlp_layer_types", message, f"one name for each of {count} layers")
    return dense
