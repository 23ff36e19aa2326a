"""E5M6 by kernels, interpreted: equal to the reference, bit for bit."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from runtime import e5m6
from tests.support.kernels import KernelLoader

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")


@pytest.fixture
def module(kernels: KernelLoader) -> ModuleType:
    return kernels("e5m6", "deepseek_v3")


def wild(*shape: int) -> Tensor:
    """Numbers of very different sizes in each run, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(0)
    size = torch.exp(8 * torch.randn(*shape, generator=generator))
    x = torch.randn(*shape, generator=generator) * size
    return x.where(torch.rand(*shape, generator=generator) > 0.1, -0.0).bfloat16()


def same(module: ModuleType, x: Tensor) -> None:
    packed, s = module.pack(x)
    expected, expected_s = e5m6.pack(x)
    assert torch.equal(packed, expected) and torch.equal(s, expected_s)
    found = module.unpack(packed, s, x.shape[-1], dtype=torch.bfloat16)
    wanted = e5m6.unpack(expected, s, x.shape[-1], dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))


@pytest.mark.parametrize("shape", [(3, 5, 128), (2, 33, 1, 264), (7, 8), (0, 128), (4, 1, 384)])
def test_numbers(module: ModuleType, shape: tuple[int, ...]) -> None:
    same(module, wild(*shape))


def test_each_number_of_a_run(module: ModuleType) -> None:
    """All of bfloat16 from the least on, with the largest that its scale allows."""
    x = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    x = x.view(-1, 120)
    same(module, torch.cat([x, -x[:, :7], x[:, -1:]], -1))


def test_ties_and_every_fraction_of_the_largest(module: ModuleType) -> None:
    """Scales step where the largest number passes 127/64; halves go to the even neighbour."""
    largest = (torch.arange(2**10, dtype=torch.int32) << 13) + (127 << 23)
    x = torch.full((len(largest) + 3, 8), 0.3)
    x[: len(largest), 0] = largest.view(torch.float32)
    edge = torch.tensor(127 / 64)
    x[-3:, 0] = torch.stack([edge.nextafter(torch.tensor(n)) for n in (0.0, 1.984375, 9.0)])
    x[:, 1:6] = torch.arange(5) / 2**7 + 1
    same(module, x)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_shows_in_its_run(module: ModuleType, value: float) -> None:
    x = torch.ones(2, 256).bfloat16()
    x[1, 5] = value
    found = module.unpack(*module.pack(x), 256, dtype=torch.float32)
    assert found[1, :128].isnan().all() and (found[1, 128:] == 1).all() and (found[0] == 1).all()


def test_parts_of_wider_rows(module: ModuleType) -> None:
    wide = torch.full((6, 300), torch.nan).bfloat16()
    wide[:, 24:152] = wild(6, 128)
    same(module, wide[:, 24:152])


def test_every_byte_is_read(module: ModuleType) -> None:
    """Codes of infinities and NaN, too, which nothing packs."""
    packed = torch.randint(256, (50, 192), generator=torch.manual_seed(0), dtype=torch.uint8)
    s = 2.0 ** torch.arange(-25, 25)[:, None]
    found, wanted = (f(packed, s, 128, dtype=torch.float32) for f in (module.unpack, e5m6.unpack))
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(nan=0), wanted.nan_to_num(nan=0))


def test_rows_of_broken_words_are_left_to_torch(module: ModuleType) -> None:
    packed, s = e5m6.pack(wild(3, 12))
    assert module.pack(wild(3, 12)) is NotImplemented
    assert module.unpack(packed, s, 12, dtype=torch.bfloat16) is NotImplemented
