"""Steps of fixed shapes as CUDA graphs: launches that are captured once and replayed by one call.

A launch takes the host longer than a small kernel takes the GPU. A graph launches the same kernels
with the same addresses and the same numbers of the host: so inputs are copied to where they were,
results are copied from where they are, and a graph is forgotten when what else it reads has moved.

These have been tested with a stand-in for CUDA graphs, and never run on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .dispatch import choice_of
from .pages import Draft, Group, Pages, Rows

VARIABLE = "DSLC_GRAPHS"
"""Environment variable: `off` launches every kernel from Python, for debugging."""

WARM_UP = 2
"""Calls before a capture: kernels are compiled in the first, waits looked for in the last."""

R = TypeVar("R")


@cache
def wanted() -> bool:
    """Whether `DSLC_GRAPHS` is `on`, the default. Raises ValueError for all but `on` and `off`."""
    return choice_of(VARIABLE, ("on", "off"), "on") == "on"


def captures(model: object) -> bool:
    """Whether steps of a model are captured: of a whole one on a GPU."""
    if not isinstance(model, nn.Module) or getattr(model, "share", None) is not None:
        return False
    device: Any = getattr(model, "device", None)
    return isinstance(device, torch.device) and device.type == "cuda" and wanted()


class Graphs:
    """The captured steps of a model. They share memory, for each ends before the next one begins.

    `what` they are is how messages call them. Where a step waits for the GPU, one warning names the
    lines, and `usable` turns false: then every step is launched from Python.
    """

    def __init__(self, what: str, device: torch.device) -> None:
        self.what = what
        self.usable = True
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._state: Hashable = None
        self._calls: dict[Hashable, int] = {}
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def depend_on(self, state: Hashable) -> None:
        """Forgets all graphs if what they depend on is no longer what it was."""
        if state != self._state:
            self._state = state
            self._calls.clear()
            self._captured.clear()

    def run(self, key: Hashable, step: Callable[[], R]) -> R:
        """What `step` gives; the same step whenever the key is the same.

        It is called a few times, then captured, and only replayed from there on. Results are valid
        until the next run. Raises RuntimeError where CUDA cannot capture it.
        """
        if key not in self._captured:
            if self._calls.get(key, 0) < WARM_UP or not self.usable:
                return self._call(key, step)
            self._captured[key] = self._capture(step)
        graph, results = self._captured[key]
        graph.replay()
        return results  # type: ignore[no-any-return]

    def _call(self, key: Hashable, step: Callable[[], R]) -> R:
        """On a stream of its own, as captures are: what libraries keep for a stream is there."""
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        before = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before)
        lines: list[str] = []
        with torch.cuda.stream(self._stream), _waits(lines) if calls == WARM_UP else nullcontext():
            results = step()
        before.wait_stream(self._stream)
        if lines:
            self.usable = False
            warnings.warn(
                f"{self.what} waits for the GPU at {', '.join(dict.fromkeys(lines))}: its kernels "
                "are launched one by one, without CUDA graphs",
                stacklevel=3,
            )
        return results

    def _capture(self, step: Callable[[], R]) -> tuple[torch.cuda.CUDAGraph, R]:
        graph = torch.cuda.CUDAGraph()
        try:
            # What other threads do meanwhile, a checkpoint or NCCL's watchdog, is none of it.
            with torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):
                return graph, step()
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.what} cannot be captured as a CUDA graph: {error}; set {VARIABLE}=off to "
                "do without"
            ) from error


@contextmanager
def _waits(lines: list[str]) -> Iterator[None]:
    """Adds the lines that wait for the GPU within; other warnings pass."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for one in told:
        if "called a synchronizing" in str(one.message):
            lines.append(f"{one.filename}:{one.lineno}")
        elif "Synchronization debug mode" not in str(one.message):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


class CapturedModel:
    """The programs `decode`, `draft`, .. of a model on a GPU, for pages.

    Steps whose rows attend each by its own table, as decoding does, are captured: filled up to the
    next power of two of rows and of blocks, so that there are few graphs. Others, with parts of
    prompts, are launched from Python.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.graphs = Graphs(f"a step of {type(model).__module__}", model.device)
        self._tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
        self._inputs: dict[tuple[int, int], _Inputs] = {}

    def decode(self, tokens: Tensor, position: Tensor, cache: Pages) -> Tensor:
        """What the model's own `decode` computes with pages: logits [scored, vocab]."""
        return self._run(self.model.decode, tokens, position, cache)

    def drafter(self, module: int) -> Draft:
        """What the model's own `drafter` gives, with pages."""
        program = self.model.drafter(module)

        def draft(state: Tensor, tokens: Tensor, position: Tensor, cache: Pages) -> Tensor:
            return self._run(program, tokens, position, cache, state)

        return draft

    def _run(
        self,
        program: Callable[..., Tensor],
        tokens: Tensor,
        position: Tensor,
        cache: Pages,
        *state: Tensor,
    ) -> Tensor:
        rows = cache.rows
        if not self.graphs.usable or not rows.apart:
            return program(*state, tokens, position, cache)
        # Weights that were written to have other FP8 copies, or other products of them.
        self.graphs.depend_on((cache, *map(_state_of, self._tensors)))
        count = len(rows.slots)
        shape = _power(count), _power(max(group.table.shape[1] for group in rows.groups))
        if shape not in self._inputs:
            self._inputs[shape] = _Inputs(*shape, cache.page, tokens.device)
        inputs = self._inputs[shape]
        inputs.fill(rows, tokens, position, *state)
        step = partial(inputs.compute, program, cache, bool(state))
        logits, states, broken = self.graphs.run((program.__name__, *shape), step)
        cache.rows = rows
        cache.states, cache.broken = states[:, :count].clone(), broken[:count].clone()
        return logits[rows.scored]


def _state_of(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor lies, and how often it was written to, as far as autograd knows."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


class _Inputs:
    """Where a captured step of up to `size` rows, each of up to `width` blocks, reads its inputs.

    Rows that fill it up write to block 0, which is nobody's, and see nothing else.
    """

    def __init__(self, size: int, width: int, page: int, device: torch.device) -> None:
        self._numbers = torch.zeros(size, 4 + width, dtype=torch.int64, device=device)
        """Of each row: token, position, slot, length, blocks."""
        self._spare = torch.zeros_like(self._numbers)
        self._spare[:, 2] = torch.arange(size, device=device) % page
        self._spare[:, 3] = 1
        self._state: Tensor | None = None
        self.tokens, self.position = self._numbers[:, 0][None], self._numbers[:, 1][None]
        table = Group(slice(0, size), self._numbers[:, 4:])
        scored = torch.arange(size, device=device)
        self.rows = Rows(self._numbers[:, 2], self._numbers[:, 3], (table,), scored)

    def fill(self, rows: Rows, tokens: Tensor, position: Tensor, *state: Tensor) -> None:
        """Takes the inputs of a step; `state` [1, n, hidden] is for drafts only."""
        count = len(rows.slots)
        self._numbers.copy_(self._spare)
        own = torch.stack([tokens[0], position[0], rows.slots, rows.lengths], 1)
        self._numbers[:count, :4] = own
        for group in rows.groups:
            self._numbers[group.rows, 4 : 4 + group.table.shape[1]] = group.table
        for given in state:
            if self._state is None:
                self._state = given.new_zeros(1, len(self._numbers), given.shape[2])
            self._state[:, :count] = given

    def compute(
        self, program: Callable[..., Tensor], cache: Pages, drafts: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [size, vocab], states and broken rows of a step."""
        cache.begin(self.rows)
        state = [self._state] if drafts else []
        logits = program(*state, self.tokens, self.position, cache)
        return logits, cache.states, cache.broken
