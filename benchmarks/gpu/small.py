"""A whole small model on a device against the same model on the CPU."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

Outcome = tuple[float, dict[str, Tensor], Tensor]
"""Loss, gradients in float32, greedy tokens."""

LOSS = 1e-3
"""How far losses may be apart, relative to the reference."""

GRADIENTS = {"bf16": 0.03, "fp8": 0.08}
"""How far all gradients may be from the reference, in parts of its norm: sums are rounded in other
places, and in FP8 a token goes to another expert now and then. Wrong kernels are far off."""


def compare(package: str, precision: str, device: str) -> dict[str, Any]:
    """Losses, gradients and tokens of a package, and whether two runs give the same bits.

    `check` is `ok`, or says what is wrong.
    """
    module = importlib.import_module(package)
    found, again, expected = (outcome(module, where) for where in (device, device, "cpu"))
    row: dict[str, Any] = {"row": f"small model {precision}", "loss": found[0]}
    row["loss_on_cpu"] = expected[0]
    row["gradients_off_by"] = apart(found[1], expected[1])
    row["same_tokens"] = same = torch.equal(found[2], expected[2])
    row["same_bits"] = bits = equal(found, again)
    wrong = []
    if not abs(found[0] - expected[0]) <= LOSS * abs(expected[0]):
        wrong.append("the loss differs")
    if not row["gradients_off_by"] <= GRADIENTS[precision]:
        wrong.append("gradients differ")
    wrong += [] if same else ["greedy tokens differ"]
    wrong += [] if bits else ["two runs differ"]
    row["check"] = ", ".join(wrong) or "ok"
    return row


def outcome(module: Any, device: str) -> Outcome:
    """Of a training step and of decoding, on a device."""
    model = module.Model(device=device, dtype=torch.bfloat16, seed=0)
    for name, tensor in model.state_dict().items():
        # So that no expert is chosen by a rounding: biases are further apart than scores.
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.linspace(0, 1, len(tensor)).roll(5))
    vocab = model.config.params.vocab_size
    drawn = torch.randint(2, vocab, (2, 65), generator=torch.Generator().manual_seed(0))
    tokens = drawn.to(device)
    loss = model.loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).total
    loss.backward()
    grads = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        answer = model.generate(tokens[:, :9].contiguous(), max_new_tokens=8, temperature=0)
    return loss.item(), grads, answer.cpu()


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|found - expected| / |expected| of all gradients together; infinite if some are missing."""
    if found.keys() != expected.keys():
        return float("inf")
    whole = torch.cat([grad.flatten() for grad in expected.values()])
    other = torch.cat([found[name].flatten() for name in expected])
    return float((other - whole).norm() / whole.norm())


def equal(one: Outcome, other: Outcome) -> bool:
    grads = (torch.equal(one[1][name], other[1][name]) for name in one[1])
    return one[0] == other[0] and all(grads) and torch.equal(one[2], other[2])
