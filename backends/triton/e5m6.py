"""E5M6: activations saved in 12 bits, as a model packs them and reads them back."""

from __future__ import annotations

from math import prod

from backends.render import render
from backends.triton.instances import OpInstance, OpInstances, kinds_of, spans
from backends.triton.kernel import TORCH, Arg, Case, KernelFile, deduplicate, nbytes
from backends.triton.target import Target
from compiler.ops.base import dims_of
from compiler.ops.quantize import runs

GROUPS = 32
"""Runs of 128 that a program of four warps takes: 32 numbers a thread, 128 bits a load."""

FUNCTIONS = {"pack_e5m6": "pack", "unpack_e5m6": "unpack"}
"""What serves each kind of operator."""

FIRST = {"pack_e5m6": "bfloat16", "unpack_e5m6": "uint8"}
"""What its first operand is."""


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/e5m6.py`, for rows of whole words: eight numbers are three of them."""
    found = [one for one in instances.of(*FUNCTIONS) if _width(one) % 8 == 0]
    if not found:
        return None
    kinds = kinds_of(found, FUNCTIONS)
    return KernelFile(
        "e5m6",
        render("triton/e5m6.py.jinja", kinds=kinds, groups=GROUPS),
        {f"e5m6.{FUNCTIONS[kind]}": FIRST[kind] for kind in kinds},
        deduplicate(_case(one, tokens) for one in found for tokens in (instances.train_rows, 33)),
    )


def _width(instance: OpInstance) -> int:
    """Numbers of a row."""
    if instance.kind == "pack_e5m6":
        return instance.size(0)
    size = dims_of(instance.op.attrs["into"])[0].size
    assert size is not None
    return size


def _case(instance: OpInstance, tokens: int) -> Case:
    kind, width = instance.kind, _width(instance)
    # Of each token as many rows as there are heads.
    rows = tokens * prod(dim.size or 1 for dim in instance.op.operands[0].type.dims[:-1])
    x, packed = Arg((rows, width)), Arg((rows, 3 * width // 2), "uint8", "bytes")
    s = Arg((rows, runs(width)), "float32", "scale")
    pack = kind == "pack_e5m6"
    return Case(
        name=f"{kind} n{width} m{rows}",
        function=FUNCTIONS[kind],
        arguments=(x,) if pack else (packed, s, width),
        keywords={} if pack else {"dtype": TORCH[instance.op.text("dtype")]},
        bytes=nbytes(x, packed, s),
        access=32,  # of packed numbers; words of three in a row are no power of two
        spans=spans([instance]),
    )
