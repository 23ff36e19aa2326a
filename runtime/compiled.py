"""A step of a served model as one call of compiled code, without Python in between.

A build with `--target cpu` holds the programs `decode`, `draft`, .. as C++ (`cpu/step.cpp`). They
work on the pages of the torch programs, so that either can go on where the other stopped.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import functional as F
from .config import Config
from .cxx import NotCompiled, compiled, identity
from .dispatch import wanted
from .fp8 import E4M3, RUN
from .graphs import CapturedModel, captures
from .pages import Draft, Pages, Rows
from .weights import SCALES, blocks_of

ELEMENTS = {torch.float32: "float", torch.bfloat16: "op::bf16"}
"""What a dtype is called in C++."""

QUANTIZED: Mapping[str | None, Mapping[str, str]] = {
    None: {},
    "fp8": {"FP8_PRODUCT": "op::e4m3"},
    "int8": {"PRODUCT": "int8_t", "FP8_PRODUCT": "int8_t"},
}
"""By the form of a model's quantized weights: which elements these have in C++."""

HEADS = 4
"""Heads that a thread attends with at once: `ROWS` of `operators.h`."""

WIDEST = 16
"""Numbers of a register, at most."""


@dataclass(frozen=True)
class Program:
    """What a compiled program binds, in its order, and the memory that it takes."""

    weights: tuple[str, ...]
    """Stored tensors of the model, which are read as they are."""
    products: tuple[str, ...]
    """Those of products, which may be quantized."""
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


def served(model: M) -> M | CompiledModel | CapturedModel:
    """The compiled programs of a model, or on a GPU its own, captured; else the model itself.

    `DSLC_KERNELS=torch` asks for no compiled ones, and so does a class with a `decode` of its own;
    any other reason is told in one line. Raises ValueError where the model cannot do without them.
    """
    if captures(model):
        return CapturedModel(model)
    source: Source | None = getattr(model, "compiled", None)
    try:
        if source is None or not _is_for_cpu(model):
            raise NotCompiled
        return CompiledModel(model, source)
    except NotCompiled as reason:
        if getattr(model, "quantized", None) == "int8":
            why = str(reason) or "torch was asked for, another device, or a `decode` of its own"
            raise ValueError(f"weights='int8', but there is no compiled step: {why}") from None
        if source is not None and str(reason):
            name = source.path.parent.parent.name
            print(f"{name}: torch computes its steps: {reason}", file=sys.stderr)
        return model


def _is_for_cpu(model: object) -> bool:
    """Whether compiled steps would compute what the model does, where it is."""
    on_cpu = isinstance(model, nn.Module) and model.device == torch.device("cpu")
    own = _definer(model, "decode") is not _definer(model, "compiled")
    return wanted() != "torch" and on_cpu and not own


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
        *((name, c_void_p) for name in ("blocks", "table", "weights", "products", "pools")),
        ("angles", c_void_p),
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
        names = "WEIGHT", "PRODUCT", "FP8_PRODUCT", "ENTRY"
        plain = dict.fromkeys(names, ELEMENTS[dtype])
        elements = {**plain, **QUANTIZED[self.model.quantized]}
        library = compiled(source.path, elements)
        self.threads = 0
        """Of a step; 0: as many as torch has."""
        self.positions = self.config.sequence.max_position_embeddings + 1
        self._programs = {
            name: _Bound(self, program, getattr(library, name))
            for name, program in source.programs.items()
        }

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Between steps torch computes on one thread: its others wait awake for work, on the cores
        that threads of the next step need."""
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(self.threads)
            self.threads = 0

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
        self._blocks: dict[str, Tensor] = {}
        self._places: tuple[int, ...] = ()
        self._pages: Pages | None = None
        self._call = call = _Call()
        self._memory = torch.empty(0)
        call.vocab = owner.config.params.vocab_size
        call.positions = owner.positions
        place = torch.arange(owner.positions)
        self._angles = [x for table in program.angles for x in F.rope_table(place, **table)]
        self._angle_places = _pointers(self._angles)
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
        n, threads = tokens.numel(), self.owner.threads or torch.get_num_threads()
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
        plain = [self._tensor(name) for name in self.program.weights]
        numbers = [self._tensor(name) for name in self.program.products]
        scales = [self._scales(name) for name in self.program.products]
        self._weights = [*plain, *numbers, *(one for one in scales if one is not None)]
        self._places = tuple(map(Tensor.data_ptr, self._weights))
        blocks = map(self._blocks_of_rows, self.program.products)
        products = (one for three in zip(numbers, scales, blocks, strict=True) for one in three)
        self._weight_places, self._product_places = _pointers(plain), _pointers(products)
        self._call.weights = ctypes.addressof(self._weight_places)
        self._call.products = ctypes.addressof(self._product_places)

    def _scales(self, name: str) -> Tensor | None:
        """Of quantized weights."""
        path = name.rpartition(".")[0]
        held = self.owner.model.get_submodule(path).quantized
        return self._tensor(f"{path}.{SCALES}") if held else None

    def _blocks_of_rows(self, name: str) -> Tensor | None:
        """Of FP8 weights the block of scales of each row, int32 [out]."""
        module = self.owner.model.get_submodule(name.rpartition(".")[0])
        if module.weight.dtype is not E4M3:
            return None
        if name not in self._blocks:
            parts = module.parts_of_rows or (module.weight.shape[-2],)
            begins = accumulate((blocks_of(n, E4M3) for n in parts), initial=0)
            rows = [first + torch.arange(n) // RUN for first, n in zip(begins, parts, strict=False)]
            self._blocks[name] = torch.cat(rows).to(torch.int32)
        return self._blocks[name]

    def _tensor(self, name: str) -> Tensor:
        """A stored tensor. Raises `NotCompiled` where it is not what C++ was told."""
        path, _, leaf = name.rpartition(".")
        model = self.owner.model
        module = model.get_submodule(path)
        tensor: Tensor = getattr(module, leaf)
        declared = getattr(module, "declarations", {}).get(leaf)
        dtype = (declared.dtype if declared is not None else None) or model.dtype
        if tensor.dtype is not dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
            kind = f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
            raise NotCompiled(f"{name} is {kind}, or not contiguous")
        return tensor

    def _bind_pools(self, cache: Pages) -> None:
        model = self.owner.model
        pools = [
            cache.pool(model.get_submodule(path), entry, shape, model.dtype, self.owner.device)
            for path, entry, shape in self.program.caches
        ]
        self._pages = cache
        self._pool_places = _pointers(pools)
        self._call.pools = ctypes.addressof(self._pool_places)


def _pointers(tensors: Iterable[Tensor | None]) -> ctypes.Array[c_void_p]:
    found = [None if one is None else one.data_ptr() for one in tensors]
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
