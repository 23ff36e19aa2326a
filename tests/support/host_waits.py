"""Finds where a step of a model waits for the GPU, without a GPU.

Tensors have no values here (torch's device `meta`) or lie on the CPU; each call that a GPU would
have to end its work for, before the host can go on, is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATEN = torch.ops.aten

READS = {
    ATEN._local_scalar_dense: "a number is read",
    ATEN.equal: "tensors are compared",
    ATEN.allclose: "tensors are compared",
    ATEN.nonzero: "sizes depend on values",
    ATEN.masked_select: "sizes depend on values",
    ATEN._unique2: "sizes depend on values",
    ATEN.unique_dim: "sizes depend on values",
    ATEN.unique_consecutive: "sizes depend on values",
    ATEN.bincount: "the number of bins is read",
    ATEN.lift_fresh: "numbers of the host are copied to the GPU",
}
"""What waits whatever its operands are: torch's own functions on a GPU read, or copy, at once."""


class HostWait(RuntimeError):
    """The host would wait for the GPU."""


def wait_of(func: Any, args: Sequence[Any], kwargs: Any) -> str:
    """Why a call of torch waits for the GPU; empty if it does not."""
    packet = func.overloadpacket
    if packet in READS:
        return READS[packet]
    by_index = packet in (ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_)
    if by_index and any(isinstance(i, Tensor) and i.dtype is torch.bool for i in args[1]):
        return "sizes depend on a mask"
    if packet is ATEN.repeat_interleave:
        size = kwargs.get("output_size", args[1] if len(args) > 1 else None)
        if func is ATEN.repeat_interleave.Tensor and size is None:
            return "sizes depend on values"
    if packet in (ATEN._to_copy, ATEN.copy_):
        devices = {leaf.device for leaf in tree_leaves([args, kwargs]) if isinstance(leaf, Tensor)}
        if kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]))
        if len({device.type for device in devices}) > 1:
            return "a tensor is copied between host and GPU"
    return ""


class ByParts(TorchDispatchMode):
    """Within it, `call` makes each call of torch; one of several operators comes as those."""

    def call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # Where gradients are recorded torch takes a call apart by itself, in inference mode it
        # does not.
        with self:
            parts = func.decompose(*args, **kwargs)
        return self.call(func, args, kwargs) if parts is NotImplemented else parts


class NoWaits(ByParts):
    """Within it, whatever waits for the GPU calls `found` with the reason, an error by default."""

    def __init__(self, found: Callable[[str], None] | None = None) -> None:
        super().__init__()
        self.found = found or _refuse

    def call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        why = wait_of(func, args, kwargs)
        if why:
            self.found(f"{func}: {why}")
        return super().call(func, args, kwargs)


def _refuse(why: str) -> None:
    raise HostWait(why)


@contextmanager
def no_waits(found: Callable[[str], None] | None = None) -> Iterator[None]:
    """`NoWaits`, and what torch tells no such mode of."""
    with pytest.MonkeyPatch.context() as patch, NoWaits(found) as mode:
        for owner, name, why in (
            (Tensor, "tolist", "a tensor is read"),
            (Tensor, "numpy", "a tensor is read"),
            (Tensor, "cpu", "a tensor is read"),
            (torch, "tensor", "numbers of the host are copied to the GPU"),
            (torch, "as_tensor", "numbers of the host are copied to the GPU"),
        ):
            method = getattr(owner, name)
            patch.setattr(owner, name, _telling(method, f"{name}: {why}", mode.found))
        yield


def _telling(
    method: Callable[..., Any], what: str, found: Callable[[str], None]
) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        if _len_torch_dispatch_stack():  # not inside of what stands for a kernel
            found(what)
        return method(*arguments, **named)

    return call
