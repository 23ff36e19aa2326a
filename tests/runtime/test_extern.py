"""A user's function is held to what its block declares; autograd or its own gradient serve it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.extern import Extern

X = torch.randn(2, 5, 4, generator=torch.manual_seed(0))


def extern(
    function: Callable[..., Any],
    takes: tuple[str, ...] = ("bf16[.., width=4]",),
    gives: tuple[str, ...] = ("bf16[.., width=4]",),
    gradient: Callable[..., Any] | None = None,
    **numbers: Any,
) -> Extern:
    return Extern(function, takes=takes, gives=gives, numbers=numbers, gradient=gradient)


def doubled(x: Tensor, times: float = 2) -> Tensor:
    return x * times


def cut(x: Tensor) -> Tensor:
    return x[..., 1:]


def narrow(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)


def in_place(x: Tensor) -> Tensor:
    return x.mul_(2)


def pair(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x


def noisy(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


def constant(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def wrong_grad(d: Tensor, x: Tensor) -> Tensor:
    return d[..., 1:]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (cut, r"gives torch.float32 \[2, 5, 3\] as result 1, not torch.float32 \[2, 5, 4\]"),
        (narrow, r"gives torch.bfloat16"),
        (in_place, "changes an input in place"),
        (pair, "gives 2 tensors, not 1"),
    ],
)
def test_results_that_are_not_as_declared(function: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        extern(function)(X.clone())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="gives 2 tensors"):
        extern(pair)(X.clone())


@pytest.mark.parametrize(
    ("function", "gradient", "message"),
    [
        (noisy, None, "draws random numbers"),
        (constant, None, "autograd cannot follow"),
        (doubled, wrong_grad, r"gradients torch.float32 \[2, 5, 3\] for inputs .*\[2, 5, 4\]"),
    ],
)
def test_gradients_that_would_be_wrong(function: Any, gradient: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        extern(function, gradient=gradient).grad(torch.ones_like(X), X)


def test_numbers_dimensions_and_views() -> None:
    takes = ("bf16[batch, seq, heads, dim]", "i64[batch, seq]")
    gives = ("bf16[batch, seq, dim, heads]", "i64[batch, seq]")
    x, position = torch.randn(2, 3, 4, 5), torch.arange(3).expand(2, 3)
    made = extern(lambda x, at, by: (x.mT * by, at + 1), takes, gives, by=3)
    turned, after = made(x, position)
    assert turned.is_contiguous() and torch.equal(turned, x.mT * 3)
    assert torch.equal(after, position + 1)
    d = torch.randn_like(turned)
    assert torch.equal(made.grad(d, x, position), d.mT * 3)


def test_what_a_result_does_not_depend_on_has_a_gradient_of_zeros() -> None:
    takes = ("bf16[.., n]", "bf16[.., n]")
    made = extern(lambda x, y: x * 2, takes, ("bf16[.., n]",))
    dx, dy = made.grad(torch.ones_like(X), X, X)
    assert torch.equal(dx, torch.full_like(X, 2)) and not dy.any()
