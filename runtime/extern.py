"""Functions of users: called with a check of what they give, and differentiated.

A function treats equal inputs equally, changes none of them, and draws no random numbers: its
backward pass runs it once more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Dims = tuple[tuple[str, int | None], ...]


class Extern:
    """A function of tensors, with the types that its block declares: `bf16[.., width=64]`.

    `bf16` is the element type of the model at hand, `..` any leading dimensions. `numbers` are
    given by name. Without `gradient`, autograd differentiates it.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        takes: Sequence[str],
        gives: Sequence[str],
        numbers: Mapping[str, Any],
        gradient: Callable[..., Any] | None = None,
    ) -> None:
        self.function = function
        self.takes = [_parsed(text) for text in takes]
        self.gives = [_parsed(text) for text in gives]
        self.numbers = numbers
        self.gradient = gradient

    def __call__(self, *inputs: Tensor) -> Any:
        """The results, contiguous; a tensor where there is one.

        Raises RuntimeError for results of other types, and inputs that were changed in place.
        """
        versions = [_version(x) for x in inputs]
        results = _several(self.function(*inputs, **self.numbers))
        if [_version(x) for x in inputs] != versions:
            self._fail("changes an input in place, which others read: return a new tensor")
        self._check(inputs, results)
        results = tuple(x.contiguous() for x in results)
        return results[0] if len(results) == 1 else results

    def grad(self, *given: Tensor) -> Any:
        """Gradients of the real inputs, from those of the real results and all inputs."""
        count = len(given) - len(self.takes)
        d, inputs = given[:count], given[count:]
        real = [x for x in inputs if x.is_floating_point()]
        if self.gradient is None:
            found = self._differentiated(d, inputs, real)
        else:
            found = _several(self.gradient(*d, *inputs, **self.numbers))
        shapes = [(x.shape, x.dtype) for x in found]
        if shapes != [(x.shape, x.dtype) for x in real]:
            self._fail(f"has gradients {_shown(found)} for inputs {_shown(real)}")
        return found[0] if len(found) == 1 else found

    def _differentiated(
        self, d: Sequence[Tensor], inputs: Sequence[Tensor], real: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        device = inputs[0].device
        before = _random_state(device)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
            results = _several(self.function(*leaves, **self.numbers))
        if not torch.equal(before, _random_state(device)):
            self._fail("draws random numbers, so that its gradients would be those of others")
        pairs = zip((x for x in results if x.is_floating_point()), d, strict=True)
        followed = [(x, gradient) for x, gradient in pairs if x.requires_grad]
        if not followed:
            self._fail("has results that autograd cannot follow: give its block a `gradient`")
        found = torch.autograd.grad(
            [x for x, _ in followed],
            [x for x in leaves if x.requires_grad],
            [gradient for _, gradient in followed],
            allow_unused=True,
        )
        none = zip(found, real, strict=True)
        return tuple(torch.zeros_like(x) if gradient is None else gradient for gradient, x in none)

    def _check(self, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Results have the element types and shapes that are declared."""
        sizes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for x, (dtype, dims) in zip(inputs, self.takes, strict=True):
            dtypes.setdefault(dtype, x.dtype)
            shape = tuple(x.shape)
            if dims[0][0] == "..":
                sizes[".."] = shape[: len(shape) - len(dims) + 1]
                dims, shape = dims[1:], shape[len(sizes[".."]) :]
            sizes |= {name: (n,) for (name, size), n in zip(dims, shape, strict=True) if not size}
        if len(results) != len(self.gives):
            self._fail(f"gives {len(results)} tensors, not {len(self.gives)}")
        for i, (x, (dtype, dims)) in enumerate(zip(results, self.gives, strict=True)):
            shape = tuple(n for name, size in dims for n in ([size] if size else sizes[name]))
            wanted = dtypes.get(dtype) or DTYPES.get(dtype, x.dtype)
            if tuple(x.shape) != shape or x.dtype != wanted:
                self._fail(f"gives {_shown([x])} as result {i + 1}, not {wanted} {list(shape)}")

    def _fail(self, what: str) -> None:
        raise RuntimeError(f"{self.function.__module__}.{self.function.__name__} {what}")


DTYPES = {"f32": torch.float32, "i32": torch.int32, "i64": torch.int64, "bool": torch.bool}


def _parsed(text: str) -> tuple[str, Dims]:
    dtype, _, dims = text.removesuffix("]").partition("[")
    pairs = (dim.partition("=") for dim in dims.split(", "))
    return dtype, tuple((name, int(size) if size else None) for name, _, size in pairs)


def _several(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _random_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def _shown(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{x.dtype} {list(x.shape)}" for x in tensors)
