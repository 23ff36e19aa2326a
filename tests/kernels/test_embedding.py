"""The gradient of the embedding by a kernel, interpreted: the reference to the bit."""

from __future__ import annotations

import pytest
import torch

from runtime import gradients as G
from tests.support.kernels import KernelLoader, normal_bf16


@pytest.mark.parametrize("count", [0, 1, 70])
@pytest.mark.parametrize("tokens", [1, 3, 500])
def test_rows_are_summed_by_token(kernels: KernelLoader, count: int, tokens: int) -> None:
    """Of few tokens, many times each, and of many; the last one of the table among them."""
    module = kernels("embedding", "deepseek_v3_tiny")
    given = torch.randint(tokens, (2, count), generator=torch.manual_seed(0))
    given.view(-1)[-1:] = 511
    d = normal_bf16(2, count, 96)[..., 16:80]
    found = module.embedding_grad(d, given, 512)
    expected = G.embedding_grad(d, given, 512)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert torch.equal(found, module.embedding_grad(d, given, 512))


def test_wide_rows(kernels: KernelLoader) -> None:
    """More than a program has, and a part of one."""
    module = kernels("embedding", "deepseek_v3_tiny")
    d, given = normal_bf16(9, 2500), torch.tensor([4, 0, 4, 2, 4, 4, 0, 5, 2])
    assert torch.equal(module.embedding_grad(d, given, 6), G.embedding_grad(d, given, 6))
