"""Products in bfloat16 of the slots of each expert with its weights, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backends.render import render
from backends.triton.fp8_grouped_linear import slots_of_token
from backends.triton.kernel import Case, KernelFile, Tensor, nbytes, once
from backends.triton.target import Target
from backends.triton.tiles import BF16, BF16_OUTER, Product, by_columns, key
from backends.triton.uses import Use, Uses, kinds_of, spans

MODULES = {
    "grouped_linear": "F",
    "grouped_linear_input_grad": "G",
    "grouped_linear_weight_grad": "G",
}


def kernel_file(uses: Uses, target: Target) -> KernelFile | None:
    """`kernels/grouped_linear.py`, for the weights of experts that occur."""
    found = [use for use in uses.of(*MODULES) if use.op.operands[0].type.dtype == "bf16"]
    if not found:
        return None
    kinds, products = kinds_of(found, MODULES), _products(found)
    text = render(
        "triton/grouped_linear.py.jinja",
        target=target,
        kinds=kinds,
        products=kinds != ["grouped_linear_weight_grad"],
        tiles=by_columns("grouped_linear", BF16[target.name], products, target, uses.choices),
        outer=BF16_OUTER[target.name],
    )
    serves = {f"{MODULES[kind]}.{kind}": "bfloat16" for kind in kinds}
    return KernelFile("grouped_linear", text, serves, once(_cases(found, uses)))


def _sizes(use: Use) -> tuple[int, int, int]:
    """Experts, rows and columns of the weight of a product, or of its derivative."""
    if use.kind == "grouped_linear_weight_grad":
        return use.size(2), use.size(0), use.size(1)
    made = use.op.results[0].type.last.size
    assert made is not None
    out, width = (made, use.size(0)) if use.kind == "grouped_linear" else (use.size(0), made)
    return use.size(1), out, width


def _products(found: Sequence[Use]) -> Iterator[Product]:
    for use in found:
        experts, out, width = _sizes(use)
        if use.kind != "grouped_linear_weight_grad":
            columns, inside = (out, width) if use.kind == "grouped_linear" else (width, out)
            yield Product(0, columns, inside, 2, experts)


def _cases(found: Sequence[Use], uses: Uses) -> Iterator[Case]:
    for use in found:
        for rows in uses.rows if use.kind == "grouped_linear" else (uses.train_rows,):
            yield _case(use, rows * slots_of_token(uses))


def _case(use: Use, slots: int) -> Case:
    experts, out, width = _sizes(use)
    ends, w = Tensor((experts,), "int32", "ends", slots), Tensor((experts, out, width))
    x, y = Tensor((slots, width)), Tensor((slots, out))
    arguments, columns = {
        "grouped_linear": ((x, ends, w), out),
        "grouped_linear_input_grad": ((y, ends, w), width),
        "grouped_linear_weight_grad": ((y, x, ends), 0),
    }[use.kind]
    return Case(
        name=f"{use.kind} {experts}x{out}x{width} m{slots}",
        function=use.kind,
        arguments=arguments,
        flops=2 * slots * out * width,
        bytes=nbytes(x, ends, w, y),
        unit="bf16",
        spans=spans([use]),
        choice=key("grouped_linear", columns, slots) if columns else "",
    )
