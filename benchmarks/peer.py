"""A built model and transformers' model of the same numbers and weights, for fair comparisons."""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3ForCausalLM

from backends.build import build
from dsl.load import load

ROOT = Path(__file__).parent.parent

# About 13M parameters: a V3 in small, without MTP, which transformers does not train.
SMALL = (
    "params.vocab_size=4096",
    "params.hidden_size=256",
    "params.q_lora_rank=96",
    "params.kv_lora_rank=64",
    "params.qk_nope_head_dim=32",
    "params.qk_rope_head_dim=16",
    "params.v_head_dim=32",
    "params.n_routed_experts=32",
    "params.moe_intermediate_size=128",
    "params.yarn_original_max_position_embeddings=2048",
    "architecture.layers.1.repeat=3",
    "architecture.mtp.depth=0",
    "sequence.max_position_embeddings=4096",
)

# How transformers may compute experts; the fastest counts. Its batched_mm copies the weights for
# every token: a fortieth of the speed in training, and never the best in decoding.
EXPERTS = ("grouped_mm", "eager")


def pair(dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Our model, and transformers' with the same weights by its way to compute experts."""
    folder = Path(tempfile.mkdtemp())
    policy = "precision.policy=bf16"
    description = load(ROOT / "specs" / "deepseek_v3_tiny.yaml", sets=[*SMALL, policy])
    build(description, folder / "small_v3")
    sys.path.insert(0, str(folder))
    ours = importlib.import_module("small_v3").Model(dtype=dtype, seed=0)
    ours.save(folder / "weights")
    peers = {
        name: DeepseekV3ForCausalLM.from_pretrained(
            folder / "weights", dtype=dtype, experts_implementation=name
        )
        for name in EXPERTS
    }
    return ours, peers


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The median time of a call, after two that do not count."""
    run()
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
