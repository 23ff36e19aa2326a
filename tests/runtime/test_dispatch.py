"""Whether a kernel or torch serves a call."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from runtime import dispatch
from runtime.dispatch import with_kernel

FILES = ("picky", "file")


def double(x: torch.Tensor, times: Any = 2) -> torch.Tensor:
    return x * times


def total(grads: list[torch.Tensor]) -> str:
    return "torch"


def served(function: Callable[..., Any], *files: str) -> Callable[..., Any]:
    """The function in a build that has launchers of it in these files."""
    return with_kernel(function, torch.bfloat16, *files, package="pack", target="sm_90")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., torch.Tensor]]:
    """`double` has a kernel, which its results tell from the function itself."""
    file, picky = types.ModuleType("pack.file"), types.ModuleType("pack.picky")
    vars(file)["double"] = lambda x, times=2: x * 0 - times
    vars(picky)["double"] = lambda x, times=2: x * 0 if times == 7 else NotImplemented
    monkeypatch.setitem(sys.modules, "pack", types.ModuleType("pack"))
    monkeypatch.setitem(sys.modules, "pack.file", file)
    monkeypatch.setitem(sys.modules, "pack.picky", picky)
    dispatch.wanted.cache_clear()
    dispatch._file.cache_clear()
    yield served(double, *FILES)
    dispatch.wanted.cache_clear()
    dispatch._file.cache_clear()


@pytest.fixture
def on_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "serves", lambda target, device: target == "sm_90")


X = torch.ones(2, dtype=torch.bfloat16)


def test_the_reference_serves_where_the_target_is_not(kernel: Callable[..., torch.Tensor]) -> None:
    assert kernel(X, times=3).tolist() == [3, 3]


@pytest.mark.usefixtures("on_target")
def test_the_kernel_serves_on_the_target(kernel: Callable[..., torch.Tensor]) -> None:
    assert kernel(X, times=3).tolist() == [-3, -3]


@pytest.mark.usefixtures("on_target")
def test_a_kernel_without_a_parameter_of_the_call_does_not_serve(
    kernel: Callable[..., torch.Tensor],
) -> None:
    vars(sys.modules["pack.file"])["double"] = lambda x: x * 0 - 9
    vars(sys.modules["pack.picky"])["double"] = lambda x, window=None: x * 0 - 8
    assert kernel(X, times=3).tolist() == [3, 3]
    assert kernel(X).tolist() == [-8, -8]


@pytest.mark.usefixtures("on_target")
def test_a_kernel_that_takes_any_name_serves(kernel: Callable[..., torch.Tensor]) -> None:
    vars(sys.modules["pack.picky"])["double"] = lambda x, **settings: x * 0 - settings["times"]
    assert kernel(X, times=3).tolist() == [-3, -3]


@pytest.mark.usefixtures("on_target")
def test_a_list_of_tensors_counts_as_its_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    file = types.ModuleType("pack.file")
    vars(file)["total"] = lambda grads: "kernel"
    monkeypatch.setitem(sys.modules, "pack", types.ModuleType("pack"))
    monkeypatch.setitem(sys.modules, "pack.file", file)
    dispatch._file.cache_clear()
    found = served(total, "file")
    assert found([X, X]) == "kernel"
    assert found([X.float()]) == "torch"
    assert found([]) == "torch"
    dispatch._file.cache_clear()


@pytest.mark.usefixtures("on_target")
def test_of_several_kernels_the_first_that_can_serves(kernel: Callable[..., torch.Tensor]) -> None:
    assert kernel(X, times=7).tolist() == [0, 0]
    assert kernel(X, times=6).tolist() == [-6, -6]


@pytest.mark.usefixtures("on_target", "kernel")
def test_a_library_that_is_missing_is_told_of_once() -> None:
    several = served(double, "absent", "file")
    with pytest.warns(UserWarning, match="pack.absent is left out") as told:
        assert several(X).tolist() == [-2, -2]
        assert several(X).tolist() == [-2, -2]
    assert len(told) == 1


@pytest.mark.usefixtures("on_target")
def test_other_element_types_are_the_reference_s(kernel: Callable[..., torch.Tensor]) -> None:
    assert kernel(X.float()).tolist() == [2, 2]


@pytest.mark.usefixtures("on_target")
def test_where_autograd_wants_a_gradient_the_reference_gives_it(
    kernel: Callable[..., torch.Tensor],
) -> None:
    x = X.clone().requires_grad_()
    kernel(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2, 2]
    with torch.no_grad():
        assert kernel(x).tolist() == [-2, -2]
    times = torch.ones((), requires_grad=True)
    kernel(X, times=times).sum().backward()
    assert times.grad is not None and times.grad == 2


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
    dispatch._warn.cache_clear()
    with pytest.warns(UserWarning, match="are for sm_90, this GPU is sm_80") as told:
        assert not dispatch.serves("sm_90", torch.device("cuda", 0))
        assert not dispatch.serves("sm_90", torch.device("cuda", 0))
    assert len(told) == 1
