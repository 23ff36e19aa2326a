"""Head and cross entropy by kernels, interpreted, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from runtime import functional as F
from runtime import gradients as G
from tests.support.kernels import KernelLoader

PLAIN = ("precision.policy=bf16",)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed))


def labels_of(tokens: int, vocab: int, seed: int = 0) -> Tensor:
    """The first and the last word, and some that do not count."""
    labels = torch.randint(vocab, (tokens,), generator=torch.manual_seed(seed))
    labels[::3] = F.IGNORED_LABEL
    labels[1:2], labels[2:3] = 0, vocab - 1
    return labels


def exact(x: Tensor, labels: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """Loss, and gradients of x and of the weight, in float64."""
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    logits = leaves[0] @ leaves[1].t()
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    yield loss.detach()
    yield from torch.autograd.grad(loss, leaves)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    error = (found.double() - expected).norm()
    assert error <= tolerance * expected.norm(), float(error / expected.norm())


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_loss_and_gradients_of_a_head(kernels: KernelLoader, vendor: str, tokens: int) -> None:
    module = kernels("cross_entropy", "deepseek_v3_tiny", vendor, PLAIN)
    x, weight = random(1, tokens, 64).bfloat16(), (0.3 * random(512, 64, seed=1)).bfloat16()
    labels = labels_of(tokens, 512).view(1, tokens)
    found = module.linear_cross_entropy(x, labels, weight, gradients=True)
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    # Scores and their gradients are rounded to bfloat16 in between: 2^-9 each at most.
    for one, other in zip(found, exact(x, labels, weight), strict=True):
        assert_near(one, other, 6e-3)
    reference = G.linear_cross_entropy(x, labels, weight, gradients=True)
    for one, other in zip(found, reference, strict=True):
        assert other is not None
        assert_near(one, other.double(), 6e-3)
    loss, *none = module.linear_cross_entropy(x, labels, weight, gradients=False)
    assert torch.equal(loss, found[0]) and none == [None, None]
    again = module.linear_cross_entropy(x, labels, weight, gradients=True)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_scores_of_more_tokens_than_are_there_at_a_time(
    kernels: KernelLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = kernels("cross_entropy", "deepseek_v3_tiny", sets=PLAIN)
    x, weight = random(50, 64).bfloat16(), (0.3 * random(512, 64, seed=1)).bfloat16()
    labels = labels_of(50, 512)
    at_once = module.linear_cross_entropy(x, labels, weight, gradients=True)
    monkeypatch.setitem(module.ROWS, 512, 16)  # three pieces of 16, and one of 2
    in_pieces = module.linear_cross_entropy(x, labels, weight, gradients=True)
    assert torch.equal(at_once[1], in_pieces[1])
    assert_near(in_pieces[0], at_once[0].double(), 1e-6)
    assert_near(in_pieces[2], at_once[2].double(), 6e-3)  # rounded after each piece


def test_no_token_and_no_label(kernels: KernelLoader) -> None:
    module = kernels("cross_entropy", "deepseek_v3_tiny", sets=PLAIN)
    weight = random(512, 64, seed=1).bfloat16()
    for tokens in (0, 5):
        x = random(tokens, 64).bfloat16()
        labels = torch.full((tokens,), F.IGNORED_LABEL)
        loss, dx, dw = module.linear_cross_entropy(x, labels, weight, gradients=True)
        assert loss == 0 and dx.shape == x.shape and not dx.any() and not dw.any()


def test_the_words_of_v3(kernels: KernelLoader) -> None:
    """129,280 scores are 31 blocks and a half; only the width of the head is smaller."""
    module = kernels("cross_entropy", "deepseek_v3")
    x, weight = random(3, 8).bfloat16(), random(129_280, 8, seed=1).bfloat16()
    labels = torch.tensor([129_279, F.IGNORED_LABEL, 0])
    found = module.linear_cross_entropy(x, labels, weight, gradients=True)
    for one, other in zip(found, exact(x, labels, weight), strict=True):
        assert_near(one, other, 6e-3)


@pytest.fixture
def scores(kernels: KernelLoader) -> ModuleType:
    """The functions of scores that are there: with an FP8 head nothing is fused."""
    sets = ("precision.policy=fp8_blockwise", "precision.overrides={head: fp8}")
    return kernels("cross_entropy", "deepseek_v3_tiny", sets=sets)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_scores_of_any_size(scores: ModuleType, shift: float) -> None:
    """Far from zero, where exponentials alone would be infinite or nothing; and one of -inf."""
    logits, labels = 20 * random(9, 512) + shift, labels_of(9, 512)
    logits[4, 17] = -torch.inf
    loss, d = scores.cross_entropy(logits, labels), torch.tensor(0.5)
    assert torch.allclose(loss, F.cross_entropy(logits, labels), rtol=1e-5)
    grads = scores.cross_entropy_grad(d, logits, labels)
    assert torch.allclose(grads, G.cross_entropy_grad(d, logits, labels), atol=1e-3)
    assert not grads[::3].any()


def test_rows_behind_two_to_the_31st_score_are_found(scores: ModuleType) -> None:
    stride = 2**30
    base = torch.empty(3 * stride, dtype=torch.bfloat16)  # addresses only; 3 rows are touched
    logits = base.as_strided((3, 512), (stride, 1))
    logits.copy_(random(3, 512))
    labels = torch.tensor([5, 6, 7])
    found = scores.cross_entropy(logits, labels)
    assert torch.allclose(found, F.cross_entropy(logits.contiguous(), labels), rtol=1e-6)
