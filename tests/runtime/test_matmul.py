"""Within `batch_invariant` a row has the same bits whatever is computed with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from runtime import functional as F
from runtime import matmul
from runtime.matmul import batch_invariant, is_batch_invariant

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Torch cuts long tensors into a part for each thread, at any element."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(compute: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Rows of many, of few, and alone."""
    with torch.inference_mode(), batch_invariant():
        whole = compute(x)
        for start, stop in ((0, 1), (5, 6), (3, 5), (0, 31), (7, 40), (len(x) - 1, len(x))):
            assert torch.equal(compute(x[start:stop]), whole[start:stop]), (start, stop)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out", "in_"), [(96, 64), (64, 192), (257, 100), (512, 512), (36, 72)])
def test_products(threads: int, dtype: torch.dtype, out: int, in_: int) -> None:
    weight = random(out, in_, dtype=dtype, seed=1)
    check(lambda x: F.linear(x, weight), random(70, in_, dtype=dtype))
    check(lambda x: F.linear(x, weight[:, ::2]), random(70, (in_ + 1) // 2, dtype=dtype))


@pytest.mark.parametrize("transposed", [False, True])
def test_products_by_head(threads: int, transposed: bool) -> None:
    weight = random(4 * 40, 48, seed=1)
    x = random(70, 4, 16 if transposed else 48)
    rows = (0, 16) if transposed else (16, 40)
    check(lambda x: F.head_linear(x[None], weight, rows, transposed=transposed)[0], x)


def test_products_of_experts(threads: int) -> None:
    """A row's expert gets other rows, too, or does not."""
    weight, x = random(5, 48, 64, seed=1), random(70, 64)
    expert = torch.arange(70) % 5

    def compute(rows: Tensor, of: Tensor) -> Tensor:
        order = of.argsort(stable=True)
        offs = torch.bincount(of, minlength=5).cumsum(0).int()
        out = F.grouped_linear(rows[order], offs, weight)
        return torch.empty_like(out).index_copy(0, order, out)

    with torch.inference_mode(), batch_invariant():
        whole = compute(x, expert)
        for part in (slice(0, 1), slice(3, 9), slice(60, 70)):
            assert torch.equal(compute(x[part], expert[part]), whole[part])


@pytest.mark.parametrize("width", [12, 40, 100, 160, 512, 1408])
def test_pointwise(threads: int, width: int) -> None:
    """More than 32,768 numbers, which torch shares among threads."""
    x, y = random(512, width), random(512, width, seed=1)
    check(F.silu, x)
    check(lambda z: F.swiglu(z, z * 2), x)
    check(lambda z: F.add_rms_norm(z, z, y[0], eps=1e-6)[1], x)
    check(F.sigmoid, x)
    check(F.softmax, x)


def test_rotation(threads: int) -> None:
    x = random(70, 3, 40)
    position = torch.arange(70)

    def compute(rows: Tensor, place: Tensor) -> Tensor:
        return F.rotate(rows[None], *F.rope_table(place[None], dim=40, theta=1e4))[0]

    with torch.inference_mode(), batch_invariant():
        whole = compute(x, position)
        for i in (0, 1, 33, 69):
            assert torch.equal(compute(x[i : i + 1], position[i : i + 1]), whole[i : i + 1])


def test_it_is_what_is_computed_elsewhere_but_for_rounding() -> None:
    x, weight = random(70, 192), random(64, 192, seed=1)
    turn = F.rope_table(torch.arange(70)[None], dim=192, theta=1e4)
    functions: list[Callable[[], Tensor]] = [
        lambda: F.linear(x, weight),
        lambda: F.silu(x),
        lambda: F.sigmoid(x),
        lambda: F.rotate(x[None], *turn),
    ]
    for compute in functions:
        with batch_invariant():
            found = compute()
        assert torch.allclose(found, compute(), atol=1e-5)


def test_the_first_weight_of_a_shape_does_not_decide() -> None:
    """Of zeros, calls of any size agree."""
    matmul._AGREEING.clear()
    check(lambda x: F.linear(x, torch.zeros(96, 200)), random(70, 200))
    weight = random(96, 200, seed=1)
    check(lambda x: F.linear(x, weight), random(70, 200))


def test_it_ends_with_its_block_and_is_of_its_thread() -> None:
    with pytest.raises(ZeroDivisionError), batch_invariant():
        assert is_batch_invariant()
        _ = 1 / 0
    assert not is_batch_invariant()


@pytest.mark.parametrize("slow", [False, True])
def test_bfloat16_on_a_cpu_without_avx512(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own loops for bfloat16 take ten times as long there as float32 does."""
    monkeypatch.setattr(matmul, "_BFLOAT16_IS_SLOW", slow)
    seen: list[torch.dtype] = []

    def compute(a: Tensor, b: Tensor) -> Tensor:
        seen.append(a.dtype)
        return torch.bmm(a, b)

    a, b = random(3, 20, 64, dtype=torch.bfloat16), random(3, 64, 7, dtype=torch.bfloat16, seed=1)
    found = matmul.in_float32(compute, a, b)
    assert seen == [torch.float32 if slow else torch.bfloat16]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), a.double() @ b.double(), rtol=2**-8, atol=1e-5)
    weight = b[0].T
    exact = a.double() @ weight.double().T
    torch.testing.assert_close(F.linear(a, weight).double(), exact, rtol=2**-8, atol=1e-5)
