"""How a module declares its weights, stores them, and names them to the world.

A weight has two names. *Stored*: where it lies in this module, for example
`model.layers.3.mlp.experts.gate_up_proj.weight` [256, 4096, 7168], gate and up of all experts in
one tensor. *Published*: what checkpoints and `state_dict()` call it,
`...mlp.experts.17.gate_proj.weight` [2048, 7168]. `published` is the one place that maps one to the
other; initialisation, loading and saving go through it, and `state_dict` follows it by the hooks of
`Stack` and `Joined`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import fp8, int8
from .normal import fill_normal, tensor_key
from .saved import Saved

Fp8 = fp8.Quantized


@dataclass(frozen=True)
class Declaration:
    """One stored tensor: its shape, and N(value, std^2) as its first values."""

    shape: tuple[int, ...]
    value: float
    std: float
    dtype: torch.dtype | None
    """None: the dtype of the model. Any other is kept, also by `model.to(...)`."""
    buffer: bool
    """A buffer is saved like a parameter, but no gradient reaches it."""
    fp8: str = ""
    """How the scales of its FP8 copy are kept, `fp32` or `ue8m0`; empty: it has none."""
    decay: bool = True
    """Whether weight decay applies to it, if it is a matrix; not to learned scales of any shape."""


def normal(
    *shape: int,
    std: float,
    mean: float = 0.0,
    dtype: torch.dtype | None = None,
    buffer: bool = False,
    fp8: str = "",
    decay: bool = True,
) -> Declaration:
    """A tensor that starts as N(mean, std^2)."""
    return Declaration(shape, mean, std, dtype, buffer, fp8, decay)


def ones(
    *shape: int, dtype: torch.dtype | None = None, buffer: bool = False, decay: bool = True
) -> Declaration:
    """A tensor that starts as ones, as the weights of norms do."""
    return Declaration(shape, 1.0, 0.0, dtype, buffer, decay=decay)


def zeros(
    *shape: int, dtype: torch.dtype | None = None, buffer: bool = False, decay: bool = True
) -> Declaration:
    """A tensor that starts as zeros, as biases do."""
    return Declaration(shape, 0.0, 0.0, dtype, buffer, decay=decay)


class Block(nn.Module):
    """A module that holds weights, groups of them and other blocks.

    It reads those of its weights that are `Joined` by their published names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(_rejoin)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Hooks run, but for training: the generated backward pass would not see what they do."""
        if inputs and isinstance(inputs[-1], Saved):
            return self.forward(*inputs, **named)
        return super().__call__(*inputs, **named)


class Tensors(Block):
    """A named group of weights and of further groups: `Tensors(weight=normal(8, 4, std=0.02))`.

    Tensors are made on the meta device: the model decides on dtype and device once it is whole.
    """

    def __init__(self, **members: Declaration | nn.Module) -> None:
        super().__init__()
        self.declarations = {n: m for n, m in members.items() if isinstance(m, Declaration)}
        self._copy: _Copy | None = None
        self._dense: tuple[int | None, torch.dtype, Tensor] | None = None
        for name, member in members.items():
            if isinstance(member, nn.Module):
                self.add_module(name, member)
                continue
            tensor = torch.empty(member.shape, dtype=member.dtype, device="meta")
            if member.buffer:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))

    if TYPE_CHECKING:  # members are known by name only; nn.Module would have them Tensor | Module

        def __getattr__(self, name: str) -> Any: ...

    keeps_copy = False
    """Whether the FP8 copy stays where it is, for CUDA graphs that read it."""

    quantize_weight: Callable[..., Fp8] = staticmethod(fp8.quantize_weight)
    """How the FP8 copy is made; kernels stand in its place where a build has them."""

    @property
    def fp8(self) -> Fp8:
        """The FP8 copy of `weight`: E4M3 [.., out, in], scales for each 128 x 128 of it.

        Made again whenever the weight is another tensor or was changed in place, by whoever, in
        ways that autograd counts. What writes into its memory otherwise must call
        `torch.autograd.graph.increment_version`.
        """
        if self.quantized:
            return self.weight, getattr(self, SCALES)
        weight = self.weight
        version = None if weight.is_inference() else weight._version
        if self._copy is None or not self._copy.is_of(weight, version):
            scale = self.declarations["weight"].fp8
            with torch.no_grad():
                q, s = self.quantize_weight(weight.detach(), scale=scale, parts=self.parts_of_rows)
                if self._copy is not None and self.keeps_copy:
                    q, s = self._copy.q.copy_(q), self._copy.s.copy_(s)
            self._copy = _Copy(weight, weight.data_ptr(), version, q, s)
        return self._copy.q, fp8.refuse_gradient(self._copy.s, weight)

    @property
    def has_fp8(self) -> bool:
        """Whether products read the FP8 copy."""
        return "weight" in self.declarations and bool(self.declarations["weight"].fp8)

    @property
    def quantized(self) -> bool:
        """Whether `weight` itself is E4M3 or int8, with scales in `weight_scale_inv`, for
        inference."""
        return SCALES in self._buffers

    def quantize(self, dtype: torch.dtype) -> None:
        """Lets quantized numbers and their scales take the place of `weight`, on the meta device:
        E4M3 with a scale for each 128 x 128, int8 with one for each row."""
        declared, rows = self.declarations["weight"], self.parts_of_rows
        *experts, out, width = declared.shape
        runs = 1 if dtype is torch.int8 else -(-width // fp8.RUN)
        blocks = sum(blocks_of(n, dtype) for n in rows or (out,))
        self.declarations |= {
            "weight": replace(declared, dtype=dtype, buffer=True),
            SCALES: ones(*experts, blocks, runs, dtype=torch.float32, buffer=True),
        }
        del self.weight
        for name in ("weight", SCALES):
            one = self.declarations[name]
            self.register_buffer(name, torch.empty(one.shape, dtype=one.dtype, device="meta"))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """`weight` for what does not compute in FP8: as it is, or multiplied out and held."""
        if not self.quantized:
            return self.weight  # type: ignore[no-any-return]
        q, s = self.fp8
        version = None if q.is_inference() else q._version
        if self._dense is None or self._dense[:2] != (version, dtype):
            wide = fp8.dequantize_weight(q, s, self.parts_of_rows).to(dtype)
            self._dense = version, dtype, wide
        return self._dense[2]

    @property
    def parts_of_rows(self) -> tuple[int, ...]:
        """Sizes of the rows in which blocks of scales restart; none if that changes nothing."""
        return ()

    def __setattr__(self, name: str, value: Any) -> None:
        # Whoever exchanges tensors of a module, as fully_shard does, may keep their versions.
        if name == "weight":
            self.__dict__["_copy"] = None
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tensors:
        """What `to`, `bfloat16`, `to_empty` and the like do; a declared dtype survives them."""
        fixed = {
            name: getattr(self, name).detach()
            for name, declared in self.declarations.items()
            if declared.dtype is not None
        }
        self._copy = self._dense = None
        super()._apply(fn, recurse)
        for name, before in fixed.items():
            tensor = getattr(self, name)
            if tensor.dtype != before.dtype:
                tensor.data = before.to(tensor.device)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(d.shape)}" for name, d in self.declarations.items())


@dataclass(frozen=True)
class _Copy:
    """The FP8 copy of a weight, and what it was made of."""

    weight: Tensor
    place: int
    version: int | None
    q: Tensor
    s: Tensor

    def is_of(self, weight: Tensor, version: int | None) -> bool:
        same = self.weight is weight and self.place == weight.data_ptr()
        return same and self.version == version


class Joined(Tensors):
    """Weights that meet the same input, stored as one: the rows of each behind those of the former.

    `Joined(gate_proj=normal(8, 4, std=0.02), up_proj=normal(8, 4, std=0.02))` holds `weight`
    [16, 4], published as `gate_proj.weight` and `up_proj.weight` beside it, each with first values
    of its own. In a `Stack`, each has the dimension of the experts before the two.
    """

    def __init__(self, **parts: Declaration) -> None:
        first = next(iter(parts.values()))
        for name, part in parts.items():
            if _but_rows(part) != _but_rows(first):
                raise ValueError(f"{name} cannot be joined: {part} does not go with {first}")
        rows = {name: part.shape[-2] for name, part in parts.items()}
        shape = (*first.shape[:-2], sum(rows.values()), first.shape[-1])
        super().__init__(weight=replace(first, shape=shape))
        self.parts, self.rows = parts, rows
        self.register_state_dict_post_hook(_unjoin)

    @property
    def parts_of_rows(self) -> tuple[int, ...]:
        rows = tuple(self.rows.values())
        return () if all(n % fp8.RUN == 0 for n in rows[:-1]) else rows

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(d.shape)}" for name, d in self.parts.items())


def _but_rows(part: Declaration) -> tuple[object, ...]:
    """What the parts of a `Joined` have in common."""
    return (*part.shape[:-2], part.shape[-1], part.dtype, part.buffer, part.fp8)


class Stack(nn.Module):
    """`count` equal groups of weights, stored as one: each tensor's first dimension counts them.

    Published as if they were a list: `Stack(256, gate_proj=Tensors(weight=normal(256, ...)))`
    reads and writes `0.gate_proj.weight` ... `255.gate_proj.weight`.
    """

    def __init__(self, count: int, **members: Tensors) -> None:
        super().__init__()
        self.count = self.total = count
        self.ids: Sequence[int] = range(count)
        """The number of each part that is held, among all of them."""
        for name, member in members.items():
            self.add_module(name, member)
        for name, tensor in _stored(self):
            if tensor.shape[:1] != (count,):
                shape = list(tensor.shape)
                raise ValueError(f"a stack of {count} cannot hold {name} of shape {shape}")
        if any(isinstance(module, Stack) for module in self.modules() if module is not self):
            raise ValueError("a stack cannot hold another stack")
        self.register_state_dict_post_hook(_unstack)
        self.register_load_state_dict_pre_hook(_restack)
        self.register_load_state_dict_pre_hook(_rejoin)

    def hold(self, ids: Sequence[int]) -> None:
        """Keeps parts by their numbers, on the meta device; a number may come more than once."""
        self.count, self.ids = len(ids), ids
        for member in (m for m in self.modules() if isinstance(m, Tensors)):
            for name, one in member.declarations.items():
                shape = (self.count, *one.shape[1:])
                member.declarations[name] = replace(one, shape=shape)
                new = torch.empty(shape, dtype=getattr(member, name).dtype, device="meta")
                setattr(member, name, new if one.buffer else nn.Parameter(new))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


SCALES = "weight_scale_inv"
"""What checkpoints call the scales of an FP8 `weight`, which they multiply all the same."""


def blocks_of(rows: int, dtype: torch.dtype) -> int:
    """Blocks of so many rows of a quantized weight, each with scales of its own."""
    return rows if dtype is torch.int8 else -(-rows // fp8.RUN)


Index = tuple[int | slice | EllipsisType, ...]


@dataclass(frozen=True)
class Published:
    """A tensor as checkpoints know it, and where it lies."""

    name: str
    storage: Tensor
    """The stored parameter or buffer."""
    index: Index
    """Which part of `storage`: i for the i-th part of a `Stack`, then the rows of a part of a
    `Joined`; () for all of it."""
    declaration: Declaration | None
    """None for tensors that were put into the module by other means than `Tensors`."""
    scales: Tensor | None = None
    """Of a tensor that is held quantized: a view of its scales, [blocks of rows, blocks]."""

    @property
    def tensor(self) -> Tensor:
        """A view into the storage: writing to it changes the model."""
        return self.storage.detach()[self.index]

    @property
    def grad(self) -> Tensor | None:
        """The gradient of this part, if the storage has one."""
        return None if self.storage.grad is None else self.storage.grad[self.index]

    def take(self, values: Tensor, scales: Tensor | None = None) -> None:
        """Writes values: numbers, which are quantized where that is held, or E4M3 with `scales`."""
        if self.scales is not None:
            if scales is None and self.dtype is torch.int8:
                values, scales = int8.quantize_rows(values)
            elif scales is None:
                assert self.declaration is not None
                values, scales = fp8.quantize_weight(values, self.declaration.fp8)
            self.scales.copy_(scales)
        self.tensor.copy_(values)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype


def published(module: nn.Module, prefix: str = "", index: Index = ()) -> Iterator[Published]:
    """Every tensor below `module`, in order, under the name that checkpoints use.

    Copies that a checkpoint holds besides (`CheckpointModule.aliases`) are not among them.
    """
    if isinstance(module, Joined):
        yield from _published_parts(module, _around(prefix), index)
        return
    declarations = module.declarations if isinstance(module, Tensors) else {}
    for name, tensor in _own(module):
        if name != SCALES:
            scales = getattr(module, SCALES)[index] if _held(module) else None
            yield Published(prefix + name, tensor, index, declarations.get(name), scales)
    parts = enumerate(module.ids) if isinstance(module, Stack) else ((None, 0),)
    for part, id in parts:
        here, inside = (prefix, index)
        if part is not None:
            here, inside = f"{prefix}{id}.", (*index, part)
        for name, child in module.named_children():
            yield from published(child, f"{here}{name}.", inside)


def _published_parts(joined: Joined, prefix: str, index: Index) -> Iterator[Published]:
    end = block = 0
    for name, rows in joined.rows.items():
        start, end = end, end + rows
        first, block = block, block + blocks_of(rows, joined.weight.dtype)
        place = (*index, ..., slice(start, end), slice(None))
        held = getattr(joined, SCALES)[index][..., first:block, :] if _held(joined) else None
        yield Published(f"{prefix}{name}.weight", joined.weight, place, joined.parts[name], held)


def _held(module: nn.Module) -> bool:
    return isinstance(module, Tensors) and module.quantized


def _around(prefix: str) -> str:
    """The prefix of what is beside the module whose prefix is given: `mlp.gate_up.` -> `mlp.`."""
    before, dot, _ = prefix[:-1].rpartition(".")
    return before + dot


def initialize(module: nn.Module, seed: int) -> None:
    """Gives every declared tensor its first values.

    Values follow from `seed`, the published name and the index of the element, regardless of the
    device, the storage and the order. On the meta device nothing happens.
    """
    for entry in published(module):
        declared = entry.declaration
        if declared is None or entry.storage.is_meta:
            continue
        if entry.scales is not None:
            entry.take(first_values(entry.name, entry.shape, declared.value, declared.std, seed))
        elif declared.std:
            key = tensor_key(seed, entry.name)
            fill_normal(entry.tensor, key, declared.value, declared.std)
        else:
            entry.tensor.fill_(declared.value)


def first_values(name: str, shape: tuple[int, ...], value: float, std: float, seed: int) -> Tensor:
    """What a published tensor begins with: N(value, std^2), in float32 on the CPU."""
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    fill_normal(values, tensor_key(seed, name), value, std)
    return values


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `module` itself saves."""
    yield from module.named_parameters(recurse=False)
    for name, tensor in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, tensor


def _stored(stack: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors below a stack by stored name, those of a `Joined` one by one."""
    found = []
    for name, child in stack.named_children():
        if isinstance(child, Joined):
            found += _views(child)
        else:
            found += [(f"{name}.{n}", t) for n, t in [*_own(child), *_stored(child)]]
    return found


def _views(joined: Joined) -> list[tuple[str, Tensor]]:
    """Its parts by their names beside it, and their scales where it is quantized."""
    return [
        (f"{name}.{tensor}", view)
        for tensor, rows in _cuts(joined).items()
        for name, view in zip(
            joined.rows, getattr(joined, tensor).detach().split(rows, -2), strict=True
        )
    ]


def _cuts(joined: Joined) -> dict[str, list[int]]:
    """How many rows of each of its tensors belong to each part."""
    rows = list(joined.rows.values())
    dtype = joined.weight.dtype
    blocks = {SCALES: [blocks_of(n, dtype) for n in rows]} if joined.quantized else {}
    return {"weight": rows, **blocks}


def _unstack(stack: Stack, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """After `state_dict()`: gives views of each part instead of the stored tensors."""
    parts = {name: state.pop(prefix + name) for name, _ in _stored(stack)}
    for i, id in enumerate(stack.ids):
        for name, tensor in parts.items():
            state[f"{prefix}{id}.{name}"] = tensor[i]


def _unjoin(joined: Joined, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """The same for the parts of a `Joined`."""
    for tensor, rows in _cuts(joined).items():
        views = state.pop(f"{prefix}{tensor}").split(rows, -2)
        for name, view in zip(joined.rows, views, strict=True):
            state[f"{_around(prefix)}{name}.{tensor}"] = view


def _restack(
    stack: Stack,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Before `load_state_dict()`: puts the parts together, and reports those that do not fit."""
    for name, stored in _stored(stack):
        names = {f"{prefix}{id}.{name}": stored[i] for i, id in enumerate(stack.ids)}
        values = _take(state, names, missing, errors)
        if values is None:
            state[prefix + name] = stored.detach()
        else:
            of = dict(zip(dict.fromkeys(stack.ids), values, strict=True))
            state[prefix + name] = torch.stack([of[id] for id in stack.ids])


def _rejoin(
    block: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """The same for every `Joined` in a block; torch shows a module only what is named below it."""
    for name, child in block.named_children():
        if isinstance(child, Joined):
            for tensor in _cuts(child):
                views = {prefix + part: v for part, v in _views(child) if part.endswith(tensor)}
                values = _take(state, views, missing, errors)
                stored = getattr(child, tensor).detach()
                state[f"{prefix}{name}.{tensor}"] = (
                    stored if values is None else torch.cat(values, -2)
                )


def _take(
    state: dict[str, Any], wanted: dict[str, Tensor], missing: list[str], errors: list[str]
) -> list[Tensor] | None:
    """Takes what is `wanted` out of a state; None if anything is absent or has another shape."""
    absent = [name for name in wanted if name not in state]
    wrong = [n for n, like in wanted.items() if n in state and state[n].shape != like.shape]
    missing += absent
    errors += [
        f"size mismatch for {n}: the state has {list(state[n].shape)}, "
        f"the model {list(wanted[n].shape)}."
        for n in wrong
    ]
    values = [state.pop(n) for n in wanted if n in state]
    return None if absent or wrong else values
