"""Which implementation of a function runs: a Triton kernel on its target, torch elsewhere."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

VARIABLE = "DSLC_KERNELS"
"""Environment variable: `torch` makes every kernel give way to the reference, for debugging."""

Function = Callable[..., Any]


class Kernels:
    """The functions of a module of `runtime`; `kernels` names those that have a kernel.

    A kernel is the function of the same name and arguments in a file of `package`. It serves
    tensors on the target whose first one has the element type given with it, where autograd asks
    for no gradient; every other call goes to the module. Of several files the first one serves that
    can: one whose library is not installed cannot, nor one that returns NotImplemented. Files are
    imported at their first call, so that a machine without Triton needs none.
    """

    def __init__(
        self,
        reference: ModuleType,
        package: str,
        target: str,
        kernels: Mapping[str, tuple[torch.dtype, Sequence[str]]],
    ) -> None:
        missing = [name for name in kernels if not hasattr(reference, name)]
        if missing:
            raise AttributeError(f"{reference.__name__} has no {', '.join(missing)}")
        self._reference = reference
        self._package = package
        self._target = target
        self._kernels = kernels

    def __getattr__(self, name: str) -> Any:
        reference = getattr(self._reference, name)
        if name not in self._kernels:
            return reference
        function = self._choosing(name, reference)
        setattr(self, name, function)
        return function

    def _choosing(self, name: str, reference: Function) -> Function:
        dtype, files = self._kernels[name]

        def function(*arguments: Any, **keywords: Any) -> Any:
            first = _first_tensor(arguments)
            if first is None or first.dtype != dtype or not serves(self._target, first.device):
                return reference(*arguments, **keywords)
            if torch.is_grad_enabled() and any(_wants_gradient(a) for a in arguments):
                return reference(*arguments, **keywords)
            for file in files:
                module = _file(f"{self._package}.{file}")
                result = getattr(module, name)(*arguments, **keywords) if module else NotImplemented
                if result is not NotImplemented:
                    return result
            return reference(*arguments, **keywords)

        function.__name__ = name
        function.__doc__ = reference.__doc__
        return function


@cache
def _file(path: str) -> ModuleType | None:
    """A file of kernels; none where the library that it calls is missing, which is told once."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        warnings.warn(f"{error}: {path} is left out, the next kernel serves", stacklevel=4)
        return None


def _first_tensor(arguments: Iterable[Any]) -> Tensor | None:
    """The first one that is a tensor, or a list of them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument
        if isinstance(argument, list | tuple) and any(isinstance(a, Tensor) for a in argument):
            return _first_tensor(argument)
    return None


def _wants_gradient(argument: object) -> bool:
    return isinstance(argument, Tensor) and argument.requires_grad


def serves(target: str, device: torch.device) -> bool:
    """Whether kernels of a target run on a device; a GPU that is another one is told of once."""
    if device.type != "cuda" or wanted() == "torch":
        return False
    found = name_of(device.index if device.index is not None else torch.cuda.current_device())
    if found != target:
        _tell(target, found)
    return found == target


@cache
def wanted() -> str:
    """What `DSLC_KERNELS` asks for: `torch`, or `triton`, which is the rule.

    Raises ValueError for any other word.
    """
    word = os.environ.get(VARIABLE, "") or "triton"
    if word not in ("torch", "triton"):
        raise ValueError(f"{VARIABLE}={word}: choose torch or triton")
    return word


@cache
def name_of(index: int) -> str:
    """A GPU as targets are called: `sm_90`, `gfx942`."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@cache
def _tell(target: str, found: str) -> None:
    warnings.warn(
        f"the kernels of this build are for {target}, this GPU is {found}: torch's own run instead."
        f" Build with `--target {found}` if dslc has that target",
        stacklevel=4,
    )
