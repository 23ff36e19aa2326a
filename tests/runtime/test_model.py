"""A model as a whole: construction, names, loss and its gradient, against transformers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from runtime.weights import published
from tests.support.tiny import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(dtype=torch.float32, seed=3)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 96, shape, generator=torch.Generator().manual_seed(seed))


def test_the_dtype_is_the_specs_unless_given() -> None:
    assert Model(device="meta").dtype == torch.bfloat16
    assert Model(device="meta", dtype=torch.float64).dtype == torch.float64
    bias = Model().model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32


def test_building_leaves_no_trace_in_torchs_defaults() -> None:
    Model(dtype=torch.float64)
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(1).device.type == "cpu"


def test_a_meta_model_has_shapes_but_no_values() -> None:
    meta, real = Model(device="meta"), Model()
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    shapes = {name: tensor.shape for name, tensor in real.state_dict().items()}
    assert {name: tensor.shape for name, tensor in meta.state_dict().items()} == shapes


def test_seeds_repeat() -> None:
    a, b, c = (Model(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_state_dict_holds_the_copies_as_the_same_tensor(model: Model) -> None:
    state = model.state_dict()
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in state
    for name, original in Model.aliases.items():
        assert state[name].data_ptr() == state[original].data_ptr()
    assert len(state) == len(list(published(model))) + 2


def test_state_dict_round_trip_with_and_without_copies(model: Model) -> None:
    state, other = model.state_dict(), Model(dtype=torch.float32, seed=9)
    other.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    other.load_state_dict({n: t for n, t in state.items() if n not in Model.aliases})


def test_a_copy_that_differs_is_refused(model: Model) -> None:
    state = copy.deepcopy(model.state_dict())
    state["model.layers.2.embed_tokens.weight"] = state["lm_head.weight"]
    with pytest.raises(RuntimeError, match=r"differs from model\.embed_tokens\.weight"):
        Model(dtype=torch.float32).load_state_dict(state)


def test_to_casts_all_but_the_gates_bias(model: Model) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    kept = {n for n, t in half.state_dict().items() if t.dtype != torch.bfloat16}
    assert kept == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)}


def test_loss_has_parts_that_add_up(model: Model) -> None:
    text = tokens(2, 33)
    x, y = text[:, :-1], text[:, 1:]
    out = model(x)
    early, late = (model.loss(x, y, tokens_seen=seen) for seen in (0, 1000))
    expected = cross_entropy(out.logits.flatten(0, 1), y.flatten())
    assert early.main.item() == pytest.approx(expected.item(), rel=1e-5)
    for loss, weight in ((early, 0.3), (late, 0.1)):
        parts = loss.main + weight * loss.mtp[0] + 0.01 * loss.balance
        assert loss.total.item() == pytest.approx(parts.item(), rel=1e-6)
    (load,) = early.load
    assert load.sum(-1).tolist() == [2 * 32 * 2, 2 * 31 * 2]


def test_every_parameter_gets_a_gradient(model: Model) -> None:
    fresh = copy.deepcopy(model)
    text = tokens(4, 33)
    fresh.loss(text[:, :-1], text[:, 1:]).total.backward()
    dead = [p.name for p in published(fresh) if p.storage.requires_grad and not p.grad.any()]
    assert not dead


@pytest.mark.slow
def test_transformers_loads_what_save_wrote(model: Model, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model.save(tmp_path / "saved")
    peer, info = transformers.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert peer.dtype == torch.float32
    assert not info["missing_keys"] and not info["mismatched_keys"]
    # It knows no MTP: that layer, and only that, is left over.
    assert {name.split(".")[2] for name in info["unexpected_keys"]} == {"2"}
    text = tokens(2, 40)
    with torch.no_grad():
        ours, theirs = model(text).logits, peer(text).logits
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5
    greedy = peer.generate(text, max_new_tokens=64, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(text, 64, eos_token_id=None), greedy)
