"""The tensors of checkpoints: the counts of DeepSeek-V3's, and those of models as built."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest

from backends.build import build
from backends.read import read_build
from compiler.lower import lower
from compiler.published import Published, kept_modules, published
from dsl.load import load
from tests.support.places import SPECS

DTYPES = {"f32": "torch.float32", "bf16": "torch.bfloat16"}


@pytest.mark.slow
def test_kept_modules_are_all_experts_of_a_layer_or_those_that_are() -> None:
    def tensor(name: str, fp8: bool) -> Published:
        return Published(f"{name}.weight", (1,), "bf16", 0.0, 0.0, True, fp8, kept=not fp8)

    names = [f"1.experts.{e}.{part}" for e in (0, 1) for part in ("up", "down")]
    found = [tensor(name, False) for name in ("0.o_proj", *names)]
    found += [tensor(name.replace("1.", "2.", 1), name.endswith("up")) for name in names]
    assert kept_modules(found) == [
        "0.o_proj", "1.experts", "2.experts.0.down", "2.experts.1.down"
    ]  # fmt: skip


def test_deepseek_v3_has_the_tensors_that_were_published() -> None:
    """Counts of the released files: tensors with their scales, elements by type."""
    tensors = list(published(lower(load(SPECS / "deepseek_v3.yaml"))))
    quantized = [one for one in tensors if one.fp8]
    assert (len(tensors) + len(quantized), len(quantized)) == (91_991, 45_808)
    assert sum(math.prod(one.shape) for one in quantized) == 680_571_043_840
    bf16 = [one for one in tensors if not one.fp8 and one.dtype == "bf16"]
    assert sum(math.prod(one.shape) for one in bf16) == 3_918_786_560
    blocks = [math.prod(-(-n // 128) for n in one.shape) for one in quantized]
    biases = [one for one in tensors if one.dtype == "f32"]
    assert {one.name.rpartition(".")[2] for one in biases} == {"e_score_correction_bias"}
    assert sum(blocks) + sum(math.prod(one.shape) for one in biases) == 41_555_600
    by_name = {one.name: one for one in tensors}
    assert by_name["model.layers.61.shared_head.head.weight"].copy_of == "lm_head.weight"
    assert by_name["model.layers.60.mlp.experts.255.down_proj.weight"].shape == (7168, 2048)
    assert not by_name["model.layers.61.eh_proj.weight"].fp8
    order = list(by_name)
    expert = "model.layers.3.mlp.experts.{}_proj.weight"
    first = order.index(expert.format("0.gate"))
    after = [expert.format(n) for n in ("0.gate", "0.up", "0.down", "1.gate")]
    assert order[first : first + 4] == after


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sets"),
    [
        ("deepseek_v3_tiny", []),
        ("deepseek_v3_tiny", ["precision.policy=fp8_blockwise"]),
        ("deepseek_v3_tiny", ["precision.policy=bf16", "params.tie_word_embeddings=true"]),
        ("deepseek_v2_lite", []),
    ],
)
def test_they_are_those_of_the_built_model(tmp_path: Path, name: str, sets: list[str]) -> None:
    description = load(SPECS / f"{name}.yaml", sets=sets)
    package = f"published_{tmp_path.name}"
    build(description, tmp_path / package)
    sys.path.insert(0, str(tmp_path))
    model = importlib.import_module(package).Model(device="meta")
    sys.path.remove(str(tmp_path))
    expected = {
        part.name: (part.shape, str(part.dtype), part.declaration.value, part.declaration.std)
        for part in sys.modules[f"{package}.runtime.weights"].published(model)
    }
    tensors = list(published(lower(description)))
    found = {
        one.name: (one.shape, DTYPES[one.dtype], one.value, one.std)
        for one in tensors
        if not one.copy_of
    }
    assert found == expected
    assert {one.name: one.copy_of for one in tensors if one.copy_of} == model.aliases
    assert list(published(read_build(tmp_path / package).lowered)) == tensors
