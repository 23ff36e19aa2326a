"""Rotary embedding with the copies around it."""

from __future__ import annotations

from backends.render import render
from backends.triton.instances import OpInstance, OpInstances, spans
from backends.triton.kernel import Arg, Case, KernelFile, deduplicate, nbytes
from backends.triton.target import Target

KINDS = {"rotate": "F", "rotate_last": "F", "join_rotated": "F", "join_rotated_grad": "G"}

HEADS, WARPS = 16, 4
"""Heads of one token that a program takes at a time: of 128 + 64 numbers each a thread of 4 warps
has 16 and 8, read 128 bits at a time."""


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/rope.py`, with the functions that occur."""
    kinds = [kind for kind in KINDS if instances.of(kind)]
    if not kinds:
        return None
    warps = WARPS // (target.warp_size // 32)
    text = render("triton/rope.py.jinja", kinds=kinds, heads=HEADS, warps=warps)
    cases = deduplicate(
        case for instance in instances.of(*kinds) for case in _cases(instance, instances)
    )
    serves = {f"{KINDS[kind]}.{kind}": "bfloat16" for kind in kinds}
    return KernelFile("rope", text, serves, cases)


def _cases(instance: OpInstance, instances: OpInstances) -> list[Case]:
    """Gradients are taken in training alone."""
    cases = []
    for rows in (instances.train_rows,) if instance.kind == "join_rotated_grad" else instances.rows:
        shapes = [tuple(d.size or 0 for d in v.type.dims[2:]) for v in instance.op.operands]
        dtypes = [v.type.dtype for v in instance.op.operands]
        operands = [
            Arg((1, rows, *shape), "float32" if dtype == "f32" else "bfloat16")
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        results = [
            Arg((1, rows, *(d.size or 0 for d in v.type.dims[2:]))) for v in instance.op.results
        ]
        sizes = "x".join(map(str, shapes[0]))
        cases.append(
            Case(
                name=f"{instance.kind} {sizes} m{rows}",
                function=instance.kind,
                arguments=tuple(operands),
                bytes=nbytes(*operands, *results),
                access=128 if all(shape[-1] % 16 == 0 for shape in shapes) else 16,
                spans=spans([instance]),
            )
        )
    return cases
