"""FP8 products of tokens with weights: tiles for each width, and the launches to look at.

What decides the form of the loop (`fp8_gemm.jinja`), in instructions for 128 of the sum on sm_90,
for a tile of 128 x 128 by 8 warps, as compiled by Triton 3.7.1:

- One scale a tile, because no tile leaves the 128 columns of a block: 64 FFMA. A scale for every
  column as well: 64 FMUL more, and as many registers as columns (226 against 165; weight gradients
  need it, 259).
- Two groups of 128 a turn of the loop, at pointers: 140. One group: 160 to 170. By the copy engine:
  167 and 149; its descriptors are moved about between registers for every load. sm_100 has warps
  for that, whose work is no longer that of those that add.
- Scales of the next turn are loaded before the products of this one. Triton loads ahead only what
  a product reads; a scale that is loaded where it is needed stops all warps for as long as the
  memory takes, at the same count of instructions.
- Both operands with what is summed over lying together. Turned around on the way to shared memory
  it is 323 for one operand and 543 for both, byte by byte and with nothing loaded ahead. So weights
  are transposed first for input gradients (2 bytes moved for each number, once), and tiles of
  tokens come from their cast as they are read.
- Left to itself the assembler takes 250 registers of the 255 that a single program may have; with a
  bound of 168 nothing spills.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from backends.render import render
from backends.triton.instances import OpInstance, OpInstances, kinds_of, spans
from backends.triton.kernel import Arg, Case, KernelFile, deduplicate, nbytes, of_parts
from backends.triton.target import Target
from backends.triton.tiles import FP8, FP8_OUTER, GROUP_SIZE, Gemm, by_columns, tuning_key

KINDS = ("fp8_linear", "fp8_linear_input_grad", "fp8_linear_weight_grad")


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/fp8_linear.py`, for the weights that occur."""
    found = instances.of(*KINDS)
    if not found:
        return None
    kinds, products = kinds_of(found, KINDS), _products(found)
    text = render(
        "triton/fp8_linear.py.jinja",
        target=target,
        kinds=kinds,
        products=kinds != ["fp8_linear_weight_grad"],
        tiles=by_columns("fp8_linear", FP8[target.name], products, target, instances.tuning),
        outer=FP8_OUTER[target.name],
        block_k=2 * GROUP_SIZE if target.name == "sm_90" else GROUP_SIZE,
    )
    serves = {f"fp8.{kind.removeprefix('fp8_')}": "float8_e4m3fn" for kind in kinds}
    return KernelFile("fp8_linear", text, serves, deduplicate(_cases(found, instances)))


def _products(found: Sequence[OpInstance]) -> Iterator[Gemm]:
    """One for each number of columns that a launch has: parts of a weight have launches of their
    own."""
    for instance in found:
        if instance.kind != "fp8_linear_weight_grad":
            out, width, forward = (
                instance.size(2, -2),
                instance.size(2),
                instance.kind == "fp8_linear",
            )
            for columns in (out, *parts_of(instance)) if forward else (width,):
                yield Gemm(0, columns, width if forward else out, 1)


def parts_of(instance: OpInstance) -> tuple[int, ...]:
    return instance.op.parts


def _cases(found: Sequence[OpInstance], instances: OpInstances) -> Iterator[Case]:
    for instance in found:
        case = _outer if "weight" in instance.kind else _product
        for rows in instances.rows if instance.kind == "fp8_linear" else (instances.train_rows,):
            yield case(instance, rows)


def _product(instance: OpInstance, rows: int) -> Case:
    out, width, (blocks, groups) = (
        instance.size(2, -2),
        instance.size(2),
        (instance.size(3, 0), instance.size(3)),
    )
    x = Arg((rows, instance.size(0)), "float8_e4m3fn")
    x_scale = Arg((rows, instance.size(1)), "float32", init="scale")
    w = Arg((out, width), "float8_e4m3fn")
    w_scale = Arg((blocks, groups), "float32", init="scale")
    y = Arg((rows, out if instance.kind == "fp8_linear" else width))
    function, parts = instance.kind.removeprefix("fp8_"), parts_of(instance)
    return Case(
        name=f"{function} {out}x{width}{of_parts(parts)} m{rows}",
        function=function,
        arguments=(x, x_scale, w, w_scale),
        keywords={"dtype": "bfloat16", **({"parts": parts} if parts else {})},
        flops=2 * rows * out * width,
        bytes=nbytes(x, x_scale, w, w_scale, y),
        bound_by="fp8",
        spans=spans([instance]),
        tuning_key=tuning_key("fp8_linear", y.shape[1], rows),
    )


def _outer(instance: OpInstance, rows: int) -> Case:
    out, width, tiles = instance.size(0, -2), instance.size(2, -2), -(-rows // GROUP_SIZE)
    operands = [
        made
        for n in (out, width)
        for made in (
            Arg((tiles, n, GROUP_SIZE), "float8_e4m3fn"),
            Arg((tiles, n), "float32", init="scale"),
        )
    ]
    return Case(
        name=f"linear_weight_grad {out}x{width} m{rows}",
        function="linear_weight_grad",
        arguments=tuple(operands),
        keywords={"dtype": "bfloat16"},
        flops=2 * rows * out * width,
        bytes=nbytes(*operands, Arg((out, width))),
        bound_by="fp8",
        spans=spans([instance]),
    )
