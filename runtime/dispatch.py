"""Runs the kernel of a function where it can serve a call, the function itself elsewhere."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from inspect import signature
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

VARIABLE = "DSLC_KERNELS"
"""Environment variable: `torch` turns all kernels off, for debugging."""

Function = Callable[..., Any]


def with_kernel(
    reference: Function, dtype: torch.dtype, *files: str, package: str, target: str
) -> Function:
    """`reference`, for which launchers of the same name in `files` of `package` stand in.

    They are asked in order, on the GPU `target`, where the first argument is a tensor (or a list of
    tensors) of type `dtype` and autograd records no gradient of the call. The first launcher serves
    that can: one whose library is not installed cannot, nor one that lacks a parameter of the call
    (an attention without `window`), nor one that returns NotImplemented. Files are imported at the
    first call, so that a machine without Triton needs none.
    """

    launchers: list[tuple[Function, frozenset[str] | None]] = []
    """With the names of their parameters, None for any; found at the first call for them."""

    # Every operator of a decoding step comes by here: it takes as long as a launch may not.
    @wraps(reference)
    def function(*arguments: Any, **keywords: Any) -> Any:
        first = arguments[0] if arguments else None
        if isinstance(first, (list, tuple)):
            first = first[0] if first else None
        if (
            not isinstance(first, Tensor)
            or first.dtype is not dtype
            or not serves(target, first.device)
            or _records_gradient(arguments, keywords)
        ):
            return reference(*arguments, **keywords)
        if not launchers:
            launchers.extend(_launchers(reference.__name__, package, files))
        for launcher, parameters in launchers:
            if keywords and parameters is not None and not keywords.keys() <= parameters:
                continue
            result = launcher(*arguments, **keywords)
            if result is not NotImplemented:
                return result
        return reference(*arguments, **keywords)

    return function


def _launchers(
    name: str, package: str, files: Sequence[str]
) -> Iterator[tuple[Function, frozenset[str] | None]]:
    for file in files:
        module = _file(f"{package}.{file}")
        if module is not None:
            launcher = getattr(module, name)
            parameters = signature(launcher).parameters.values()
            any_name = any(one.kind is one.VAR_KEYWORD for one in parameters)
            yield launcher, None if any_name else frozenset(one.name for one in parameters)


@cache
def _file(path: str) -> ModuleType | None:
    """A file of kernels, or None with one warning where the library that it calls is missing."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        warnings.warn(f"{error}: {path} is left out, the next kernel serves", stacklevel=4)
        return None


def _records_gradient(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(argument, Tensor) and argument.requires_grad
        for argument in (*arguments, *keywords.values())
    )


def serves(target: str, device: torch.device) -> bool:
    """Whether kernels of a target run on a device. One warning names a GPU of another kind."""
    if device.type != "cuda" or wanted() == "torch":
        return False
    found = name_of(device.index if device.index is not None else torch.cuda.current_device())
    if found != target:
        _warn(target, found)
    return found == target


@cache
def wanted() -> str:
    """The value of `DSLC_KERNELS`: `torch`, or `triton`, which is the default.

    Raises ValueError for any other value.
    """
    return choice_of(VARIABLE, ("torch", "triton"), "triton")


def choice_of(variable: str, words: Sequence[str], default: str) -> str:
    """The value of an environment variable, `default` where it has none.

    Raises ValueError for what is none of `words`.
    """
    word = os.environ.get(variable, "") or default
    if word not in words:
        raise ValueError(f"{variable}={word}: choose {' or '.join(words)}")
    return word


@cache
def name_of(index: int) -> str:
    """A GPU by the name of its target: `sm_90`, `gfx942`."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@cache
def _warn(target: str, found: str) -> None:
    warnings.warn(
        f"the kernels of this build are for {target}, this GPU is {found}: torch's own run instead."
        f" Build with `--target {found}` if dslc has that target",
        stacklevel=4,
    )
