"""FP8 products of the slots of each expert with its weights, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

from backends.render import render
from backends.triton.fp8_linear import parts_of
from backends.triton.kernel import Case, KernelFile, Tensor, nbytes
from backends.triton.target import Target
from backends.triton.tiles import FP8_GROUPED, FP8_OUTER, RUN, Product, Steps, key, steps
from backends.triton.uses import Use, Uses, spans

KINDS = ("fp8_grouped_linear", "fp8_grouped_linear_input_grad", "fp8_grouped_linear_weight_grad")


def kernel_file(uses: Uses, target: Target) -> KernelFile | None:
    """`kernels/fp8_grouped_linear.py`, for the weights of experts that occur."""
    found = uses.of(*KINDS)
    if not found:
        return None
    kinds = [kind for kind in KINDS if any(use.kind == kind for use in found)]
    text = render(
        "triton/fp8_grouped_linear.py.jinja",
        target=target,
        kinds=kinds,
        products=kinds != ["fp8_grouped_linear_weight_grad"],
        tiles=_tiles(found, uses, target),
        outer=FP8_OUTER[target.name],
        block_k=2 * RUN if target.name == "sm_90" else RUN,
    )
    serves = {f"fp8.{kind.removeprefix('fp8_')}": "float8_e4m3fn" for kind in kinds}
    return KernelFile("fp8_grouped_linear", text, serves, tuple(_cases(found, uses)))


def slots_of_token(uses: Uses) -> int:
    """How many experts a token goes to."""
    operand = {"permute": 1, "permute_quantized": 2}
    return max((use.size(operand[use.kind]) for use in uses.of(*operand)), default=1)


def _sizes(use: Use) -> tuple[int, int, int]:
    """Experts, rows and columns of a weight."""
    if use.kind == "fp8_grouped_linear_weight_grad":
        return use.size(4), use.size(0, -2), use.size(2, -2)
    return use.size(3, 0), use.size(3, 1), use.size(3, 2)


def _tiles(found: Sequence[Use], uses: Uses, target: Target) -> dict[int, Steps]:
    """By columns of the product; where several widths have the same, the largest decides."""
    widths: dict[int, tuple[int, int]] = {}
    for use in found:
        if use.kind == "fp8_grouped_linear_weight_grad":
            continue
        experts, out, width = _sizes(use)
        forward = use.kind == "fp8_grouped_linear"
        inside = width if forward else out
        for columns in (out, *parts_of(use)) if forward else (width,):
            widths[columns] = max((inside, experts), widths.get(columns, (0, 0)))
    return {
        n: steps(
            "fp8_grouped_linear",
            FP8_GROUPED[target.name],
            Product(0, n, width, 1, experts),
            target,
            uses.choices,
        )
        for n, (width, experts) in sorted(widths.items())
    }


def _cases(found: Sequence[Use], uses: Uses) -> list[Case]:
    cases: dict[str, Case] = {}
    for use in found:
        for rows in uses.rows if use.kind == "fp8_grouped_linear" else (uses.train_rows,):
            case = _case(use, rows * slots_of_token(uses), found)
            cases.setdefault(case.name, case)
    return list(cases.values())


def _case(use: Use, slots: int, found: Sequence[Use]) -> Case:
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
        name=f"{function} {experts}x{out}x{width} m{slots}",
        function=function,
        arguments=given,
        keywords={"dtype": "bfloat16", **({"parts": parts} if parts else {})},
        flops=2 * slots * out * width,
        bytes=nbytes(*given, made),
        unit="fp8",
        spans=spans([u for u in found if u.kind == use.kind and _sizes(u) == _sizes(use)]),
        choice=key("fp8_grouped_linear", columns, slots) if columns else "",
    )


def _quantized(*shape: int) -> tuple[Tensor, Tensor]:
    """Tiles of tokens and their scales."""
    return Tensor(shape, "float8_e4m3fn"), Tensor(shape[:2], "float32", "scale")
