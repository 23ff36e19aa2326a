"""Random specs: every number and choice drawn, from all blocks there are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from dsl import ast
from dsl.diagnostic import DiagnosticError, render
from dsl.load import Description, load
from dsl.parse import parse_blocks
from dsl.read import read_source
from dsl.source import Source, Span
from tests.support import random_blocks
from tests.support.places import SPECS

T = TypeVar("T")

SIZES = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16])
NSA = "NativeSparseAttention(nsa_block=2)"
CAPPED = "CappedGQA(window=2, softcap=0.5)"
ATTENTION = st.sampled_from([
    "MLA", "MLA(window=3)", "GQA", "MHA", CAPPED, "RandomAttention", "RandomAttention", "SparseMLA",
    "NormedGQA(partial_rotary_factor=0.5)", "SinkGQA(window=2)", "DifferentialAttention",
    NSA, "BiasedAttention",
])  # fmt: skip
FEED_FORWARD = st.sampled_from([
    "SwiGLU", "SwiGLU(intermediate_size=12)", "DeepSeekMoE", "SoftmaxMoE", "RandomFF", "RandomFF",
    "RandomMoE", "GatedSharedMoE", "BiasedMoE", "ZeroExpertMoE(zero_expert_num=3)",
])  # fmt: skip


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    """A spec with every number and choice drawn; many do not fit together."""
    params = {
        "vocab_size": draw(st.sampled_from([17, 32])),
        "hidden_size": draw(SIZES) * 4,
        "intermediate_size": draw(SIZES) * 3,
        "num_attention_heads": draw(SIZES),
        "num_key_value_heads": draw(st.sampled_from([1, 2, 3])),
        "head_dim": draw(SIZES),
        "q_lora_rank": draw(st.sampled_from([0, 5, 8])),
        "kv_lora_rank": draw(SIZES),
        "qk_nope_head_dim": draw(SIZES),
        "qk_rope_head_dim": draw(st.sampled_from([2, 4, 6, 8, 8, 8, 5])),
        "v_head_dim": draw(SIZES),
        "index_n_heads": draw(st.sampled_from([1, 2, 4])),
        "index_head_dim": draw(st.sampled_from([8, 9, 12])),
        "index_topk": draw(st.sampled_from([1, 2, 5, 50])),
        "indexer_loss_weight": draw(st.sampled_from([0.5, 2])),
        "yarn_factor": draw(st.sampled_from([1, 4, 40])),
        "yarn_mscale_all_dim": draw(st.sampled_from([0, 1])),
        "n_routed_experts": draw(st.sampled_from([4, 6, 8, 8, 16])),
        "num_experts_per_tok": draw(st.sampled_from([1, 2, 3, 5])),
        "n_shared_experts": draw(st.integers(0, 2)),
        "moe_intermediate_size": draw(SIZES),
        "n_group": draw(st.sampled_from([1, 1, 2, 3, 4])),
        "topk_group": draw(st.sampled_from([1, 1, 2, 3])),
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "tie_word_embeddings": draw(st.booleans()),
        "mtp_concat": draw(st.sampled_from(['"embedding_first"', '"hidden_first"'])),
        "mtp_hidden_state": draw(st.sampled_from(['"after_norm"', '"before_norm"'])),
    }

    def layer(repeat: int) -> dict[str, Any]:
        return {"repeat": repeat, "attention": draw(ATTENTION), "feed_forward": draw(FEED_FORWARD)}

    depth = draw(st.integers(-1, 2))
    return {
        "params": params,
        "layers": [layer(draw(st.integers(1, 2))) for _ in range(draw(st.integers(1, 2)))],
        "mtp": {"depth": depth, "attention": draw(ATTENTION), "feed_forward": draw(FEED_FORWARD)},
        "policy": draw(st.sampled_from(["fp32", "bf16"])),
        "alpha": draw(st.sampled_from(["1e-3", "0"])),
        "mask": draw(st.booleans()),
        "blocks": [
            random_blocks.MOE,
            draw(random_blocks.attention()),
            draw(random_blocks.feed_forward()),
        ],
        "wild": draw(random_blocks.feed_forward(wild=True)) if draw(st.booleans()) else "",
    }


def few(share: int) -> settings:
    """One in `share` of the usual number of examples, 100 or 2000 in the profile `explore`.

    A whole model is slow, and making it smaller until it just fails would take minutes.
    """
    return settings(
        max_examples=settings().max_examples // share,
        phases=[phase for phase in Phase if phase is not Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def text_of(spec: dict[str, Any], name: str, unused: set[str]) -> str:
    params = "\n".join(
        f"  {key}: {json.dumps(value) if not isinstance(value, str) else value}"
        for key, value in spec["params"].items()
        if key not in unused
    )
    library = ["sparse_mla", "gqa_norm", "capped_gqa", "zero_expert_moe"]
    own = ", ".join([*library, "./random.dsl", *map(str, random_blocks.EXAMPLES)])
    layers = "\n".join(f"    - {json.dumps(layer)}" for layer in spec["layers"])
    return f"""model: {name}
blocks: [causal_lm, decoder, mla, gqa, mha, swiglu, deepseek_moe, softmax_moe, mtp, {own}]
params:
{params}
architecture:
  layers:
{layers}
  mtp: {json.dumps(spec["mtp"])}
sequence: {{max_position_embeddings: 64, eos_token_id: 1}}
precision: {{policy: {spec["policy"]}}}
train:
  document_mask: {json.dumps(spec["mask"])}
  loss: {{balance_alpha: {spec["alpha"]}, mtp_weight: 0.3}}
"""


def fitted(spec: dict[str, Any]) -> dict[str, Any]:
    """The same with numbers that go together, so that it is accepted."""
    p = dict(spec["params"])
    p["num_key_value_heads"] = math.gcd(p["num_attention_heads"], p["num_key_value_heads"])
    p["head_dim"] += -p["head_dim"] % 4  # half of it is turned, in pairs
    p["qk_rope_head_dim"] += p["qk_rope_head_dim"] % 2
    p["n_group"] = math.gcd(p["n_routed_experts"] // 2, p["n_group"])  # two or more in each
    p["topk_group"] = min(p["topk_group"], p["n_group"])
    candidates = p["n_routed_experts"] // p["n_group"] * p["topk_group"]
    p["num_experts_per_tok"] = min(p["num_experts_per_tok"], candidates)
    # The interpreter of graphs does not know the function of NSA.
    layers, (mtp,) = (
        [{**part, "attention": part["attention"].replace(NSA, "GQA")} for part in parts]
        for parts in (spec["layers"], [spec["mtp"]])
    )
    mtp["depth"] = max(mtp["depth"], 0)
    attends = {part["attention"].split("(")[0] for part in [*layers, mtp]}
    if "SparseMLA" in attends:
        p["q_lora_rank"] = p["q_lora_rank"] or 5
        p["index_head_dim"] = max(p["index_head_dim"], p["qk_rope_head_dim"] + 1)
    selects = "RandomAttention" in attends and "lightning_indexer" in str(spec["blocks"])
    mask = spec["mask"] and not (selects or "SparseMLA" in attends)
    return {**spec, "params": p, "layers": layers, "mtp": mtp, "mask": mask, "wild": ""}


@cache
def _shipped(path: Path, name: str) -> Source:
    return read_source(path, name)


_parsed = cache(parse_blocks)
"""Of shipped files, which are most of what a spec is read from."""


def _read(path: Path, name: str, span: Span | None = None) -> Source:
    return _shipped(path, name) if path.is_relative_to(SPECS) else read_source(path, name, span)


def _parse(source: Source) -> tuple[ast.Block, ...]:
    shipped = source.path is not None and source.path.is_relative_to(SPECS)
    return _parsed(source) if shipped else parse_blocks(source)


def accepted(
    spec: dict[str, Any], folder: Path, name: str, use: Callable[[Description], T]
) -> T | None:
    """What `use` makes of a spec, without the parameters that its blocks do not read.

    None if the spec is refused; then every reason is a diagnostic with a place.
    """
    path = folder / "spec.yaml"
    own = [*spec["blocks"][:-1], spec["wild"]] if spec["wild"] else spec["blocks"]
    (folder / "random.dsl").write_text("\n".join(own))
    unused: set[str] = set()
    while True:
        path.write_text(text_of(spec, name, unused))
        try:
            with patch("dsl.load.read_source", _read), patch("dsl.load.parse_blocks", _parse):
                description = load(path)
            return use(description)
        except DiagnosticError as error:
            assert error.diagnostics and render(error.diagnostics)
            found = {d.message.split()[-1] for d in error.diagnostics if d.code == "E407"}
            if not found or found <= unused:
                assert all(d.message and d.span for d in error.diagnostics)
                return None
            unused |= found
