"""RMSNorm: how many rows a program takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backends.render import render
from backends.triton.kernel import Case, KernelFile, Tensor, nbytes
from backends.triton.target import Target
from backends.triton.uses import Use, Uses, spans

ELEMENTS = 4096
"""Numbers that a program holds, at least a row: 16 and more a thread, so that each thread reads
128 bits at a time and several such reads are under way."""


@dataclass(frozen=True)
class Rows:
    """How rows of a width are cut: `rows` of `block` columns a program, by `warps`."""

    hidden: int
    rows: int
    block: int
    warps: int
    spans: tuple[str, ...]


def kernel_file(uses: Uses, target: Target) -> KernelFile | None:
    """`kernels/norm.py`, for the widths that occur."""
    norms = uses.of("rms_norm")
    if not norms:
        return None
    widths = [_rows(hidden, norms, target) for hidden in sorted({u.size(0) for u in norms})]
    text = render("triton/norm.py.jinja", widths=widths, target=target)
    cases = tuple(_case(width, rows) for width in widths for rows in uses.rows)
    return KernelFile("norm", text, {"F.rms_norm": "bfloat16"}, cases)


def _rows(hidden: int, norms: Sequence[Use], target: Target) -> Rows:
    block = 1 << (hidden - 1).bit_length()
    rows = max(1, ELEMENTS // block)
    # 16 numbers a thread: two reads of 128 bits of each operand.
    warps = min(16, max(1, rows * block // (16 * target.warp_size)))
    return Rows(hidden, rows, block, warps, spans([u for u in norms if u.size(0) == hidden]))


def _case(width: Rows, rows: int) -> Case:
    x, weight = Tensor((rows, width.hidden)), Tensor((width.hidden,), fill="ones")
    return Case(
        name=f"rms_norm n{width.hidden} m{rows}",
        function="rms_norm",
        arguments=(x, weight),
        keywords={"eps": 1e-6},
        bytes=nbytes(x, weight, x),
        spans=width.spans,
    )
