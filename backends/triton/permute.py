"""Tokens to experts and back: how rows are cut, and which functions a model needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from backends.render import render
from backends.triton.instances import OpInstance, OpInstances, spans
from backends.triton.kernel import TORCH, Arg, Case, KernelFile, nbytes
from backends.triton.target import Target
from compiler.graph.types import Type
from compiler.ops.base import dims_of

CHOICES = 512
"""Choices that one program of the sort works on. It compares all pairs of them, and reads the
counts of all other programs: 512 keeps both small, from one token to 100,000."""

COUNTED, COMPARED = 16, 16
"""Counts of so many programs are added up at a time, and so many choices are compared with all of
the program's own: tiles of 4,096 and 8,192 numbers, which fit in the registers of four warps."""

ELEMENTS, COLUMNS = 4096, 1024
"""Numbers, and columns, of a program that moves rows: 16 numbers and more for each of 128 or 256
threads, so that each reads 128 bits at a time, and few columns are left over (7168 = 7 * 1024)."""

FUNCTIONS = {
    "permute": "F.permute",
    "permute_quantized": "fp8.permute_quantized",
    "unpermute": "F.unpermute",
    "permute_grad": "G.permute_grad",
    "unpermute_grad": "G.unpermute_grad",
    "expert_load": "F.expert_load",
}
"""What serves each kind of operator."""

GROUP_SIZE = 128
"""Numbers in E4M3 that one scale is for."""

Tensors = tuple[Arg, ...]


@dataclass(frozen=True)
class PermuteTile:
    """How rows of a width are cut."""

    hidden: int
    tokens: int
    block: int


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/permute.py`, with the functions that occur."""
    found = {kind: instances.of(kind) for kind in FUNCTIONS if instances.of(kind)}
    sorts = (one for kind in ("permute", "permute_quantized") for one in found.get(kind, ()))
    if not found or any("identity" in one.op.attrs for one in sorts):
        return None  # kernels sort every choice; experts that give back tokens have no rows
    widths = {_hidden(u) for kind in found if kind != "expert_load" for u in found[kind]}
    text = render(
        "triton/permute.py.jinja",
        kinds={kind: ", ".join(spans(those)) for kind, those in found.items()},
        tiles=[_tile(hidden) for hidden in sorted(widths)],
        summed="unpermute" in found or "permute_grad" in found,
        sorted="permute" in found or "permute_quantized" in found,
        choices=CHOICES,
        counted=COUNTED,
        compared=COMPARED,
        grad_block=ELEMENTS,
    )
    serves = {FUNCTIONS[kind]: TORCH[_first(those[0]).dtype] for kind, those in found.items()}
    return KernelFile("permute", text, serves, tuple(_cases(found, instances.rows)))


def _first(instance: OpInstance) -> Type:
    return instance.op.operands[0].type


def _hidden(instance: OpInstance) -> int:
    return instance.size(1 if instance.kind == "unpermute_grad" else 0)


def _tile(hidden: int) -> PermuteTile:
    block = min(COLUMNS, 1 << (hidden - 1).bit_length())
    return PermuteTile(hidden, ELEMENTS // block, block)


def _cases(found: Mapping[str, Sequence[OpInstance]], rows: Sequence[int]) -> Iterator[Case]:
    for kind, those in found.items():
        for make in dict.fromkeys(_make(instance) for instance in those):
            for tokens in rows:
                yield make.case(kind, tokens, spans(those))


def _make(instance: OpInstance) -> PermuteSizes:
    route = {"permute": 1, "permute_quantized": 2, "unpermute": 2, "permute_grad": 2}
    k = instance.size({**route, "unpermute_grad": 3, "expert_load": 0}[instance.kind])
    count = dims_of(instance.op.attrs["count"])[0].size if "count" in instance.op.attrs else None
    hidden = 0 if instance.kind == "expert_load" else _hidden(instance)
    return PermuteSizes(TORCH[_first(instance).dtype], hidden, k, count or 0)


@dataclass(frozen=True)
class PermuteSizes:
    """What the spec fixes of one operator."""

    dtype: str
    hidden: int
    k: int
    experts: int

    def case(self, kind: str, tokens: int, lines: tuple[str, ...]) -> Case:
        taken, given, count = self._tensors(kind, tokens)
        sizes = {"n": self.hidden, "k": self.k, "e": self.experts, "m": tokens}
        return Case(
            name=" ".join([kind, *(f"{letter}{size}" for letter, size in sizes.items() if size)]),
            function=kind,
            arguments=(*taken, *count),
            bytes=nbytes(*taken, *given),
            access=128 if kind != "expert_load" else 32,
            spans=lines,
            main="unpermute_kernel",
        )

    def _tensors(self, kind: str, tokens: int) -> tuple[Tensors, Tensors, tuple[int, ...]]:
        """What a function takes and gives, and the number that it takes besides."""
        slots = tokens * self.k
        x, y = Arg((tokens, self.hidden), self.dtype), Arg((slots, self.hidden), self.dtype)
        route = Arg((tokens, self.k), "int64", "index", self.experts)
        weight, order = Arg((tokens, self.k), "float32"), Arg((slots,), "int64", "order")
        ends = Arg((self.experts,), "int32")
        runs = -(-self.hidden // GROUP_SIZE)
        s, rows_s = (Arg((n, runs), "float32", "scale") for n in (tokens, slots))
        route_like = Arg((tokens, self.k), "int64", "index", 1)
        return {
            "permute": ((x, route), (y, ends, order), (self.experts,)),
            "permute_quantized": ((x, s, route), (y, rows_s, ends, order), (self.experts,)),
            "unpermute": ((y, order, weight), (x,), ()),
            "permute_grad": ((y, order, route_like), (x,), ()),
            "unpermute_grad": ((x, y, order, weight), (y, weight), ()),
            "expert_load": ((route,), (Arg((self.experts,), "int64"),), (self.experts,)),
        }[kind]
