"""A whole model whose every kernel is interpreted, against the same model in torch."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from backends.build import build
from backends.triton.target import TARGETS
from dsl.load import load
from tests.support.interpreter import repair
from tests.support.places import ROOT

SPECS = {
    "tiny_bf16": (
        "specs/deepseek_v3_tiny.yaml",
        ["precision.policy=bf16", "train.saved_formats={attention: e5m6, experts: fp8}"],
    ),
    "tiny_fp8": ("specs/deepseek_v3_tiny.yaml", ["precision.policy=fp8_blockwise"]),
    # A window in one layer, and documents.
    "sinks_bf16": (
        "specs/examples/sinks.yaml",
        ["precision.policy=bf16", "train={document_mask: true}"],
    ),
}


@pytest.fixture(scope="module", params=SPECS)
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The build of a tiny model with kernels, imported."""
    repair()
    name, folder = f"kernels_{request.param}", tmp_path_factory.mktemp("built")
    spec, sets = SPECS[request.param]
    # A layer of each kind is enough: others would be interpreted alike.
    sets = [f"model={name}", "architecture.layers.1.repeat=1", *sets]
    description = load(ROOT / spec, sets=sets)
    build(description, folder / name, target=TARGETS["sm_90"])
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def interpret(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on kernels serve the CPU, too."""
    dispatch = sys.modules[f"{package.__name__}.runtime.dispatch"]
    monkeypatch.setattr(dispatch, "serves", lambda target, device: True)


def model_of(package: ModuleType) -> torch.nn.Module:
    """A model whose experts are not chosen by a rounding: biases are further apart than scores."""
    model: torch.nn.Module = package.Model(device="cpu", dtype=torch.bfloat16, seed=0)
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.linspace(0, 1, len(tensor)).roll(5))
    return model


def batch(model: torch.nn.Module, tokens: int) -> Tensor:
    vocab = int(model.config.params.vocab_size)  # type: ignore[union-attr]
    return torch.randint(vocab, (2, tokens), generator=torch.Generator().manual_seed(0))


def gradients(package: ModuleType) -> tuple[float, dict[str, Tensor]]:
    model = model_of(package)
    tokens = batch(model, 17)
    position = torch.arange(16).remainder(10).expand(2, -1)
    loss = model.loss(tokens[:, :-1], tokens[:, 1:], position=position)  # type: ignore[operator]
    loss.total.backward()
    found = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.total.detach()), found


@pytest.mark.slow
def test_training(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, expected_grads = gradients(package)
    interpret(package, monkeypatch)
    loss, grads = gradients(package)
    assert loss == pytest.approx(expected, rel=1e-3)
    assert grads.keys() == expected_grads.keys()
    # Roundings to bfloat16 fall otherwise; a wrong kernel is off by far more. FP8 makes more of
    # them: one column of the embedding a bit off moves the reference's own gradients by 5 % in all,
    # and by 28 % those of an expert that a token then goes to, or not. There the whole is compared.
    whole = torch.cat([gradient.flatten() for gradient in expected_grads.values()])
    found = torch.cat([grads[name].flatten() for name in expected_grads])
    assert (found - whole).norm() < 0.08 * whole.norm()
    if package.__name__.endswith("fp8"):
        return
    for name, gradient in expected_grads.items():
        difference = (grads[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert difference < 0.03, (name, float(difference))


@pytest.mark.slow
def test_generation(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(package)
    tokens = batch(model, 9)
    with torch.no_grad():
        expected = model(tokens).logits.float()
        interpret(package, monkeypatch)
        found = model(tokens).logits.float()
        cache = sys.modules[f"{package.__name__}.runtime.cache"].Cache(2, 16)
        position = torch.arange(9).expand(2, 9)
        last = model.prefill(tokens[:, :8], position[:, :8], cache)  # type: ignore[operator]
        step = model.decode(tokens[:, 8:], position[:, 8:], cache)  # type: ignore[operator]
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 0.03 * scale
    assert (last.float() - expected[:, 7]).abs().max() < 0.03 * scale
    assert (step.float() - expected[:, 8]).abs().max() < 0.03 * scale


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, {name} as v3
model = v3.Model(device="cpu", dtype=torch.bfloat16, seed=0)
tokens = torch.randint(512, (2, 17), generator=torch.manual_seed(0))
loss = model.loss(tokens[:, :-1], tokens[:, 1:])
loss.total.backward()
print(repr(float(loss.total.detach())))
"""


@pytest.mark.slow
def test_without_triton_or_gpu_it_is_the_build_without_kernels(tmp_path: Path) -> None:
    """The same bits of the loss, in a process that has no Triton."""
    losses = []
    for name, target in (("with_kernels", TARGETS["sm_90"]), ("without", None)):
        sets = [f"model={name}", "precision.policy=fp8_blockwise"]
        build(load(ROOT / "specs/deepseek_v3_tiny.yaml", sets=sets), tmp_path / name, target=target)
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TRITON.format(name=name)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        losses.append(done.stdout)
    assert losses[0] == losses[1]
