"""Finds what would not give the same bits twice on a GPU, without a GPU.

Operators that torch lists as nondeterministic on CUDA (`torch.use_deterministic_algorithms`) add,
or write, several numbers to one place in the order in which threads come. Indices have their values
here, so that a call is an error only if it does: one index for each number is harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.host_waits import ByParts


class NoOrder(RuntimeError):
    """The result would depend on the order of threads."""


Given = dict[str, Any]
"""The arguments of a call by the names of torch's schema."""


def _meets(index: Tensor, dim: int) -> bool:
    """Whether an index is there twice along a dimension."""
    if index.dim() == 0:
        return False
    return bool((index.sort(dim).values.diff(dim=dim) == 0).any())


def _adds(given: Given) -> bool:
    """Numbers of `index` along `dim`: sums of whole numbers are the same in any order."""
    return given["self"].is_floating_point() and _meets(given["index"], given["dim"])


def _adds_slices(given: Given) -> bool:
    return given["self"].is_floating_point() and _meets(given["index"].flatten(), 0)


def _writes_slices(given: Given) -> bool:
    return _meets(given["index"].flatten(), 0)


def _writes(given: Given) -> bool:
    """Of one number everywhere, the order does not matter."""
    return isinstance(given.get("src"), Tensor) and _meets(given["index"], given["dim"])


def _puts(given: Given) -> bool:
    """With `accumulate` torch sorts on a GPU; without, the last one wins."""
    if given.get("accumulate") or given["values"].numel() <= 1:
        return False
    indices = [i for i in given["indices"] if i is not None]
    if any(i.dtype is torch.bool for i in indices):
        return False
    places = torch.stack([i.flatten() for i in torch.broadcast_tensors(*indices)], 1)
    return len(places.unique(dim=0)) < len(places)


def _always(given: Given) -> bool:
    return True


LISTED: dict[str, Callable[[Given], bool]] = {
    "index_add": _adds_slices,
    "index_copy": _writes_slices,
    "index_put": _puts,
    "_index_put_impl": _puts,
    "put": _always,
    "scatter": _writes,
    "scatter_add": _adds,
    "scatter_reduce": _adds,
    "cumsum": lambda given: given["self"].is_floating_point(),
    "bincount": lambda given: given.get("weights") is not None,
    "histc": _always,
    "median": _always,
    "nanmedian": _always,
    "nll_loss2d_forward": _always,
    "_ctc_loss_backward": _always,
    "convolution": _always,
    "convolution_backward": _always,
    "_embedding_bag_backward": _always,
    "_embedding_bag_dense_backward": _always,
    "grid_sampler_2d_backward": _always,
    "grid_sampler_3d_backward": _always,
    "max_unpool2d": _always,
    "max_unpool3d": _always,
    # Not in the list; torch warns of them by themselves, unless its algorithms are asked for that
    # have an order. The last one stands for the others on the CPU, where it has one.
    "_scaled_dot_product_efficient_attention_backward": _always,
    "_scaled_dot_product_cudnn_attention_backward": _always,
    "_scaled_dot_product_flash_attention_backward": _always,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _always,
}
"""By the name of the operator, without the `_` of those that work in place."""

FAMILIES = ("upsample_", "reflection_pad", "replication_pad", "max_pool", "avg_pool", "adaptive_")
"""How the names of further ones begin, whose derivatives are listed."""


class FixedOrder(ByParts):
    """Within it, a call whose result has no fixed order on a GPU is an error that names it."""

    def call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        name = name if name in LISTED else name.removesuffix("_")
        given = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
        listed = LISTED.get(name, _always if _is_derivative(name) else None)
        if listed is not None and listed(given):
            raise NoOrder(f"{func}: on a GPU its result has no fixed order")
        return super().call(func, args, kwargs)


def _is_derivative(name: str) -> bool:
    return name.endswith("backward") and name.lstrip("_").startswith(FAMILIES)
