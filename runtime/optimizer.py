"""AdamW with master weights in float32, in place: the optimizer step of one weight.

DeepSeek-V3 keeps the two moments in bfloat16 and trains with beta1 0.9, beta2 0.95, weight decay
0.1 and a gradient norm of at most 1 (report, sections 3.3.2 and 4.2). Decay is decoupled (arXiv
1711.05101). Each step is computed in float32, in any storage dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

TINY = 1e-6
"""Avoids division by a norm of zero, as torch's clip_grad_norm_ does."""


def square_sum(grads: Iterable[Tensor]) -> Tensor:
    """The squares of all elements added up: a float32 scalar. Those of several ranks add up."""
    # Row by row: torch adds up a whole tensor one after the other, and of 5 million float32 numbers
    # four digits are left (3e-4 off; by rows 1e-7, in the same time).
    rows = (torch.linalg.vector_norm(grad, dim=-1, dtype=torch.float32) for grad in grads)
    sums = [norms.square().sum() for norms in rows]
    return torch.stack(sums).sum() if sums else torch.zeros(())


def clip_factor(squares: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied by so that their norm is at most `max_norm`: a scalar.

    `squares` is the `square_sum` of all of them. A norm that is not finite stays visible: the
    factor is 0 or NaN.
    """
    return (max_norm / (squares.sqrt() + TINY)).clamp(max=1.0)


@torch.no_grad()
def adamw_step(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    factor: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step for one weight, in place: `master` and both moments, which are also returned.

    All tensors are of the shape of the weight.

    With g the gradient times `factor` and t = `step`, counted from 1:

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        w = (1 - lr weight_decay) w - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    `master` is w, float32. The moments m and v are rounded to nearest where `exp_avg` and
    `exp_avg_sq` keep them in fewer bits, after w was computed from them. `weight`, if the model
    computes with another element type than float32, gets the new w rounded.
    """
    g = grad.float() if factor is None else grad.float() * factor
    # Of float32 these are the moments themselves, so that copying back costs nothing.
    m = exp_avg.float().lerp_(g, 1 - beta1)
    v = exp_avg_sq.float().lerp_(g.square(), 1 - beta2)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    root = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    master.mul_(1 - lr * weight_decay).addcdiv_(m, root, value=-lr / (1 - beta1**step))
    if weight is not None:
        weight.copy_(master)
    return master, exp_avg, exp_avg_sq
