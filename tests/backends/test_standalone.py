"""A built package runs where dslc is not installed, and names weights as the checkpoint does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from backends.build import build
from dsl.load import load
from tests.support.places import ROOT

ALONE = """
import sys
FORBIDDEN = {"dsl", "compiler", "backends", "dslc", "specs", "runtime", "pydantic", "lark",
             "jinja2", "ruamel", "typer", "networkx", "transformers"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"a build must not need {name}")
sys.meta_path.insert(0, Refuse())
"""

USE = """
import torch
import deepseek_v3_tiny as v3
model = v3.Model(dtype=torch.float32, seed=1)
tokens = torch.randint(512, (2, 17), generator=torch.manual_seed(0))
out = model(tokens)
assert out.logits.shape == (2, 17, 512) and [x.shape[1] for x in out.mtp_logits] == [16, 15]
model.loss(tokens[:, :-1], tokens[:, 1:]).total.backward()
assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
assert model.generate(tokens[:, :4], 5, eos_token_id=None).shape == (2, 9)
model.save("weights")
again = v3.load("weights")
assert torch.equal(again(tokens).logits, out.logits)
print("done")
"""

META = """
import time
import torch
import deepseek_v3 as v3
start = time.perf_counter()
model = v3.Model(device="meta")
assert time.perf_counter() - start < 1, "the model itself takes under a second"
for name, tensor in model.state_dict().items():
    print(name, str(tensor.dtype).removeprefix("torch."), *tensor.shape)
"""


def run(script: str, folder: Path, build_folder: Path) -> str:
    """What a script prints in another folder, with only the build on the path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment["PYTHONPATH"] = str(build_folder)
    done = subprocess.run(
        [sys.executable, "-c", ALONE + script],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_computes_trains_generates_and_keeps(tmp_path: Path) -> None:
    build(load(ROOT / "specs" / "deepseek_v3_tiny.yaml"), tmp_path / "b" / "deepseek_v3_tiny")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert run(USE, elsewhere, tmp_path / "b") == "done\n"


def published() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, element types and shapes of the published checkpoint, without its FP8 scales."""
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}

    def add(name: str, *shape: int, dtype: str = "bfloat16") -> None:
        expected[name] = (dtype, shape)

    def ffn(prefix: str, width: int) -> None:
        add(f"{prefix}.gate_proj.weight", width, 7168)
        add(f"{prefix}.up_proj.weight", width, 7168)
        add(f"{prefix}.down_proj.weight", 7168, width)

    add("model.embed_tokens.weight", 129280, 7168)
    for layer in range(62):
        at = f"model.layers.{layer}"
        add(f"{at}.self_attn.q_a_proj.weight", 1536, 7168)
        add(f"{at}.self_attn.q_a_layernorm.weight", 1536)
        add(f"{at}.self_attn.q_b_proj.weight", 24576, 1536)
        add(f"{at}.self_attn.kv_a_proj_with_mqa.weight", 576, 7168)
        add(f"{at}.self_attn.kv_a_layernorm.weight", 512)
        add(f"{at}.self_attn.kv_b_proj.weight", 32768, 512)
        add(f"{at}.self_attn.o_proj.weight", 7168, 16384)
        add(f"{at}.input_layernorm.weight", 7168)
        add(f"{at}.post_attention_layernorm.weight", 7168)
        if layer < 3:
            ffn(f"{at}.mlp", 18432)
            continue
        add(f"{at}.mlp.gate.weight", 256, 7168)
        add(f"{at}.mlp.gate.e_score_correction_bias", 256, dtype="float32")
        ffn(f"{at}.mlp.shared_experts", 2048)
        for expert in range(256):
            ffn(f"{at}.mlp.experts.{expert}", 2048)
    last = "model.layers.61"
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        add(f"{last}.{norm}.weight", 7168)
    add(f"{last}.eh_proj.weight", 7168, 14336)
    add(f"{last}.embed_tokens.weight", 129280, 7168)
    add(f"{last}.shared_head.head.weight", 129280, 7168)
    add("model.norm.weight", 7168)
    add("lm_head.weight", 129280, 7168)
    return expected


@pytest.mark.slow
def test_v3_on_the_meta_device_has_the_tensors_of_the_published_checkpoint(tmp_path: Path) -> None:
    build(load(ROOT / "specs" / "deepseek_v3.yaml"), tmp_path / "deepseek_v3")
    found = {}
    for line in run(META, tmp_path, tmp_path).splitlines():
        name, dtype, *shape = line.split()
        found[name] = (dtype, tuple(map(int, shape)))
    assert len(found) == 46_183
    assert found == published()
