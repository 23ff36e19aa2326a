"""Rotary embedding of a `config.json`: plain, or YaRN, in the new and the old spelling."""

from __future__ import annotations

import math
from typing import Any

from dsl.hf.config_file import Reader
from dsl.hf.keys import ATTENTIONS, LONGCAT, ROPE_TYPE_KEYS, model_type


def rope_params(reader: Reader) -> dict[str, Any]:
    """RoPE from `rope_parameters` (new) or `rope_scaling` and `rope_theta` (old spelling)."""
    new, old = reader.sub("rope_parameters"), reader.sub("rope_scaling")
    if new.config and old.config and new.config != old.config:
        reader.refuse("rope_scaling", "`rope_scaling` and `rope_parameters` disagree")
    rope = old if old.config else new
    kind = str(model_type(reader.config))
    outer = reader.number("rope_theta", 1e7 if kind == LONGCAT else 1e4)
    theta = rope.number("rope_theta", outer)
    if "rope_theta" in rope.config and reader.config.get("rope_theta", theta) != theta:
        reader.refuse("rope_theta", f"`rope_theta` is given twice: {outer} and {theta}")
    plain = kind == "minicpm3" or ATTENTIONS.get(kind, ("",))[0] == "NormedGQA"
    allowed, why = ["default", "yarn"], "RoPE is plain or YaRN"
    if plain:
        allowed, why = ["default"], "RoPE of this model is plain: blocks have no lists of factors"
        rope.taken.add("partial_rotary_factor")
    kinds = [rope.only(k, allowed, why) for k in ROPE_TYPE_KEYS]
    yarn = "yarn" in kinds and rope.number("factor", minimum=1) > 1
    params = {"rope_theta": theta} | _yarn(rope, yarn)
    rope.finish()
    return params


def _yarn(rope: Reader, used: bool) -> dict[str, Any]:
    """YaRN's numbers; those of plain RoPE, or of a factor of 1, would change nothing."""
    factor = rope.number("factor", 1, minimum=1)
    original = rope.integer("original_max_position_embeddings", None if used else 1)
    fast, slow = rope.number("beta_fast", 32), rope.number("beta_slow", 1)
    rope.only("truncate", [True], "the corrected range is rounded to whole dimensions")
    mscale, all_dim = _mscales(rope, factor)
    if not used:
        return {}
    return {
        "yarn_factor": factor,
        "yarn_original_max_position_embeddings": original,
        "yarn_beta_fast": fast,
        "yarn_beta_slow": slow,
        "yarn_mscale": mscale,
        "yarn_mscale_all_dim": all_dim,
    }


def _mscales(rope: Reader, factor: float) -> tuple[float, float]:
    """`mscale` and `mscale_all_dim`, where transformers and DeepSeek's code agree on their use.

    DeepSeek multiplies the rotary table by m(mscale) / m(mscale_all_dim), m(s) = 0.1 s ln(factor)
    + 1; transformers by m(1) unless both are given and not zero, or by `attention_factor`.
    """
    mscale, all_dim = rope.number("mscale", 1.0), rope.number("mscale_all_dim", 0.0)
    ratio = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    both = rope.config.get("mscale") and rope.config.get("mscale_all_dim")
    other = rope.number("attention_factor", ratio if both else yarn_mscale(factor, 1))
    if not math.isclose(ratio, other):
        key = "attention_factor" if rope.config.get("attention_factor") else "mscale"
        message = (
            f"`{key}`: transformers scales the rotary table by {other:g}, DeepSeek by {ratio:g}"
        )
        rope.refuse(key, message, "give `mscale` and `mscale_all_dim`, and no `attention_factor`")
    return mscale, all_dim


def yarn_mscale(factor: float, scale: float) -> float:
    """YaRN's amplitude for an extension by `factor` (arXiv 2309.00071, equation 22)."""
    return 0.1 * scale * math.log(factor) + 1
