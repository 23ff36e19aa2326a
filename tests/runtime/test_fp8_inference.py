"""Models that hold FP8 weights only: loaded, saved and decoded without another form of them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from backends.build import build
from backends.weights import checkpoint_in, convert
from dsl.load import load
from tests.support.places import TINY

SETS = [
    "precision.policy=fp8_blockwise", "model=fp8_held", "params.q_lora_rank=40",
    "precision.overrides.q_b_proj=bf16", "precision.overrides.shared_experts=bf16",
]  # fmt: skip


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("fp8_held")
    build(load(TINY, sets=SETS), folder / "fp8_held")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module("fp8_held")


@pytest.fixture(scope="module")
def published(package: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as FP8 models are published: E4M3 weights, and scales beside them."""
    folder = tmp_path_factory.mktemp("published") / "bf16"
    package.Model(seed=3).save(folder)
    held = package.load(folder, weights="fp8")
    held.save(folder.with_name("fp8"))
    return folder.with_name("fp8")


TOKENS = torch.randint(512, (2, 20), generator=torch.Generator().manual_seed(0))


def test_files_hold_numbers_and_scales_of_each_published_weight(published: Path) -> None:
    tensors = load_file(published / "model.safetensors")
    name = "model.layers.2.mlp.experts.3.gate_proj.weight"
    weight, scale = tensors[name], tensors[f"{name}_scale_inv"]
    assert (weight.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert list(scale.shape) == [-(-n // 128) for n in weight.shape]
    # Parts that are stored as one have blocks of their own: 40 rows are no whole block.
    assert tensors["model.layers.0.self_attn.q_a_proj.weight_scale_inv"].shape[0] == 1
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    config = (published / "config.json").read_text(encoding="utf-8")
    assert '"weight_block_size"' in config and '"quant_method": "fp8"' in config


def test_what_is_loaded_and_saved_is_the_same_bytes(
    package: Any, published: Path, tmp_path: Path
) -> None:
    report = package.Model(weights="fp8").load(published)
    assert report.dequantized == 0
    package.load(published, weights="fp8").save(tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (published / name).read_bytes()


def test_what_a_spec_keeps_in_bf16_is_kept_by_every_export(published: Path, tmp_path: Path) -> None:
    config = json.loads((published / "config.json").read_text(encoding="utf-8"))
    modules = config["quantization_config"]["modules_to_not_convert"]
    ends = {".".join(name.split(".")[3:]) for name in modules}
    shared = {f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")}
    assert ends == {"self_attn.q_b_proj", *shared} and "modules_to_not_convert" not in config
    tensors = load_file(published / "model.safetensors")
    assert all(tensors[f"{name}.weight"].dtype == torch.bfloat16 for name in modules)

    source = published.with_name("bf16")
    for step, fp8 in (("fp8", True), ("back", False), ("again", True)):
        told = json.loads((source / "config.json").read_text(encoding="utf-8"))
        assert told.get("quantization_config", told)["modules_to_not_convert"] == modules
        convert(
            checkpoint_in(source), tmp_path / step,
            fp8=fp8, first_values=True, max_file=1 << 30, report=lambda _: None,
        )  # fmt: skip
        source = tmp_path / step
        found = load_file(source / "model.safetensors")
        assert (found.keys() == tensors.keys()) is fp8
        if step == "fp8":
            assert all(torch.equal(found[n].float(), t.float()) for n, t in tensors.items())


def test_scores_are_those_of_weights_that_are_quantized_when_they_are_used(
    package: Any, published: Path
) -> None:
    usual = package.load(published.with_name("bf16"))
    held = package.load(published, weights="fp8")
    with torch.no_grad():
        assert torch.equal(held(TOKENS).logits, usual(TOKENS).logits)
        for ours, theirs in zip(held(TOKENS).mtp_logits, usual(TOKENS).mtp_logits, strict=True):
            assert torch.equal(ours, theirs)


def test_nothing_is_quantized_while_a_text_is_continued(
    package: Any, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = package.load(published, weights="fp8")
    fp8 = importlib.import_module(f"{package.__name__}.runtime.fp8")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was quantized")

    for module in held.modules():
        if hasattr(module, "quantize_weight"):
            module.quantize_weight = refuse
    monkeypatch.setattr(fp8, "quantize_weight", refuse)
    assert held.generate(TOKENS[:, :5], max_new_tokens=6).shape == (2, 11)


def test_it_takes_the_memory_that_fp8_says(package: Any, published: Path) -> None:
    usual, held = package.load(published.with_name("bf16")), package.load(published, weights="fp8")

    def size(model: Any) -> int:
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

    held_in_fp8 = [b for b in held.buffers() if b.dtype == torch.float8_e4m3fn]
    assert len(held_in_fp8) > 20
    saved = sum(b.nbytes for b in held_in_fp8)
    scales = sum(b.nbytes for n, b in held.named_buffers() if n.endswith("weight_scale_inv"))
    assert size(held) == size(usual) - saved + scales


@pytest.mark.slow
def test_a_change_of_weights_reaches_those_that_are_multiplied_out(
    package: Any, published: Path, tmp_path: Path
) -> None:
    held = package.load(published, weights="fp8")
    before = held.generate(TOKENS[:, :5], max_new_tokens=6)
    package.Model(seed=8).save(tmp_path / "other")
    held.load(tmp_path / "other")
    fresh = package.load(tmp_path / "other", weights="fp8")
    after = held.generate(TOKENS[:, :5], max_new_tokens=6)
    assert torch.equal(after, fresh.generate(TOKENS[:, :5], max_new_tokens=6))
    assert not torch.equal(after, before)


def test_its_state_is_what_its_files_hold(package: Any, published: Path) -> None:
    held = package.load(published, weights="fp8")
    state = held.state_dict()
    tensors = load_file(published / "model.safetensors")
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[n].float(), t.float()) for n, t in tensors.items())
    other = package.Model(seed=4, weights="fp8")
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other(TOKENS).logits, held(TOKENS).logits)


def test_it_moves_without_changing_its_types(package: Any) -> None:
    held = package.Model(seed=4, weights="fp8").float().bfloat16()
    weight = held.model.layers[0].self_attn.o_proj.weight
    assert weight.dtype == torch.float8_e4m3fn and not weight.requires_grad


def test_training_says_why_it_cannot_be(package: Any) -> None:
    held = package.Model(weights="fp8")
    with pytest.raises(ValueError, match="make one without `weights`"):
        held.loss(TOKENS[:, :-1], TOKENS[:, 1:])


@pytest.mark.slow
def test_a_model_without_fp8_products_says_so(tmp_path: Path) -> None:
    build(load(TINY, sets=["model=no_fp8"]), tmp_path / "no_fp8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        module = importlib.import_module("no_fp8")
    with pytest.raises(ValueError, match="fp8_blockwise"):
        module.Model(weights="fp8")
