from __future__ import annotations

import pytest
import torch
from torch import nn

from runtime.cache import Cache


def test_entries_come_back_in_order_for_each_module_and_name() -> None:
    cache, a, b = Cache(batch=2, capacity=8), nn.Module(), nn.Module()
    first, second = torch.rand(2, 3, 4), torch.rand(2, 1, 4)
    cache.append(a, k=first, v=-first)
    cache.append(b, k=first * 2)
    k, v = cache.append(a, k=second, v=-second)
    assert torch.equal(k, torch.cat((first, second), 1))
    assert torch.equal(v, -k)
    assert torch.equal(cache.append(b, k=second)[0][:, :3], first * 2)


def test_memory_is_taken_once_and_counted() -> None:
    cache, module = Cache(batch=2, capacity=8), nn.Module()
    (early,) = cache.append(module, c_kv=torch.zeros(2, 1, 5, dtype=torch.bfloat16))
    taken = cache.bytes
    (late,) = cache.append(module, c_kv=torch.zeros(2, 7, 5, dtype=torch.bfloat16))
    assert taken == cache.bytes == 2 * 8 * 5 * 2
    assert late.shape == (2, 8, 5) and late.data_ptr() == early.data_ptr()


def test_what_does_not_fit_is_refused() -> None:
    cache, module = Cache(batch=2, capacity=4), nn.Module()
    cache.append(module, k=torch.zeros(2, 3, 1))
    with pytest.raises(ValueError, match="holds 4 tokens of each sequence, 5 do not fit"):
        cache.append(module, k=torch.zeros(2, 2, 1))
    with pytest.raises(ValueError, match="batch of 2, got 3"):
        cache.append(module, k=torch.zeros(3, 1, 1))
    assert cache.append(module, k=torch.ones(2, 1, 1))[0].sum() == 2


def test_entries_carry_no_gradient() -> None:
    (k,) = Cache(1, 2).append(nn.Module(), k=torch.zeros(1, 1, 1, requires_grad=True))
    assert not k.requires_grad
