"""Products in bfloat16 of the slots of each expert with its weights, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backends.render import render
from backends.triton.fp8_grouped_linear import slots_of_token
from backends.triton.instances import OpInstance, OpInstances, kinds_of, spans
from backends.triton.kernel import Arg, Case, KernelFile, deduplicate, nbytes
from backends.triton.target import Target
from backends.triton.tiles import BF16, BF16_OUTER, Gemm, by_columns, tuning_key

MODULES = {
    "grouped_linear": "F",
    "grouped_linear_input_grad": "G",
    "grouped_linear_weight_grad": "G",
}


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/grouped_linear.py`, for the weights of experts that occur."""
    found = instances.of(*MODULES, dtype="bf16")
    if not found:
        return None
    kinds, products = kinds_of(found, MODULES), _products(found)
    text = render(
        "triton/grouped_linear.py.jinja",
        target=target,
        kinds=kinds,
        products=kinds != ["grouped_linear_weight_grad"],
        tiles=by_columns("grouped_linear", BF16[target.name], products, target, instances.tuning),
        outer=BF16_OUTER[target.name],
    )
    serves = {f"{MODULES[kind]}.{kind}": "bfloat16" for kind in kinds}
    return KernelFile("grouped_linear", text, serves, deduplicate(_cases(found, instances)))


def _sizes(instance: OpInstance) -> tuple[int, int, int]:
    """Experts, rows and columns of the weight of a product, or of its derivative."""
    if instance.kind == "grouped_linear_weight_grad":
        return instance.size(2), instance.size(0), instance.size(1)
    made = instance.op.results[0].type.last.size
    assert made is not None
    out, width = (
        (made, instance.size(0)) if instance.kind == "grouped_linear" else (instance.size(0), made)
    )
    return instance.size(1), out, width


def _products(found: Sequence[OpInstance]) -> Iterator[Gemm]:
    for instance in found:
        experts, out, width = _sizes(instance)
        if instance.kind != "grouped_linear_weight_grad":
            columns, inside = (out, width) if instance.kind == "grouped_linear" else (width, out)
            yield Gemm(0, columns, inside, 2, experts)


def _cases(found: Sequence[OpInstance], instances: OpInstances) -> Iterator[Case]:
    for instance in found:
        for rows in (
            instances.rows if instance.kind == "grouped_linear" else (instances.train_rows,)
        ):
            yield _case(instance, rows * slots_of_token(instances))


def _case(instance: OpInstance, slots: int) -> Case:
    experts, out, width = _sizes(instance)
    ends, w = Arg((experts,), "int32", "ends", slots), Arg((experts, out, width))
    x, y = Arg((slots, width)), Arg((slots, out))
    arguments, columns = {
        "grouped_linear": ((x, ends, w), out),
        "grouped_linear_input_grad": ((y, ends, w), width),
        "grouped_linear_weight_grad": ((y, x, ends), 0),
    }[instance.kind]
    return Case(
        name=f"{instance.kind} {experts}x{out}x{width} m{slots}",
        function=instance.kind,
        arguments=arguments,
        flops=2 * slots * out * width,
        bytes=nbytes(x, ends, w, y),
        bound_by="bf16",
        spans=spans([instance]),
        tuning_key=tuning_key("grouped_linear", columns, slots) if columns else "",
    )
