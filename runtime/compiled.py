"""A step of a served model as one call of compiled code, without Python in between.

A build with `--target cpu` holds the programs `decode`, `draft`, .. as C++ (`cpu/step.cpp`). They
work on the pages of the torch programs, so that either can go on where the other stopped.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Mapping, Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import functional as F
from .config import Config
from .cxx import NotCompiled, compiled, identity
from .dispatch import wanted
from .pages import Draft, Pages, Rows

ELEMENTS = {torch.float32: "float", torch.bfloat16: "op::bf16"}
"""What a dtype is called in C++."""

HEADS = 4
"""Heads that a thread attends with at once: `ROWS` of `operators.h`."""

WIDEST = 16
"""Numbers of a register, at most."""


@dataclass(frozen=True)
class Program:
    """What a compiled program binds, in its order, and the memory that it takes."""

    weights: tuple[str, ...]
    """Stored tensors of the model."""
    caches: tuple[tuple[str, str, tuple[int, ...]], ...]
    """Module, entry, and the shape of what is remembered of a token."""
    angles: tuple[Mapping[str, Any], ...]
    """Arguments of `rope_table`."""
    hidden: int
    """Numbers of a state."""
    numbers: tuple[int, int]
    """Numbers of memory: for each row, and besides."""


@dataclass(frozen=True)
class Source:
    """The C++ of a build and the programs in it."""

    path: Path
    programs: Mapping[str, Program]


M = TypeVar("M")


def served(model: M) -> M | CompiledModel:
    """The compiled programs of a model; the model itself where there are none.

    `DSLC_KERNELS=torch` asks for the latter, and so does a class with a `decode` of its own; any
    other reason is told in one line.
    """
    source: Source | None = getattr(model, "compiled", None)
    if source is None or wanted() == "torch":
        return model
    if not isinstance(model, nn.Module) or model.device != torch.device("cpu"):
        return model
    if _definer(model, "decode") is not _definer(model, "compiled"):
        return model
    try:
        return CompiledModel(model, source)
    except NotCompiled as reason:
        name = source.path.parent.parent.name
        print(f"{name}: torch computes its steps: {reason}", file=sys.stderr)
        return model


def fingerprint(model: type) -> str:
    """What the bits of compiled steps of such a model depend on; of torch's, a word."""
    source: Source | None = getattr(model, "compiled", None)
    return "torch" if source is None or wanted() == "torch" else identity(source.path)


def _definer(model: object, name: str) -> type:
    return next(one for one in type(model).__mro__ if name in vars(one))


class _Call(ctypes.Structure):
    """`op::Call` of `operators.h`."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "scored", "threads", "page", "vocab", "positions")),
        *((name, c_void_p) for name in ("tokens", "position", "slots", "lengths", "scored_rows")),
        *((name, c_void_p) for name in ("blocks", "table", "weights", "pools", "angles")),
        *((name, c_void_p) for name in ("state", "logits", "states", "broken")),
        ("workspace", c_void_p),
        ("workspace_size", c_int64),
        ("scratch", c_void_p),
        ("scratch_size", c_int64),
    )


class CompiledModel:
    """The programs `decode`, `draft`, .. of a model, for pages on a CPU.

    Logits and states are float32. Raises `NotCompiled` where the code cannot be compiled or the
    model is in another dtype.
    """

    def __init__(self, model: Any, source: Source) -> None:
        self.model = model
        dtype: torch.dtype = self.model.dtype
        if dtype not in ELEMENTS:
            raise NotCompiled(f"weights in {str(dtype).removeprefix('torch.')}")
        if getattr(self.model, "share", None) is not None:
            raise NotCompiled("this rank holds a share of the model")
        self.config: Config = self.model.config
        self.device: torch.device = self.model.device
        element = ELEMENTS[dtype]
        library = compiled(source.path, {"WEIGHT": element, "ENTRY": element})
        self.positions = self.config.sequence.max_position_embeddings + 1
        self._programs = {
            name: _Bound(self, program, getattr(library, name))
            for name, program in source.programs.items()
        }

    def decode(self, tokens: Tensor, position: Tensor, cache: Pages) -> Tensor:
        """What the model's own `decode` computes with pages: logits [scored, vocab]."""
        return self._programs["decode"](tokens, position, cache)

    def drafter(self, module: int) -> Draft:
        """What the model's own `drafter` gives, with pages."""
        program = self._programs[self.model.drafter(module).__name__]

        def draft(state: Tensor, tokens: Tensor, position: Tensor, cache: Pages) -> Tensor:
            return program(tokens, position, cache, state)

        return draft


class _Bound:
    """One program with its weights."""

    def __init__(self, owner: CompiledModel, program: Program, function: Any) -> None:
        self.owner = owner
        self.program = program
        self.function = function
        function.argtypes, function.restype = [ctypes.POINTER(_Call)], ctypes.c_int
        self._weights: list[Tensor] = []
        self._places: tuple[int, ...] = ()
        self._pages: Pages | None = None
        self._call = call = _Call()
        self._memory = torch.empty(0)
        call.vocab = owner.config.params.vocab_size
        call.positions = owner.positions
        place = torch.arange(owner.positions)
        self._angles = [x for table in program.angles for x in F.rope_table(place, **table)]
        self._angle_places = _pointers(x.data_ptr() for x in self._angles)
        call.angles = ctypes.addressof(self._angle_places)
        self._bind_weights()

    def __call__(
        self, tokens: Tensor, position: Tensor, cache: Pages, state: Tensor | None = None
    ) -> Tensor:
        call, rows = self._call, cache.rows
        if tuple(map(Tensor.data_ptr, self._weights)) != self._places:
            self._bind_weights()
        if cache is not self._pages:
            self._bind_pools(cache)
        n, threads = tokens.numel(), torch.get_num_threads()
        scored = rows.scored.to(torch.int32)
        blocks, table, longest = _tables(rows)
        logits = torch.empty(len(scored), call.vocab)
        states = torch.empty(1, n, self.program.hidden)
        if state is not None:
            state = state.float().contiguous()
            call.state = state.data_ptr()
        call.rows, call.scored, call.threads, call.page = n, len(scored), threads, cache.page
        tokens, position = tokens.contiguous(), position.contiguous()
        call.tokens, call.position = tokens.data_ptr(), position.data_ptr()
        call.slots, call.lengths = rows.slots.data_ptr(), rows.lengths.data_ptr()
        call.scored_rows = scored.data_ptr()
        call.blocks, call.table = blocks.data_ptr(), table.data_ptr()
        call.logits, call.states = logits.data_ptr(), states.data_ptr()
        call.broken = cache.broken.data_ptr()
        self._make_room(n, threads, longest * cache.page)
        if self.function(ctypes.byref(call)):
            raise ValueError(
                f"tokens must be from 0 to {call.vocab - 1} and positions from 0 to "
                f"{call.positions - 1}"
            )
        cache.states = states
        return logits

    def _make_room(self, rows: int, threads: int, keys: int) -> None:
        """Memory for values of `rows` rows, and for scores of up to `keys` keys in each thread."""
        each, once = self.program.numbers
        values = each * rows + once
        scores = HEADS * (-(-keys // WIDEST) * WIDEST)
        if self._memory.numel() < values + threads * scores:
            self._memory = torch.empty(values + threads * scores)
        call = self._call
        call.workspace, call.workspace_size = self._memory.data_ptr(), values
        call.scratch, call.scratch_size = self._memory.data_ptr() + 4 * values, scores

    def _bind_weights(self) -> None:
        """Takes the weights where they lie. Raises `NotCompiled` for what C++ would misread."""
        model = self.owner.model
        self._weights = []
        for name in self.program.weights:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            weight = getattr(module, leaf)
            declared = getattr(module, "declarations", {}).get(leaf)
            dtype = (declared.dtype if declared is not None else None) or model.dtype
            if (
                weight.dtype is not dtype
                or not weight.is_contiguous()
                or weight.device.type != "cpu"
            ):
                kind = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device}"
                raise NotCompiled(f"{name} is {kind}, or not contiguous")
            self._weights.append(weight)
        self._places = tuple(map(Tensor.data_ptr, self._weights))
        self._weight_places = _pointers(self._places)
        self._call.weights = ctypes.addressof(self._weight_places)

    def _bind_pools(self, cache: Pages) -> None:
        model = self.owner.model
        pools = [
            cache.pool(model.get_submodule(path), entry, shape, model.dtype, self.owner.device)
            for path, entry, shape in self.program.caches
        ]
        self._pages = cache
        self._pool_places = _pointers(pool.data_ptr() for pool in pools)
        self._call.pools = ctypes.addressof(self._pool_places)


def _pointers(places: Iterable[int]) -> ctypes.Array[c_void_p]:
    found = tuple(places)
    return (c_void_p * len(found))(*found)


def _tables(rows: Rows) -> tuple[Tensor, Tensor, int]:
    """All tables of blocks in one, where that of each row begins, and the length of the longest."""
    begins: list[int] = []
    start = 0
    for group in rows.groups:
        count, (sequences, width) = group.rows.stop - group.rows.start, group.table.shape
        step = width if sequences > 1 else 0
        begins += range(start, start + count * step, step) if step else [start] * count
        start += sequences * width
    tables: Sequence[Tensor] = [group.table.flatten() for group in rows.groups]
    blocks = tables[0] if len(tables) == 1 else torch.cat(list(tables))
    return blocks, torch.tensor(begins), max(group.table.shape[1] for group in rows.groups)
