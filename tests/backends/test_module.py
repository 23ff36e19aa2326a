"""A generated model behaves as people expect of an nn.Module that is being trained."""

from __future__ import annotations

import copy
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backends.build import build
from compiler.parallel.layout import units
from compiler.pipeline import after, compile
from compiler.plan.saved import activations
from dsl.load import load
from tests.interpret import random_weights, run
from tests.support.places import TINY

TOKENS = torch.randint(512, (2, 12), generator=torch.manual_seed(0))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("module")
    build(load(TINY), folder / "tiny_module")
    sys.path.insert(0, str(folder))
    yield importlib.import_module("tiny_module")
    sys.path.remove(str(folder))


@pytest.fixture
def model(package: Any) -> Any:
    return package.Model(dtype=torch.float64, seed=1)


def loss(model: Any) -> Tensor:
    total: Tensor = model.loss(TOKENS[:, :-1], TOKENS[:, 1:]).total
    return total


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of a fresh backward pass; those of the model stay as they were."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss(model), parameters), strict=True))


def same(model: Any, expected: dict[str, Tensor], times: float = 1) -> None:
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, times * expected[name], msg=name)


@pytest.mark.slow
def test_gradients_are_those_of_the_unfused_graph(package: Any) -> None:
    """In float32, against torch's autograd through the lowered graph in float64."""
    lowered = after(load(TINY), "train", "lower")
    weights = random_weights(lowered, dtype=torch.float64)
    model = package.Model()
    copies = {copy: weights[original] for copy, original in lowered.aliases.items()}
    model.load_state_dict({**weights, **copies})
    loss(model).backward()
    published = importlib.import_module("tiny_module.runtime.weights").published
    found = {part.name: part.grad for part in published(model)}
    leaves = {n: t.requires_grad_() for n, t in weights.items() if "correction_bias" not in n}
    schedule = model.config.train.loss
    inputs = {
        "tokens": TOKENS[:, :-1],
        "labels": TOKENS[:, 1:],
        "position": torch.arange(11).expand(2, 11),
        "mtp_weight": torch.tensor(schedule.mtp_weight.value_at(0), dtype=torch.float64),
        "balance_alpha": torch.tensor(schedule.balance_alpha, dtype=torch.float64),
    }
    results = run(lowered, inputs, weights, dtype=torch.float64)
    total = results[lowered.main.result_names.index("total")]
    expected = torch.autograd.grad(total, [*leaves.values()])
    for name, gradient in zip(leaves, expected, strict=True):
        error = (found[name] - gradient).abs().max()
        assert error <= 1e-5 * gradient.abs().max(), name


def test_gradients_are_those_that_autograd_gives_and_add_up(model: Any) -> None:
    expected = gradients(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    loss(model).backward()
    same(model, expected)
    loss(model).backward()
    same(model, expected, 2)
    model.zero_grad()
    total = 3 * loss(model)
    total.backward(retain_graph=True)
    total.backward()
    same(model, expected, 6)


def test_a_module_without_a_position_counts_as_no_loss(model: Any) -> None:
    """Two tokens, and a second MTP module that needs three; its weights get no gradient."""
    depth = model.config.architecture.mtp.depth
    found = model.loss(TOKENS[:, :depth], TOKENS[:, 1 : depth + 1])
    found.total.backward()
    assert found.total.isfinite() and found.mtp[0] > 0 and found.mtp[depth - 1] == 0
    last = model.model.layers[-1]
    assert all(not p.grad.any() for p in last.parameters() if p.grad is not None)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_two_losses_before_one_backward_do_not_mix(model: Any) -> None:
    expected = gradients(model)
    other = model.loss(TOKENS[:1, :5], TOKENS[:1, 1:6]).total
    first = loss(model)
    other.backward()
    model.zero_grad()
    first.backward()
    same(model, expected)


def test_losses_of_which_total_is_the_sum_have_gradients_of_their_own(model: Any) -> None:
    found = model.loss(TOKENS[:, :-1], TOKENS[:, 1:])
    weight = model.lm_head.weight
    (main,) = torch.autograd.grad(found.main, weight, retain_graph=True)
    (total,) = torch.autograd.grad(found.total, weight)
    assert main.abs().sum() > 0 and not torch.allclose(main, total)


def test_without_grad_the_loss_is_the_same_and_remembers_nothing(model: Any) -> None:
    with torch.no_grad():
        silent = loss(model)
    with torch.inference_mode():
        inference = loss(model)
    assert not silent.requires_grad and torch.equal(silent, loss(model).detach())
    assert torch.equal(inference, silent)


def test_a_frozen_weight_has_no_gradient_and_changes_no_other(model: Any) -> None:
    expected = gradients(model)
    frozen = [n for n, _ in model.named_parameters() if "layers.1." in n or "embed" in n]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    loss(model).backward()
    assert len(frozen) > 5
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_bring_the_loss_down(model: Any, name: str) -> None:
    optimizer = OPTIMIZERS[name](model.parameters())
    first = loss(model).item()
    for _ in range(15):
        optimizer.zero_grad()
        loss(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss(model).item() < 0.8 * first


def test_hooks_of_parameters_see_and_change_gradients(model: Any) -> None:
    expected = gradients(model)
    done: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad: 2 * grad)
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: done.append(name))
    loss(model).backward()
    same(model, expected, 2)
    assert sorted(done) == sorted(expected)


def test_hooks_of_layers_see_what_goes_in_and_out_both_ways(model: Any) -> None:
    forward: list[tuple[int, Tensor]] = []
    backward: list[tuple[int, Tensor, Tensor]] = []
    for i, layer in enumerate(model.model.layers[:3]):
        layer.register_forward_hook(
            lambda _, given, out, i=i: forward.append((i, first_of(out).detach().clone()))
        )
        layer.register_full_backward_hook(
            lambda _, into, out, i=i: backward.append((i, first_of(into), first_of(out)))
        )
    loss(model).backward()
    assert [i for i, _ in forward] == [0, 1, 2]
    assert [i for i, *_ in backward] == [2, 1, 0]
    for (_, into, _), (_, _, out) in itertools.pairwise(backward):
        assert into.abs().sum() > 0 and torch.equal(into, out)


def test_a_hook_may_change_what_a_layer_gives(model: Any) -> None:
    layer = model.model.layers[2]
    handle = layer.register_forward_hook(
        lambda _, given, out: 0 * out if isinstance(out, Tensor) else (0 * out[0], *out[1:])
    )
    loss(model).backward()
    down_proj = layer.mlp.shared_experts.down_proj.weight
    assert not down_proj.grad.abs().sum()
    handle.remove()
    loss(model).backward()
    assert down_proj.grad.abs().sum() > 0


def test_hooks_inside_a_layer_run_for_scores_and_not_in_training(model: Any) -> None:
    """The backward pass is generated: what such a hook changes would have no gradient."""
    seen: list[Any] = []
    model.model.layers[2].mlp.register_forward_hook(lambda *_: seen.append(1))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    model(tokens)
    assert len(seen) == 1
    loss(model).backward()
    assert len(seen) == 1


def test_a_layer_with_experts_gives_balance_and_load_in_training_only(model: Any) -> None:
    layer = model.model.layers[2]
    dtype = layer.input_layernorm.weight.dtype
    x = torch.randn(1, 4, model.config.params.hidden_size).to(dtype)
    cos = torch.ones(1, 4, model.config.params.qk_rope_head_dim // 2)
    _, balance, load = layer(x, cos, 0 * cos)
    assert balance is None and load is None
    _, balance, load = layer(x, cos, 0 * cos, train=True)
    assert balance.shape == () and load.sum() == 4 * model.config.params.num_experts_per_tok


def first_of(value: Any) -> Any:
    """The hidden states, where a module gives losses beside them."""
    return value if isinstance(value, Tensor) else value[0]


def test_a_copy_is_a_model_of_its_own(model: Any) -> None:
    expected = gradients(model)
    other = copy.deepcopy(model)
    loss(other).backward()
    same(other, expected)
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert model.lm_head.weight.abs().sum() > 0


def test_state_goes_from_one_model_to_another(package: Any, model: Any) -> None:
    other = package.Model(dtype=torch.float64, seed=2)
    assert not torch.equal(loss(other), loss(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(loss(other), loss(model))
    loss(other).backward()
    same(other, gradients(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_model_under_checkpoint_has_the_same_gradients(model: Any, reentrant: bool) -> None:
    expected = gradients(model)
    # The reentrant kind asks for an argument with a gradient.
    start = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def run(start: Tensor) -> Tensor:
        return start + loss(model)

    checkpoint(run, start, use_reentrant=reentrant).backward()
    same(model, expected)


def test_autocast_leaves_training_in_the_precision_of_the_spec(model: Any) -> None:
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss(model).backward()
    same(model, expected)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.self_attn.o_proj.weight"])
def test_a_weight_that_changes_before_the_backward_pass_is_noticed(model: Any, name: str) -> None:
    total = loss(model)
    with torch.no_grad():
        model.get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_weights_that_are_replaced_before_the_backward_pass_are_refused(model: Any) -> None:
    class Objective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return loss(self.model)

    objective = Objective()
    others = {n: p.detach().clone().requires_grad_() for n, p in objective.named_parameters()}
    total = torch.func.functional_call(objective, others, ())
    with pytest.raises(RuntimeError, match="functional_call does: keep them"):
        total.backward()


def test_kept_values_may_be_moved_away(model: Any) -> None:
    expected = gradients(model)
    with torch.autograd.graph.save_on_cpu():
        total = loss(model)
    total.backward()
    same(model, expected)


@pytest.mark.slow
def test_what_stands_between_layers_may_have_no_gradient(tmp_path: Path) -> None:
    """Layers with a rotary table of their own, which is made right before them."""
    sets = [
        "blocks=[causal_lm, decoder, mla, mha, swiglu]",
        "params={vocab_size: 512, hidden_size: 16, num_attention_heads: 2, head_dim: 6, "
        "q_lora_rank: 8, kv_lora_rank: 8, qk_nope_head_dim: 4, qk_rope_head_dim: 4, "
        "v_head_dim: 4, intermediate_size: 24}",
        "architecture={layers: [{repeat: 1, attention: MLA, feed_forward: SwiGLU}, "
        "{repeat: 1, attention: MHA, feed_forward: SwiGLU}]}",
        "train={}",
    ]
    build(load(TINY, sets=sets), tmp_path / "two_tables")
    sys.path.insert(0, str(tmp_path))
    try:
        model = importlib.import_module("two_tables").Model(dtype=torch.float64)
    finally:
        sys.path.remove(str(tmp_path))
    loss(model).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["bf16", "fp8_blockwise"])
def test_what_products_wait_with_is_what_plans_count(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte; without MTP, whose sequences are shorter and are counted as long."""
    name = f"tiny_waits_{policy}"
    changes = [f"precision.policy={policy}", "architecture.mtp={depth: 0}", f"model={name}"]
    description = load(TINY, sets=changes)
    build(description, tmp_path / name)
    monkeypatch.syspath_prepend(tmp_path)
    parts = (name, f"{name}.runtime.unit", f"{name}.runtime.saved")
    made, unit, saved = map(importlib.import_module, parts)
    products, tokens = saved.Deferred(), torch.randint(512, (2, 129))
    with unit.deferring(products):
        made.Model(seed=0).loss(tokens[:, :-1], tokens[:, 1:]).total.backward()
    given = [(*product.args, *product.keywords.values()) for _, product in products._waiting]
    held = {t.data_ptr(): t for one in given for t in one if isinstance(t, Tensor)}
    sizes = {"batch": 2, "seq": 128, "context": 128}
    program = compile(description).programs["train"]
    counted = (activations(program, one, sizes).operands for one in units(program.main))
    assert sum(t.untyped_storage().nbytes() for t in held.values()) == sum(counted)
