"""Products of tokens with weights in bfloat16: tiles for each width, and the launches to look at.

Products in float32, of which a gate is the only one in training, stay with torch: its order of
summing decides ties, and at 256 columns it is no matter of time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backends.render import render
from backends.triton.instances import OpInstance, OpInstances, kinds_of, spans
from backends.triton.kernel import Arg, Case, KernelFile, deduplicate, nbytes
from backends.triton.target import Target
from backends.triton.tiles import BF16, Gemm, by_columns, tuning_key

MODULES = {"linear": "F", "linear_input_grad": "G", "linear_weight_grad": "G"}


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/linear.py`, for the weights that occur."""
    found = instances.of(*MODULES, dtype="bf16")
    if not found:
        return None
    kinds, products = kinds_of(found, MODULES), _products(found, instances)
    tiles = by_columns("linear", BF16[target.name], products, target, instances.tuning)
    text = render("triton/linear.py.jinja", target=target, kinds=kinds, tiles=tiles)
    serves = {f"{MODULES[kind]}.{kind}": "bfloat16" for kind in kinds}
    return KernelFile("linear", text, serves, deduplicate(_cases(found, instances)))


def _sizes(instance: OpInstance) -> tuple[int, int]:
    """Rows and columns of the weight of a product, or of its derivative."""
    if instance.kind == "linear_weight_grad":
        return instance.size(0), instance.size(1)
    made = instance.op.results[0].type.last.size
    assert made is not None
    return (made, instance.size(0)) if instance.kind == "linear" else (instance.size(0), made)


def _products(found: Sequence[OpInstance], instances: OpInstances) -> Iterator[Gemm]:
    for instance in found:
        out, inside = _sizes(instance)
        columns, width = {
            "linear": (out, inside),
            "linear_input_grad": (inside, out),
            "linear_weight_grad": (inside, instances.train_rows),
        }[instance.kind]
        yield Gemm(0, columns, width, 2)


def _cases(found: Sequence[OpInstance], instances: OpInstances) -> Iterator[Case]:
    for instance in found:
        for rows in instances.rows if instance.kind == "linear" else (instances.train_rows,):
            yield _case(instance, rows)


def _case(instance: OpInstance, rows: int) -> Case:
    out, width = _sizes(instance)
    x, w, y = Arg((rows, width)), Arg((out, width)), Arg((rows, out))
    arguments, made, high = {
        "linear": ((x, w), y, rows),
        "linear_input_grad": ((y, w), x, rows),
        "linear_weight_grad": ((y, x), w, out),
    }[instance.kind]
    return Case(
        name=f"{instance.kind} {out}x{width} m{rows}",
        function=instance.kind,
        arguments=arguments,
        flops=2 * rows * out * width,
        bytes=nbytes(x, w, y),
        bound_by="bf16",
        spans=spans([instance]),
        tuning_key=tuning_key("linear", made.shape[1], high),
    )
