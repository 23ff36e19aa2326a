"""LongCat-Flash in small: two layers of 6 experts with weights and 3 without."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from backends.build import build
from dsl.load import Description, load
from tests.support.places import SPECS

EXPERTS, ZERO, CHOSEN = 6, 3, 4
PARAMS = {
    "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "q_lora_rank": 20,
    "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
    "n_routed_experts": EXPERTS, "zero_expert_num": ZERO, "num_experts_per_tok": CHOSEN,
    "moe_intermediate_size": 24,
}  # fmt: skip


def small(*sets: str) -> Description:
    return load(
        SPECS / "longcat_flash.yaml",
        sets=[
            *(f"params.{name}={value}" for name, value in PARAMS.items()),
            'architecture.layers.0.feed_forward="SwiGLU(intermediate_size=48)"',
            "architecture.layers.0.repeat=2",
            "sequence.max_position_embeddings=256",
            "train.initializer_range=0.2",
            *sets,
        ],
    )


def built(folder: Path, name: str, *sets: str, skip: tuple[str, ...] = ()) -> Any:
    """The package `name` of the small model."""
    build(small(*sets, f"model={name}"), folder / name, skip=skip)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
