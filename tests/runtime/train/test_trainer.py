"""Steps of training, against plain loops of torch and few-line definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.train.balance import utilization
from tests.support.trained import MASK, built, part, published, trainer


def batch(one: Any, first: int, count: int) -> Tensor:
    return torch.stack([one.sequences[i] for i in range(first, first + count)])


def test_steps_are_those_of_a_plain_loop(package: Any) -> None:
    """torch's AdamW and clipping, whole batches, in float32: also the routing bias."""
    one, model = trainer(package, seed=1), package.Model(seed=1)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.9, 0.95),
    )
    for step in range(5):
        tokens = batch(one, 6 * step, 6)
        loss = model.loss(tokens[:, :-1], tokens[:, 1:], tokens_seen=6 * 16 * step)
        loss.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        move_bias(model, loss.load)
        did = one.step()
        assert did.total == pytest.approx(loss.total.item(), rel=1e-5)
        assert did.main == pytest.approx(loss.main.item(), rel=1e-5)
        assert did.gradient_norm == pytest.approx(float(norm), rel=1e-4)
        assert did.tokens == 6 * 16 * (step + 1)
    # Adam divides by the root of a sum of squares: where gradients are next to nothing, rounding
    # decides on the direction. Steps are of 3e-3.
    for (name, ours), theirs in zip(one.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-4, msg=name)
    for ours, theirs in zip(biases(one.model), biases(model), strict=True):
        assert torch.equal(ours, theirs)


def biases(model: Any) -> list[Tensor]:
    return [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]


def move_bias(model: Any, load: Any, speed: float = 0.001) -> None:
    """The report's rule, expert by expert: down if it had more than its share, up if less."""
    rows = [row for part in load for row in part.reshape(-1, part.shape[-1]).tolist()]
    for bias, row in zip(biases(model), rows, strict=True):
        for expert, tokens in enumerate(row):
            share = sum(row) / len(row)
            bias[expert] += speed if tokens < share else -speed if tokens > share else 0.0


@pytest.mark.parametrize("kept", ["3000", "1000000"])  # 2,928 bytes are the least
def test_the_bias_moves_once_a_step_by_the_load_of_all_of_it(tmp_path: Path, kept: str) -> None:
    """Whatever the accumulation (3 micro-batches, the last one smaller), and however much of the
    forward pass is computed again. Exact: equal to the last bit."""
    name = f"tiny_kept_{kept}"
    package = built(tmp_path, name, train__saved_bytes_per_token=kept, train__batch="5")
    one = trainer(package, seed=2)
    expected = package.Model(seed=2)
    for step in range(4):
        # The load is that of the weights before the step.
        loads = [
            one.model.loss(tokens[:, :-1], tokens[:, 1:]).load
            for tokens in batch(one, 5 * step, 5).split(2)
        ]
        total = [sum(parts[1:], parts[0]) for parts in zip(*loads, strict=True)]
        did = one.step()
        move_bias(expected, total)
        assert [list(u.load) for u in did.experts.values()] == [
            row for part in total for row in part.reshape(-1, part.shape[-1]).tolist()
        ]
        for ours, theirs in zip(biases(one.model), biases(expected), strict=True):
            assert torch.equal(ours, theirs)
    assert all(bias.any() for bias in biases(one.model))


def test_a_bias_never_has_a_gradient(package: Any) -> None:
    one = trainer(package)
    one.step()
    assert all(not b.requires_grad and b.grad is None for b in biases(one.model))
    assert not any("bias" in weight.name for weight in one.optimizer.weights)


@pytest.mark.parametrize(("name", "changes"), [("tiny", {}), ("tiny_masked", MASK)])
def test_micro_batches_add_up_to_the_batch(
    name: str, changes: dict[str, str], tmp_path: Path
) -> None:
    whole = trainer(built(tmp_path, f"{name}_whole", train__micro_batch="6", **changes))
    parts = trainer(built(tmp_path, f"{name}_parts", train__micro_batch="4", **changes))
    a, b = whole.step(), parts.step()
    assert (a.main, a.total, a.balance) == pytest.approx((b.main, b.total, b.balance), rel=1e-6)
    assert a.mtp == pytest.approx(b.mtp, rel=1e-6)
    assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-5)


def test_bfloat16_weights_are_rounded_masters(tmp_path: Path) -> None:
    one = trainer(built(tmp_path, "tiny_bf16", precision__policy="bf16"))
    for _ in range(3):
        one.step()
    for weight in one.optimizer.weights:
        shard = weight.shard
        assert shard.master.dtype == torch.float32
        assert shard.mean.dtype == shard.square.dtype == torch.bfloat16
        assert torch.equal(weight.tensor.detach().view(-1), shard.master.bfloat16())
    weights = one.optimizer.weights
    assert any((w.shard.master != w.tensor.detach().view(-1)).any() for w in weights)


def test_batch_and_rate_follow_their_schedules(tmp_path: Path) -> None:
    package = built(
        tmp_path,
        "tiny_ramp",
        train__batch="[{until: 320, start: 2, value: 6}, {value: 6}]",
        train__learning_rate="[{until_step: 4, start: 0, value: 4e-3}, {value: 1e-3}]",
        train__bias_update="[{until: 100, value: 0.5}, {value: 0}]",
    )
    one = trainer(package)
    steps = [one.step() for _ in range(7)]
    assert [s.batch for s in steps] == [2, 2, 3, 3, 4, 5, 6]
    rates = [s.learning_rate for s in steps]
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 1e-3, 1e-3, 1e-3, 1e-3])
    assert [s.bias_update for s in steps] == [0.5, 0.5, 0.5, 0, 0, 0, 0]
    assert one.position.sequences == sum(s.batch for s in steps)


def test_the_average_follows_the_masters(tmp_path: Path) -> None:
    package = built(tmp_path, "tiny_ema", train__ema="0.75")
    one = trainer(package)
    expected = {p.name: p.tensor.clone() for p in published(package, one.model)}
    for _ in range(3):
        one.step()
        for p in published(package, one.model):
            expected[p.name] = 0.75 * expected[p.name] + 0.25 * p.tensor
    assert one.average is not None
    found = one.average.values
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.view_as(expected[name]), expected[name], msg=name)


@pytest.mark.parametrize("policy", ["bf16", "fp8_blockwise"])
def test_a_restored_state_goes_on_bit_for_bit(tmp_path: Path, policy: str) -> None:
    """With masters, moments and an average that the weights alone do not tell."""
    package = built(tmp_path, f"tiny_{policy}", precision__policy=policy, train__ema="0.9")
    one = trainer(package)
    for _ in range(2):
        one.step()
    checkpoints, states = part(package, "checkpoints"), part(package, "state")
    saved = checkpoints.Checkpoints(tmp_path / "checkpoints", 1)
    saved.save(states.training_state(one))
    # Training goes on while the state is written; what is written is that of before.
    losses = [one.step().total for _ in range(3)]
    saved.wait()
    other = trainer(package, seed=5)
    states.restore(other, saved.load(saved.newest(), states.training_state(other)))
    assert [other.step().total for _ in range(3)] == losses
    for name, tensors in states.training_state(one).tensors.items():
        for key, tensor in states.training_state(other).tensors[name].items():
            assert torch.equal(tensor, tensors[key]), (name, key)


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda m: m.model.layers[1].mlp.gate.weight[3].fill_(torch.nan), r"weight .*1\.mlp\.gate"),
        (lambda m: m.model.layers[1].self_attn.kv_b_proj.weight.fill_(3e38), r"model\.layers\.1 "),
        (lambda m: m.lm_head.weight.fill_(3e38), "all layers are finite"),
    ],
)
def test_what_is_not_finite_is_named_and_changes_nothing(
    package: Any, break_it: Any, named: str
) -> None:
    one = trainer(package)
    one.step()
    with torch.no_grad():
        break_it(one.model)
    before = {n: t.clone() for n, t in one.model.state_dict().items()}
    shards = [w.shard for w in one.optimizer.weights]
    moments = [shard.mean.clone() for shard in shards]
    with pytest.raises(part(package, "trainer").NotFinite, match=rf"step 2: .*{named}"):
        one.step()
    after = one.model.state_dict()
    assert all(torch.allclose(after[n], t, 0, 0, equal_nan=True) for n, t in before.items())
    assert all(torch.equal(s.mean, m) for s, m in zip(shards, moments, strict=True))
    assert one.position.steps == 1


def test_measures_of_balance() -> None:
    even = utilization(torch.tensor([5, 5, 5, 5]), torch.zeros(4))
    assert (even.max_vio, even.entropy, even.bias_range) == (0, 1, 0)
    one = utilization(torch.tensor([0, 12, 0, 0]), torch.tensor([-1.0, 2.0, 0.0, 0.0]))
    assert (one.max_vio, one.entropy, one.bias_range) == (3, 0, 3)
    two = utilization(torch.tensor([6, 6, 0, 0]), None)
    assert (two.max_vio, two.entropy, two.bias_range) == (1, 0.5, 0)
