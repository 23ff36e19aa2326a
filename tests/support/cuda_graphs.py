"""A stand-in for CUDA graphs on the CPU, with which captured steps are tested.

While a graph is captured, every call of torch is recorded with its very tensors. A replay makes the
same calls on them and copies results to where they were: so what a graph would freeze, numbers of
the host and addresses, is frozen here. As on a GPU nothing is computed by a capture: what it wrote
is restored, and what it made is filled with nonsense. Reading a value is an error.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.support.host_waits import ByParts, HostWait, no_waits, wait_of

WAITS = "called a synchronizing CUDA operation"
"""What torch warns of."""


class StandInGraph:
    """Takes the place of `torch.cuda.CUDAGraph`."""

    now: StandInGraph | None = None
    """The one that is being captured."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.replays = 0
        self.own: dict[int, torch.UntypedStorage] = {}
        """What was made while it was captured."""
        self._written: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def record(self, function: Callable[..., Any], args: Any, kwargs: Any, mutable: bool) -> Any:
        """Calls a function and remembers it."""
        given = {_key(t): t for t in _tensors([args, kwargs])}
        if mutable:
            for key, tensor in given.items():
                if key not in self.own and key not in self._written:
                    storage = tensor.untyped_storage()
                    self._written[key] = storage, storage.clone()
        made = function(*args, **kwargs)
        fresh = [i for i, t in enumerate(_tensors(made)) if _key(t) not in given and t.numel()]
        for i in fresh:
            storage = _tensors(made)[i].untyped_storage()
            self.own[storage._cdata] = storage
        if fresh or mutable:
            self.calls.append(partial(_again, function, args, kwargs, _tensors(made), fresh))
        return made

    def end(self) -> None:
        for storage, before in self._written.values():
            storage.copy_(before)
        self._written.clear()
        for storage in self.own.values():
            storage.fill_(0x7F)

    @torch.inference_mode()
    def replay(self) -> None:
        self.replays += 1
        for call in self.calls:
            call()


def _again(
    function: Callable[..., Any], args: Any, kwargs: Any, made: list[Tensor], fresh: list[int]
) -> None:
    found = _tensors(function(*args, **kwargs))
    for i in fresh:
        made[i].copy_(found[i])


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Capture(ByParts):
    def call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        graph = StandInGraph.now
        assert graph is not None
        why = wait_of(func, args, kwargs)
        if why:
            raise HostWait(f"operation not permitted when stream is capturing: {func}: {why}")
        return graph.record(func, args, kwargs, func._schema.is_mutable)


@contextmanager
def _capture(
    graph: StandInGraph, pool: object, stream: object, capture_error_mode: str
) -> Iterator[None]:
    """Takes the place of `torch.cuda.graph`."""
    StandInGraph.now = graph
    try:
        with no_waits(), _Capture():
            yield
    finally:
        StandInGraph.now = None
        graph.end()


class _Debug:
    """Takes the place of torch's debug mode for waits."""

    def __init__(self) -> None:
        self.mode: Any = "default"
        self._watch: Any = nullcontext()

    def get(self) -> Any:
        return self.mode

    def set(self, mode: Any) -> None:
        self._watch.__exit__(None, None, None)
        self._watch = no_waits(_warn) if mode == "warn" else nullcontext()
        self._watch.__enter__()
        self.mode = mode


def _warn(why: str) -> None:
    """A warning at the innermost line of a package, or of a test."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
    here = [f for f in frames if not f.filename.endswith(("cuda_graphs.py", "host_waits.py"))]
    warnings.warn_explicit(WAITS, UserWarning, here[-1].filename, here[-1].lineno or 0)


class _Stream:
    def __init__(self, device: torch.device) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass


def stand_in(patch: pytest.MonkeyPatch) -> list[StandInGraph]:
    """Lets torch capture and replay on the CPU; the graphs, as they are made."""
    graphs: list[StandInGraph] = []
    debug = _Debug()

    def new() -> StandInGraph:
        graphs.append(StandInGraph())
        return graphs[-1]

    replaced = {
        "CUDAGraph": new,
        "graph": _capture,
        "graph_pool_handle": lambda: (0, 1),
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda stream: nullcontext(),
        "get_sync_debug_mode": debug.get,
        "set_sync_debug_mode": debug.set,
    }
    for name, value in replaced.items():
        patch.setattr(torch.cuda, name, value)
    return graphs


def as_kernels(patch: pytest.MonkeyPatch, package: ModuleType) -> None:
    """What a build has kernels for counts as one launch each: the function of `runtime/` that the
    kernel stands in for, inside of which anything goes."""
    kernels = sys.modules[f"{package.__name__}.kernels"]
    for space in [one for one in vars(kernels).values() if isinstance(one, type)]:
        for name, function in list(vars(space).items()):
            reference = getattr(function, "__wrapped__", None)
            if reference is not None:
                patch.setattr(space, name, staticmethod(_launch(reference)))


def _launch(function: Callable[..., Any]) -> Callable[..., Any]:
    def alone(*arguments: Any, **named: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments, **named)

    @wraps(function)
    def launched(*arguments: Any, **named: Any) -> Any:
        if StandInGraph.now is None:
            return alone(*arguments, **named)
        return StandInGraph.now.record(alone, arguments, named, mutable=False)

    return launched
