"""Weights out of built models and into transformers, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backends.build import build
from backends.weights import checkpoint_in, convert
from dsl.diagnostic import DiagnosticError
from dsl.load import load
from tests.support.oracle import import_package
from tests.support.places import TINY

TOKENS = torch.randint(512, (2, 24), generator=torch.manual_seed(0))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("weights") / "weights_tiny"
    # No blocks of 128 that are cut off: transformers takes them to be equal parts of a weight.
    sets = ["architecture.layers.0.feed_forward=SwiGLU(intermediate_size=hidden_size * 2)"]
    build(load(TINY, sets=sets), folder)
    return import_package(folder, "weights_tiny")


@pytest.fixture(scope="module")
def saved(package: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights all differ from their first values, large enough that they matter."""
    model = package.Model(seed=3)
    generator = torch.Generator().manual_seed(4)
    for name, tensor in model.state_dict().items():
        if name not in model.aliases:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_(noise * 0.1)
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save(folder)
    return folder


def converted(source: Path, target: Path, *, fp8: bool = False) -> Path:
    convert(
        checkpoint_in(source),
        target,
        fp8=fp8,
        first_values=False,
        max_file=300_000,
        report=lambda _: None,
    )
    return target


def state(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [n for n in a if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])]


@pytest.mark.slow
def test_an_export_in_bf16_has_the_weights_and_comes_back(
    package: ModuleType, saved: Path, tmp_path: Path
) -> None:
    out = converted(saved, tmp_path / "out")
    model = package.Model(dtype=torch.float32)
    model.load(saved)
    exported = state(out)
    # Rounded; but for what a model in bf16 has in float32, too.
    bias = {n for n in exported if n.endswith("e_score_correction_bias")}
    assert len(bias) == 4 and {exported[n].dtype for n in bias} == {torch.float32}
    assert_same(
        exported,
        {n: t if n in bias else t.bfloat16() for n, t in model.state_dict().items()},
    )
    assert exported.keys() >= model.aliases.keys()
    back = converted(out, tmp_path / "back")
    assert_same(state(back), exported)
    config = json.loads((out / "config.json").read_text())
    assert config == {**package.Model.hf_config, "dtype": "bfloat16"}


@pytest.mark.slow
def test_transformers_computes_the_same_from_an_export(
    package: ModuleType, saved: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    out = converted(saved, tmp_path / "out")
    peer, told = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not told["missing_keys"] and not told["mismatched_keys"]
    assert all(
        name.startswith(("model.layers.3.", "model.layers.4.")) for name in told["unexpected_keys"]
    )
    model = package.Model(dtype=torch.float32)
    model.load(out)
    with torch.no_grad():
        expected, found = peer.eval()(TOKENS).logits, model(TOKENS).logits
    # Sums of float32 in another order; the logits are about 3.
    assert (found - expected).abs().max() < 1e-4 and expected.abs().max() > 1


@pytest.mark.slow
def test_transformers_multiplies_fp8_out_as_an_import_does(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    # It asks for accelerate, which it needs for GPUs only.
    quantizer = "transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available"
    monkeypatch.setattr(quantizer, lambda: True)
    out = converted(saved, tmp_path / "out", fp8=True)
    back = converted(out, tmp_path / "back")
    peers = [
        transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (out, back)
    ]
    assert len(peers[0]) > 40
    assert_same(*peers)


def test_an_export_in_fp8_says_what_serving_engines_ask_for(saved: Path, tmp_path: Path) -> None:
    out = converted(saved, tmp_path / "out", fp8=True)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["num_nextn_predict_layers"] == 2
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }
    tensors = state(out)
    quantized = {n for n, t in tensors.items() if t.dtype == torch.float8_e4m3fn}
    assert {n for n in tensors if n.endswith("_scale_inv")} == {f"{n}_scale_inv" for n in quantized}
    kinds = {name.rpartition(".weight")[0].rpartition(".")[2] for name in quantized}
    assert kinds == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
        "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    again = converted(out, tmp_path / "bf16")
    assert "quantization_config" not in json.loads((again / "config.json").read_text())


def test_powers_of_two_where_the_config_asks_for_them(saved: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    save_file(load_file(saved / "model.safetensors"), source / "model.safetensors")
    config = json.loads((saved / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": fp8}))
    out = converted(source, tmp_path / "out", fp8=True)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["scale_fmt"] == (
        "ue8m0"
    )
    scales = [t for n, t in state(out).items() if n.endswith("_scale_inv")]
    assert scales and all((t.log2() == t.log2().round()).all() for t in scales)


@pytest.mark.slow
def test_powers_of_two_are_remembered_beside_weights_in_bf16(saved: Path, tmp_path: Path) -> None:
    """FP8 in, as DeepSeek-V3.1, and out again by way of BF16."""
    config = json.loads((saved / "config.json").read_text())
    source = tmp_path / "in"
    source.mkdir()
    save_file(load_file(saved / "model.safetensors"), source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({**config, "scale_fmt": "ue8m0"}))
    fp8 = converted(source, tmp_path / "fp8", fp8=True)
    bf16 = converted(fp8, tmp_path / "bf16")
    kept = json.loads((bf16 / "config.json").read_text())
    assert kept["scale_fmt"] == "ue8m0" and "quantization_config" not in kept
    again = converted(bf16, tmp_path / "again", fp8=True)
    kept = json.loads((again / "config.json").read_text())
    assert kept["quantization_config"]["scale_fmt"] == "ue8m0" and "scale_fmt" not in kept
    scales = [t for n, t in state(again).items() if n.endswith("_scale_inv")]
    assert scales and all((t.log2() == t.log2().round()).all() for t in scales)


@pytest.mark.parametrize("scale", ["ue8m0", "fp32", "recipe"])
def test_a_spec_of_bf16_says_how_scales_are_exported(scale: str, saved: Path) -> None:
    sets = [f"precision.scale_format={scale}"]
    found = checkpoint_in(saved, load(TINY, sets=sets))
    assert found.scale == ("ue8m0" if scale == "ue8m0" else "fp32")


def test_files_beside_go_along_and_code_does_not(saved: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    save_file(load_file(saved / "model.safetensors"), source / "model.safetensors")
    config = json.loads((saved / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling.DeepseekV3"}
    (source / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "generation_config.json", "modeling.py"):
        (source / name).write_bytes(b"\xff precious")
    out = converted(source, tmp_path / "out")
    assert (out / "tokenizer.json").read_bytes() == b"\xff precious"
    assert (out / "generation_config.json").exists() and not (out / "modeling.py").exists()
    assert "auto_map" not in json.loads((out / "config.json").read_text())


@pytest.mark.slow
def test_a_changed_byte_is_told_with_a_way_out(saved: Path, tmp_path: Path) -> None:
    out = converted(saved, tmp_path / "out")
    file = next(out.glob("model-00002-*"))
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DiagnosticError) as caught:
        converted(out, tmp_path / "again")
    (problem,) = caught.value.diagnostics
    assert "has other bytes than audit.json" in problem.message
    assert "move audit.json away" in problem.help
    (out / "audit.json").unlink()
    converted(out, tmp_path / "other")


def test_problems_are_told_by_kind(package: ModuleType, tmp_path: Path) -> None:
    model: Any = package.Model(seed=3)
    model.save(tmp_path / "new")
    with pytest.raises(DiagnosticError) as caught:
        converted(tmp_path / "new", tmp_path / "out")
    told = {d.message: d for d in caught.value.diagnostics}
    message = (
        "model.layers.{1..4}.mlp.gate.e_score_correction_bias (4): left at its initial value, 0"
    )
    assert told[message].code == "E610" and "--first-values" in told[message].help
    assert "model.norm.weight: left at its initial value, 1" in told
