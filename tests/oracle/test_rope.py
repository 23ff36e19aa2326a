"""Every accepted pair of mscales means in a spec what it means in transformers."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from dsl.diagnostic import DiagnosticError
from dsl.hf import hf_config, read_config, spec_from_hf
from dsl.load import load
from dsl.source import Source
from tests.support.configs import V3, YARN

MSCALES = (None, 0.0, 0.5, 1.0)


def scales(config: dict[str, Any]) -> tuple[float, float]:
    """Factors of the rotary table and of the scores, as transformers computes them."""
    built = DeepseekV3Config(**json.loads(json.dumps(config)))
    with torch.device("meta"):
        attention = DeepseekV3Attention(built, 0)
    return DeepseekV3RotaryEmbedding(built).attention_scaling, attention.scaling


@pytest.mark.parametrize(("mscale", "all_dim"), list(product(MSCALES, MSCALES)))
def test_mscales(mscale: float | None, all_dim: float | None, tmp_path: Path) -> None:
    yarn = {**YARN, "mscale": mscale, "mscale_all_dim": all_dim}
    config = {**V3, "model_type": "deepseek_v3", "rope_scaling": yarn}
    source = Source("config.json", json.dumps(config))
    try:
        text = spec_from_hf(read_config(source), source, "m")
    except DiagnosticError as error:
        assert all("DeepSeek" in problem.message for problem in error.diagnostics)
        assert not (mscale and all_dim), "both are given, and the sources agree"
        return
    path = tmp_path / "m.yaml"
    path.write_text(text)
    description = load(path)
    params = {name: float(value.value) for name, value in description.params.items()}
    # The formulas of the block MLA.
    table, scores = (
        0.1 * params[name] * math.log(params["yarn_factor"]) + 1
        for name in ("yarn_mscale", "yarn_mscale_all_dim")
    )
    head = V3["qk_nope_head_dim"] + V3["qk_rope_head_dim"]
    expected = table / scores, head**-0.5 * scores**2
    assert scales(config) == pytest.approx(expected)
    assert scales(hf_config(description)) == pytest.approx(expected)
