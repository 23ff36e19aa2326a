"""Any spec either builds to a module that runs, or is refused with diagnostics: nothing between."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.build import build
from dsl.diagnostic import DiagnosticError, render
from dsl.load import load

COUNTER = itertools.count()

SIZES = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16])
ATTENTION = st.sampled_from(["MLA", "GQA", "MHA"])
FEED_FORWARD = st.sampled_from(
    ["SwiGLU", "SwiGLU(intermediate_size=12)", "DeepSeekMoE", "SoftmaxMoE"]
)


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
    }


def text_of(spec: dict[str, Any], name: str, unused: set[str]) -> str:
    params = "\n".join(
        f"  {key}: {json.dumps(value) if not isinstance(value, str) else value}"
        for key, value in spec["params"].items()
        if key not in unused
    )
    layers = "\n".join(f"    - {json.dumps(layer)}" for layer in spec["layers"])
    return f"""model: {name}
blocks: [causal_lm, decoder, mla, gqa, mha, swiglu, deepseek_moe, softmax_moe, mtp]
params:
{params}
architecture:
  layers:
{layers}
  mtp: {json.dumps(spec["mtp"])}
sequence: {{max_position_embeddings: 64}}
precision: {{policy: {spec["policy"]}}}
train: {{loss: {{balance_alpha: {spec["alpha"]}, mtp_weight: 0.3}}}}
"""


def built(spec: dict[str, Any], folder: Path) -> Any:
    """The module of a spec, without the parameters that its blocks do not read; None if refused."""
    name = f"random_{next(COUNTER)}"
    path = folder / "spec.yaml"
    unused: set[str] = set()
    while True:
        path.write_text(text_of(spec, name, unused))
        try:
            build(load(path), folder / name)
        except DiagnosticError as error:
            assert error.diagnostics and render(error.diagnostics)
            found = {d.message.split()[-1] for d in error.diagnostics if d.code == "E407"}
            if not found or found <= unused:
                assert all(d.message and d.span for d in error.diagnostics)
                return None
            unused |= found
            continue
        return importlib.import_module(name)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(specs())
def test_a_random_spec_runs_or_is_refused(spec: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        try:
            module = built(spec, Path(folder))
            if module is not None:
                runs(module, spec)
        finally:
            sys.path.remove(folder)


def runs(module: Any, spec: dict[str, Any]) -> None:
    model = module.Model(seed=3)
    tokens = torch.randint(17, (2, 9), generator=torch.manual_seed(0))
    out = model(tokens)
    assert out.logits.isfinite().all() and len(out.mtp_logits) == spec["mtp"]["depth"]
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.total.backward()
    assert loss.total.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    text = model.generate(tokens[:, :3], 4, eos_token_id=None)
    assert text.shape == (2, 7)
    if spec["policy"] == "fp32":
        again = tokens[:, :3]
        for _ in range(4):
            scores = model(again).logits[:, -1]
            again = torch.cat([again, scores.argmax(-1, keepdim=True)], 1)
        assert torch.equal(text, again)
