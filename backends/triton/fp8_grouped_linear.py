"""FP8 products of the slots of each expert with its weights, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backends.render import render
from backends.triton.fp8_linear import parts_of
from backends.triton.instances import OpInstance, OpInstances, kinds_of, spans
from backends.triton.kernel import Arg, Case, KernelFile, deduplicate, nbytes, of_parts
from backends.triton.target import Target
from backends.triton.tiles import FP8_GROUPED, FP8_OUTER, GROUP_SIZE, Gemm, by_columns, tuning_key

KINDS = ("fp8_grouped_linear", "fp8_grouped_linear_input_grad", "fp8_grouped_linear_weight_grad")


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/fp8_grouped_linear.py`, for the weights of experts that occur."""
    found = instances.of(*KINDS)
    if not found:
        return None
    kinds, products = kinds_of(found, KINDS), _products(found)
    text = render(
        "triton/fp8_grouped_linear.py.jinja",
        target=target,
        kinds=kinds,
        products=kinds != ["fp8_grouped_linear_weight_grad"],
        tiles=by_columns(
            "fp8_grouped_linear", FP8_GROUPED[target.name], products, target, instances.tuning
        ),
        outer=FP8_OUTER[target.name],
        block_k=2 * GROUP_SIZE if target.name == "sm_90" else GROUP_SIZE,
    )
    serves = {f"fp8.{kind.removeprefix('fp8_')}": "float8_e4m3fn" for kind in kinds}
    return KernelFile("fp8_grouped_linear", text, serves, deduplicate(_cases(found, instances)))


def slots_of_token(instances: OpInstances) -> int:
    """How many experts a token goes to."""
    operand = {"permute": 1, "permute_quantized": 2}
    return max(
        (instance.size(operand[instance.kind]) for instance in instances.of(*operand)), default=1
    )


def _sizes(instance: OpInstance) -> tuple[int, int, int]:
    """Experts, rows and columns of a weight."""
    if instance.kind == "fp8_grouped_linear_weight_grad":
        return instance.size(4), instance.size(0, -2), instance.size(2, -2)
    return instance.size(3, 0), instance.size(3, 1), instance.size(3, 2)


def _products(found: Sequence[OpInstance]) -> Iterator[Gemm]:
    """One for each number of columns that a launch has: parts of a weight have launches of their
    own."""
    for instance in found:
        if instance.kind != "fp8_grouped_linear_weight_grad":
            (experts, out, width), forward = _sizes(instance), instance.kind == "fp8_grouped_linear"
            for columns in (out, *parts_of(instance)) if forward else (width,):
                yield Gemm(0, columns, width if forward else out, 1, experts)


def _cases(found: Sequence[OpInstance], instances: OpInstances) -> Iterator[Case]:
    for instance in found:
        for rows in (
            instances.rows if instance.kind == "fp8_grouped_linear" else (instances.train_rows,)
        ):
            yield _case(instance, rows * slots_of_token(instances))


def _case(instance: OpInstance, slots: int) -> Case:
    experts, out, width = _sizes(instance)
    ends = Arg((experts,), "int32", "ends", slots)
    parts, function = parts_of(instance), instance.kind.removeprefix("fp8_")
    if instance.kind == "fp8_grouped_linear_weight_grad":
        tiles = slots // GROUP_SIZE + experts
        given: tuple[Arg, ...]
        given = (*_quantized(tiles, out, GROUP_SIZE), *_quantized(tiles, width, GROUP_SIZE), ends)
        columns, made = 0, Arg((experts, out, width))
    else:
        wq = Arg((experts, out, width), "float8_e4m3fn")
        ws = Arg((experts, instance.size(4, 1), instance.size(4, 2)), "float32", "scale")
        x = Arg((slots, instance.size(0)), "float8_e4m3fn")
        x_scale = Arg((slots, instance.size(1)), "float32", "scale")
        columns = out if instance.kind == "fp8_grouped_linear" else width
        given, made = (x, x_scale, ends, wq, ws), Arg((slots, columns))
    return Case(
        name=f"{function} {experts}x{out}x{width}{of_parts(parts)} m{slots}",
        function=function,
        arguments=given,
        keywords={"dtype": "bfloat16", **({"parts": parts} if parts else {})},
        flops=2 * slots * out * width,
        bytes=nbytes(*given, made),
        bound_by="fp8",
        spans=spans([instance]),
        tuning_key=tuning_key("fp8_grouped_linear", columns, slots) if columns else "",
    )


def _quantized(*shape: int) -> tuple[Arg, Arg]:
    """Tiles of tokens and their scales."""
    return Arg(shape, "float8_e4m3fn"), Arg(shape[:2], "float32", "scale")
