"""Casts to FP8: which there are, and what a program of each takes."""

from __future__ import annotations

from backends.render import render
from backends.triton.instances import OpInstance, OpInstances, spans
from backends.triton.kernel import TORCH, Arg, Case, KernelFile, deduplicate, nbytes, of_parts
from backends.triton.target import Target
from compiler.ops.quantize import CASTS, parts_attr, runs

GROUPS = 32
"""Groups of 128 that a program of four warps takes: 32 numbers a thread, 128 bits a load."""

COLUMNS, COLUMNS_WARPS = 64, 8
"""Columns of 128 tokens each that a program turns: 128 bytes of bfloat16 in a row are a cache line,
and the 32 numbers of a thread stay in registers while the largest is found."""

WEIGHT_WARPS = 8
"""Of a program for 128 x 128 numbers: 64 a thread."""

TILE_WARPS = 8
"""Of a program for 128 tokens and 128 columns: 64 numbers a thread, which stay in registers from
the one time they are loaded until they are written in rows and in columns."""


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/quantize.py`, with the casts that occur."""
    known = (*CASTS, "quantize_both", "fp8_weight", "dequantize")
    found = [kind for kind in known if instances.of(kind)]
    kinds = ["quantize_weight" if kind == "fp8_weight" else kind for kind in found]
    if not kinds:
        return None
    text = render(
        "triton/quantize.py.jinja",
        target=target,
        kinds=kinds,
        groups=GROUPS,
        # Below, programs of one warp and 8 groups, so that every multiprocessor has one.
        few_groups=GROUPS * target.multiprocessors,
        tiles=[k for k in kinds if k in ("quantize_columns", "requantize", "quantize_both")],
        columns=COLUMNS,
        columns_warps=COLUMNS_WARPS,
        weight_warps=WEIGHT_WARPS,
        tile_warps=TILE_WARPS // (target.warp_size // 32),
        both="quantize_both" in kinds,
    )
    read = ("requantize", "dequantize")
    serves = {f"fp8.{kind}": "float8_e4m3fn" if kind in read else "bfloat16" for kind in kinds}
    cases = deduplicate(
        case for instance in instances.of(*found) for case in _cases(instance, instances)
    )
    return KernelFile("quantize", text, serves, cases)


def _cases(instance: OpInstance, instances: OpInstances) -> list[Case]:
    if instance.kind == "fp8_weight":
        return [_weight_case(instance)]
    if instance.kind == "dequantize":
        return [_dequantize_case(instance, rows) for rows in (instances.train_rows, 33)]
    kind, size, scale = instance.kind, instance.size(0), instance.op.text("scale")
    parts = list(instance.op.parts)
    keywords = {"scale": scale, **({"parts": parts} if parts else {})}
    ends = [v.type for v in instance.op.operands if v.type.dtype == "i32"]
    cases = []
    # Columns are cut in training alone.
    for rows in instances.rows if kind == "quantize" else (instances.train_rows,):
        x, q = Arg((rows, size)), Arg((rows, size), "float8_e4m3fn")
        s = Arg((rows, runs(size, parts)), "float32", "scale")
        given = [q, s] if kind == "requantize" else [x]
        given += [Arg((ends[0].count(),), "int32", "ends", rows)] if ends else []
        cases.append(
            Case(
                name=f"{kind} n{size}{of_parts(parts)} {scale} m{rows}{' experts' if ends else ''}",
                function=kind,
                arguments=tuple(given),
                keywords=keywords,
                bytes=nbytes(*given, *[q, s] * (2 if kind == "quantize_both" else 1)),
                access=_access(size, *parts),
                spans=spans([instance]),
            )
        )
    return cases


def _weight_case(instance: OpInstance) -> Case:
    q, s = (v.type.dims for v in instance.op.results)
    shape, scales = (tuple(d.at({}) for d in dims) for dims in (q, s))
    scale = instance.op.text("scale")
    parts = list(parts_attr([w.type.dims[0].at({}) for w in instance.weights]))
    weight, wide = Arg(shape), Arg(shape, "float8_e4m3fn")
    return Case(
        name=f"quantize_weight {'x'.join(map(str, shape))}{of_parts(parts)} {scale}",
        function="quantize_weight",
        arguments=(weight,),
        keywords={"scale": scale, **({"parts": parts} if parts else {})},
        bytes=nbytes(weight, wide, Arg(scales, "float32")),
        access=_access(shape[-1]),
        spans=spans([instance]),
    )


def _dequantize_case(instance: OpInstance, rows: int) -> Case:
    """Of saved activations, in training alone."""
    size, dtype = instance.size(0), TORCH[instance.op.text("dtype")]
    q, s = Arg((rows, size), "float8_e4m3fn"), Arg((rows, runs(size)), "float32", "scale")
    return Case(
        name=f"dequantize n{size} m{rows}",
        function="dequantize",
        arguments=(q, s),
        keywords={"dtype": dtype},
        bytes=nbytes(q, s, Arg((rows, size), dtype)),
        access=_access(size),
        spans=spans([instance]),
    )


def _access(*sizes: int) -> int:
    """Bits that a thread reads at a time, at least: 16 numbers, where rows begin at such places."""
    return 128 if all(size % 16 == 0 for size in sizes) else 8
