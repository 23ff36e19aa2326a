"""FP8 products of the slots of each expert with its weights, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backends.render import render
from backends.triton.fp8_linear import parts_of
from backends.triton.kernel import Case, KernelFile, Tensor, nbytes, of_parts, once
from backends.triton.target import Target
from backends.triton.tiles import FP8_GROUPED, FP8_OUTER, RUN, Product, by_columns, key
from backends.triton.uses import Use, Uses, kinds_of, spans

KINDS = ("fp8_grouped_linear", "fp8_grouped_linear_input_grad", "fp8_grouped_linear_weight_grad")


def kernel_file(uses: Uses, target: Target) -> KernelFile | None:
    """`kernels/fp8_grouped_linear.py`, for the weights of experts that occur."""
    found = uses.of(*KINDS)
    if not found:
        return None
    kinds, products = kinds_of(found, KINDS), _products(found)
    text = render(
        "triton/fp8_grouped_linear.py.jinja",
        target=target,
        kinds=kinds,
        products=kinds != ["fp8_grouped_linear_weight_grad"],
        tiles=by_columns(
            "fp8_grouped_linear", FP8_GROUPED[target.name], products, target, uses.choices
        ),
        outer=FP8_OUTER[target.name],
        block_k=2 * RUN if target.name == "sm_90" else RUN,
    )
    serves = {f"fp8.{kind.removeprefix('fp8_')}": "float8_e4m3fn" for kind in kinds}
    return KernelFile("fp8_grouped_linear", text, serves, once(_cases(found, uses)))


def slots_of_token(uses: Uses) -> int:
    """How many experts a token goes to."""
    operand = {"permute": 1, "permute_quantized": 2}
    return max((use.size(operand[use.kind]) for use in uses.of(*operand)), default=1)


def _sizes(use: Use) -> tuple[int, int, int]:
    """Experts, rows and columns of a weight."""
    if use.kind == "fp8_grouped_linear_weight_grad":
        return use.size(4), use.size(0, -2), use.size(2, -2)
    return use.size(3, 0), use.size(3, 1), use.size(3, 2)


def _products(found: Sequence[Use]) -> Iterator[Product]:
    """One for each number of columns that a launch has: parts of a weight have launches of their
    own."""
    for use in found:
        if use.kind != "fp8_grouped_linear_weight_grad":
            (experts, out, width), forward = _sizes(use), use.kind == "fp8_grouped_linear"
            for columns in (out, *parts_of(use)) if forward else (width,):
                yield Product(0, columns, width if forward else out, 1, experts)


def _cases(found: Sequence[Use], uses: Uses) -> Iterator[Case]:
    for use in found:
        for rows in uses.rows if use.kind == "fp8_grouped_linear" else (uses.train_rows,):
            yield _case(use, rows * slots_of_token(uses))


def _case(use: Use, slots: int) -> Case:
    experts, out, width = _sizes(use)
    ends = Tensor((experts,), "int32", "ends", slots)
    parts, function = parts_of(use), use.kind.removeprefix("fp8_")
    if use.kind == "fp8_grouped_linear_weight_grad":
        tiles = slots // RUN + experts
        given: tuple[Tensor, ...]
        given = (*_quantized(tiles, out, RUN), *_quantized(tiles, width, RUN), ends)
        columns, made = 0, Tensor((experts, out, width))
    else:
        wq = Tensor((experts, out, width), "float8_e4m3fn")
        ws = Tensor((experts, use.size(4, 1), use.size(4, 2)), "float32", "scale")
        x = Tensor((slots, use.size(0)), "float8_e4m3fn")
        x_scale = Tensor((slots, use.size(1)), "float32", "scale")
        columns = out if use.kind == "fp8_grouped_linear" else width
        given, made = (x, x_scale, ends, wq, ws), Tensor((slots, columns))
    return Case(
        name=f"{function} {experts}x{out}x{width}{of_parts(parts)} m{slots}",
        function=function,
        arguments=given,
        keywords={"dtype": "bfloat16", **({"parts": parts} if parts else {})},
        flops=2 * slots * out * width,
        bytes=nbytes(*given, made),
        unit="fp8",
        spans=spans([use]),
        choice=key("fp8_grouped_linear", columns, slots) if columns else "",
    )


def _quantized(*shape: int) -> tuple[Tensor, Tensor]:
    """Tiles of tokens and their scales."""
    return Tensor(shape, "float8_e4m3fn"), Tensor(shape[:2], "float32", "scale")
