"""Products of tokens with weights in bfloat16: tiles for each width, and the launches to look at.

Products in float32, of which a gate is the only one in training, stay with torch: its order of
summing decides ties, and at 256 columns it is no matter of time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backends.render import render
from backends.triton.kernel import Case, KernelFile, Tensor, nbytes, once
from backends.triton.target import Target
from backends.triton.tiles import BF16, Product, by_columns, key
from backends.triton.uses import Use, Uses, kinds_of, spans

MODULES = {"linear": "F", "linear_input_grad": "G", "linear_weight_grad": "G"}


def kernel_file(uses: Uses, target: Target) -> KernelFile | None:
    """`kernels/linear.py`, for the weights that occur."""
    found = [use for use in uses.of(*MODULES) if use.op.operands[0].type.dtype == "bf16"]
    if not found:
        return None
    kinds, products = kinds_of(found, MODULES), _products(found, uses)
    tiles = by_columns("linear", BF16[target.name], products, target, uses.choices)
    text = render("triton/linear.py.jinja", target=target, kinds=kinds, tiles=tiles)
    serves = {f"{MODULES[kind]}.{kind}": "bfloat16" for kind in kinds}
    return KernelFile("linear", text, serves, once(_cases(found, uses)))


def _sizes(use: Use) -> tuple[int, int]:
    """Rows and columns of the weight of a product, or of its derivative."""
    if use.kind == "linear_weight_grad":
        return use.size(0), use.size(1)
    made = use.op.results[0].type.last.size
    assert made is not None
    return (made, use.size(0)) if use.kind == "linear" else (use.size(0), made)


def _products(found: Sequence[Use], uses: Uses) -> Iterator[Product]:
    for use in found:
        out, inside = _sizes(use)
        columns, width = {
            "linear": (out, inside),
            "linear_input_grad": (inside, out),
            "linear_weight_grad": (inside, uses.train_rows),
        }[use.kind]
        yield Product(0, columns, width, 2)


def _cases(found: Sequence[Use], uses: Uses) -> Iterator[Case]:
    for use in found:
        for rows in uses.rows if use.kind == "linear" else (uses.train_rows,):
            yield _case(use, rows)


def _case(use: Use, rows: int) -> Case:
    out, width = _sizes(use)
    x, w, y = Tensor((rows, width)), Tensor((out, width)), Tensor((rows, out))
    arguments, made, high = {
        "linear": ((x, w), y, rows),
        "linear_input_grad": ((y, w), x, rows),
        "linear_weight_grad": ((y, x), w, out),
    }[use.kind]
    return Case(
        name=f"{use.kind} {out}x{width} m{rows}",
        function=use.kind,
        arguments=arguments,
        flops=2 * rows * out * width,
        bytes=nbytes(x, w, y),
        unit="bf16",
        spans=spans([use]),
        choice=key("linear", made.shape[1], high),
    )
