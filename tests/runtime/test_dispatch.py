"""Whether a kernel or torch serves a call."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest
import torch

from runtime import dispatch
from runtime.dispatch import Kernels

reference = types.ModuleType("reference")
exec(
    "def double(x, times=2):\n    return x * times\n\ndef other(x):\n    return x", vars(reference)
)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """`double` has a kernel, which tells of itself by its result."""
    file, picky = types.ModuleType("pack.file"), types.ModuleType("pack.picky")
    vars(file)["double"] = lambda x, times=2: x * 0 - times
    vars(picky)["double"] = lambda x, times=2: x * 0 if times == 7 else NotImplemented
    monkeypatch.setitem(sys.modules, "pack", types.ModuleType("pack"))
    monkeypatch.setitem(sys.modules, "pack.file", file)
    monkeypatch.setitem(sys.modules, "pack.picky", picky)
    dispatch.wanted.cache_clear()
    yield Kernels(reference, "pack", "sm_90", {"double": (torch.bfloat16, FILES)})
    dispatch.wanted.cache_clear()


@pytest.fixture
def on_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "serves", lambda target, device: target == "sm_90")


FILES = ["picky", "file"]
X = torch.ones(2, dtype=torch.bfloat16)


def test_the_reference_serves_where_the_target_is_not(kernels: Kernels) -> None:
    assert kernels.double(X, times=3).tolist() == [3, 3]
    assert kernels.other is vars(reference)["other"]


@pytest.mark.usefixtures("on_target")
def test_the_kernel_serves_on_the_target(kernels: Kernels) -> None:
    assert kernels.double(X, times=3).tolist() == [-3, -3]
    assert kernels.other(X) is X


@pytest.mark.usefixtures("on_target")
def test_a_list_of_tensors_counts_as_its_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "total", lambda grads: "torch", raising=False)
    file = types.ModuleType("pack.file")
    vars(file)["total"] = lambda grads: "kernel"
    monkeypatch.setitem(sys.modules, "pack", types.ModuleType("pack"))
    monkeypatch.setitem(sys.modules, "pack.file", file)
    dispatch._file.cache_clear()
    found = Kernels(reference, "pack", "sm_90", {"total": (torch.bfloat16, ["file"])})
    assert found.total([X, X]) == "kernel"
    assert found.total([X.float()]) == "torch"
    assert found.total([]) == "torch"
    dispatch._file.cache_clear()


@pytest.mark.usefixtures("on_target")
def test_of_several_kernels_the_first_that_can_serves(kernels: Kernels) -> None:
    assert kernels.double(X, times=7).tolist() == [0, 0]
    assert kernels.double(X, times=6).tolist() == [-6, -6]


@pytest.mark.usefixtures("on_target", "kernels")
def test_a_library_that_is_missing_is_told_of_once() -> None:
    dispatch._file.cache_clear()
    several = Kernels(reference, "pack", "sm_90", {"double": (torch.bfloat16, ["absent", "file"])})
    with pytest.warns(UserWarning, match="pack.absent is left out") as told:
        assert several.double(X).tolist() == [-2, -2]
        assert several.double(X).tolist() == [-2, -2]
    assert len(told) == 1


@pytest.mark.usefixtures("on_target")
def test_other_element_types_are_the_reference_s(kernels: Kernels) -> None:
    assert kernels.double(X.float()).tolist() == [2, 2]


@pytest.mark.usefixtures("on_target")
def test_where_autograd_wants_a_gradient_the_reference_gives_it(kernels: Kernels) -> None:
    x = X.clone().requires_grad_()
    kernels.double(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2, 2]
    with torch.no_grad():
        assert kernels.double(x).tolist() == [-2, -2]


def test_a_kernel_of_nothing_is_an_error() -> None:
    with pytest.raises(AttributeError, match="reference has no tripel"):
        Kernels(reference, "pack", "sm_90", {"tripel": (torch.bfloat16, FILES)})


def test_the_environment_chooses_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "name_of", lambda index: "sm_90")
    gpu = torch.device("cuda", 0)
    for word, serves in (("", True), ("triton", True), ("torch", False)):
        monkeypatch.setenv(dispatch.VARIABLE, word)
        dispatch.wanted.cache_clear()
        assert dispatch.serves("sm_90", gpu) is serves
    assert not dispatch.serves("sm_90", torch.device("cpu"))
    monkeypatch.setenv(dispatch.VARIABLE, "trition")
    dispatch.wanted.cache_clear()
    with pytest.raises(ValueError, match="choose torch or triton"):
        dispatch.serves("sm_90", gpu)
    dispatch.wanted.cache_clear()


def test_another_gpu_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "name_of", lambda index: "sm_80")
    dispatch.wanted.cache_clear()
    dispatch._tell.cache_clear()
    with pytest.warns(UserWarning, match="are for sm_90, this GPU is sm_80") as told:
        assert not dispatch.serves("sm_90", torch.device("cuda", 0))
        assert not dispatch.serves("sm_90", torch.device("cuda", 0))
    assert len(told) == 1
