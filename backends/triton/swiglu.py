"""SwiGLU and its gradient, with the cast of either to FP8."""

from __future__ import annotations

from backends.render import render
from backends.triton.instances import OpInstance, OpInstances, spans
from backends.triton.kernel import Arg, Case, KernelFile, deduplicate, nbytes
from backends.triton.target import Target
from backends.triton.tiles import GROUP_SIZE

KINDS = {
    "swiglu": "F",
    "swiglu_quantize": "fp8",
    "swiglu_grad": "G",
    "swiglu_grad_joined": "G",
    "swiglu_grad_quantize": "fp8",
}

TILES, WARPS = 16, 4
"""Tiles of 128 columns that a program takes, and its warps: 16 numbers a thread of each operand."""

GRAD_WARPS = 16
"""Of a program for 128 tokens and 128 columns of one gradient: 32 numbers a thread, which stay in
registers from the one time they are computed until they are written in rows and in columns."""


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/swiglu.py`, with the functions that occur."""
    kinds = [kind for kind in KINDS if instances.of(kind)]
    if not kinds:
        return None
    narrow = target.warp_size // 32
    text = render(
        "triton/swiglu.py.jinja",
        target=target,
        kinds=kinds,
        casts=[kind for kind in kinds if kind.endswith("quantize")],
        grads=[kind for kind in kinds if kind in ("swiglu_grad", "swiglu_grad_joined")],
        tiles=TILES,
        warps=WARPS // narrow,
        both=True,
        grad_warps=GRAD_WARPS // narrow,
    )
    cases = deduplicate(
        case for instance in instances.of(*kinds) for case in _cases(instance, instances)
    )
    serves = {f"{KINDS[kind]}.{kind}": "bfloat16" for kind in kinds}
    return KernelFile("swiglu", text, serves, cases)


def _cases(instance: OpInstance, instances: OpInstances) -> list[Case]:
    """Forward for any number of tokens; gradients are taken in training alone."""
    kind, size, backward = instance.kind, instance.size(0), "grad" in instance.kind
    ends = [v.type for v in instance.op.operands if v.type.dtype == "i32"]
    scale = instance.op.attrs.get("scale")
    cases = []
    for rows in (instances.train_rows,) if backward else instances.rows:
        # Gate and up lie behind one another, as one product makes them.
        half = Arg((rows, size), strides=(2 * size, 1))
        given = [Arg((rows, size)), half, half] if backward else [half, half]
        given += [Arg((ends[0].count(),), "int32", "ends", rows)] if ends else []
        cases.append(
            Case(
                name=" ".join([f"{kind} n{size}", *([str(scale)] if scale else []), f"m{rows}"])
                + (" experts" if ends else ""),
                function=kind,
                arguments=tuple(given),
                keywords={"scale": scale} if scale else {},
                bytes=nbytes(*given, *_results(kind, rows, size)),
                access=128 if size % 16 == 0 else 8,
                spans=spans([instance]),
            )
        )
    return cases


def _results(kind: str, rows: int, size: int) -> list[Arg]:
    columns = 2 * size if "grad" in kind else size
    if not kind.endswith("quantize"):
        return [Arg((rows, columns))]
    q, s = (
        Arg((rows, columns), "float8_e4m3fn"),
        Arg((rows, columns // GROUP_SIZE), "float32"),
    )
    return [q, s] * (2 if "grad" in kind else 1)
