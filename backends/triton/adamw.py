"""The optimizer's step: how much of a weight a program takes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from backends.render import render
from backends.triton.instances import OpInstance, OpInstances, spans
from backends.triton.kernel import TORCH, Arg, Case, KernelFile, nbytes
from backends.triton.target import Target

BLOCK = 1024
"""Numbers of a program: 8 for each of 128 threads, 128 bits of each tensor in BF16."""

WAVES = 8
"""The sum of squares has so many programs for each multiprocessor, and no more: each goes on
through its weight, so that there are few partial sums to add up."""

V3 = {"lr": 2.2e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 1000}
"""With what cases are run: DeepSeek-V3's numbers (report, section 4.2)."""


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/adamw.py`, for models that are trained."""
    trained = instances.of("accumulate_grad")
    if not trained:
        return None
    programs = WAVES * target.multiprocessors
    text = render("triton/adamw.py.jinja", block=BLOCK, programs=programs)
    serves = {"optimizer.adamw_step": "float32", "optimizer.square_sum": "float32"}
    weights = {math.prod(_stored(instance)[0]): instance for instance in trained}
    shown = [weights[size] for size in dict.fromkeys((min(weights), max(weights)))]
    return KernelFile(
        "adamw", text, serves, tuple(c for instance in shown for c in _cases(instance))
    )


def _stored(instance: OpInstance) -> tuple[tuple[int, ...], str]:
    """Shape and element type of the tensor that holds the weights, of all experts if of one."""
    rows = sum(w.type.dims[0].size or 0 for w in instance.weights)
    first = instance.weights[0]
    shape = (rows, *(d.size or 0 for d in first.type.dims[1:]))
    return ((first.stack, *shape) if first.stack > 1 else shape), TORCH[first.type.dtype]


def _cases(instance: OpInstance) -> Iterator[Case]:
    shape, dtype = _stored(instance)
    master, grad = Arg(shape, "float32"), Arg(shape, "float32")
    moments = Arg(shape, dtype), Arg(shape, dtype, "scale")  # of squares: above zero
    factor = Arg((), "float32", "ones")
    weight = Arg(shape, dtype) if dtype != "float32" else None
    size = "x".join(map(str, shape))
    written = (master, *moments, *([weight] if weight else []))
    yield Case(
        name=f"adamw_step {size}",
        function="adamw_step",
        arguments=(master, grad, *moments),
        keywords={**V3, "factor": factor, "weight": weight},
        bytes=nbytes(master, grad, *moments, factor) + nbytes(*written),
        access=128 if math.prod(shape) % 16 == 0 else 32,
        spans=spans([instance]),
        main="adamw_kernel",
    )
    yield Case(
        name=f"square_sum {size}",
        function="square_sum",
        arguments=((grad,),),
        bytes=nbytes(grad),
        access=32,  # each program stores one number
        spans=spans([instance]),
    )
