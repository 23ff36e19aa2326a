"""Runs that begin with weights that were given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.places import TEXT
from tests.support.trained import built, part, published, trainer


def weights(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def test_masters_biases_and_average_begin_with_the_weights_unrounded(tmp_path: Path) -> None:
    """Of a model in BF16, from float32, with one tensor in FP8 as published weights have them."""
    package = built(tmp_path, "tiny_started", precision__policy="bf16", train__ema="0.9")
    given = {
        p.name: torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        for number, p in enumerate(published(package, package.Model(device="meta")))
    }
    name = "model.layers.0.mlp.down_proj.weight"
    quantized = given[name].to(torch.float8_e4m3fn)
    given[name] = quantized.float() * 2
    shape = [-(-n // 128) for n in quantized.shape]
    scales = {f"{name}_scale_inv": torch.full(shape, 2.0)}
    (tmp_path / "given").mkdir()
    save_file({**given, name: quantized, **scales}, tmp_path / "given" / "model.safetensors")

    one = trainer(package)
    part(package, "state").load_weights(one, tmp_path / "given")
    tensors = part(package, "state").training_state(one).tensors
    assert tensors["model"].keys() == tensors["ema"].keys() == given.keys()
    for key, value in given.items():
        assert torch.equal(tensors["model"][key], value), key
        assert torch.equal(tensors["ema"][key], value), key
    for entry in published(package, one.model):
        assert torch.equal(entry.tensor, given[entry.name].to(entry.dtype)), entry.name
    assert one.model.dtype == torch.bfloat16


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def run(package: Any, out: Path, *words: str | Path) -> int:
    status: int = part(package, "command").main(
        package.Model, ["--out", str(out), *map(str, words)]
    )
    return status


def test_a_run_begins_with_given_weights_and_stays_with_them(
    package: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_bytes(TEXT.read_bytes()[:3000])
    assert run(package, tmp_path / "before", "--data", text, "--held-out", "0", "--seed", "1") == 0
    given = tmp_path / "given"
    shutil.copytree(tmp_path / "before" / "checkpoints" / "step-00000006" / "model", given)
    words = ["--data", text, "--held-out", "0", "--seed", "1"]
    assert run(package, out, *words, "--weights", given, "--save-every", "1", "--keep", "9") == 0
    assert json.loads((out / "run.json").read_text())["weights"] == str(given)
    ours, theirs = (lines(folder)[0] for folder in (out, tmp_path / "before"))
    assert ours["main"] < theirs["main"] - 0.5  # the same batch, by a model that knows it
    first = weights(out / "checkpoints" / "step-00000001" / "model")
    before = weights(given)
    # The first step of AdamW moves a number by the learning rate, and by what decays of it.
    for name in before.keys() - {n for n in before if "bias" in n}:
        assert (first[name] - before[name]).abs().max() <= 1.2 * ours["learning_rate"], name

    given.rename(tmp_path / "moved")
    assert run(package, out) == 0  # goes on without them
    capsys.readouterr()
    assert run(package, out, "--weights", tmp_path / "moved") == 1
    assert f"was started with --weights {given}, not" in capsys.readouterr().err
    assert run(package, tmp_path / "before", "--weights", tmp_path / "moved") == 1
    assert "was started without --weights, not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda all: all.pop("model.layers.2.eh_proj.weight"), "missing: model.layers.2.eh_proj"),
        (lambda all: all.update(more=torch.zeros(2)), "not a tensor of this model: more"),
        (lambda all: all.update({"model.norm.weight": torch.zeros(2)}), "of shape [2], the model"),
    ],
)
def test_weights_that_are_not_all_of_the_model(
    package: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    """They leave nothing that is in the way of another attempt."""
    package.Model(seed=3).save(tmp_path / "given")
    tensors = load_file(tmp_path / "given" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "given" / "model.safetensors")
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT.read_bytes()[:3000])
    words = ["--data", text, "--weights", tmp_path / "given"]
    assert run(package, tmp_path / "run", *words) == 1
    assert message in capsys.readouterr().err
    package.Model(seed=3).save(tmp_path / "given")
    assert run(package, tmp_path / "run", *words) == 0
