"""RMSNorm: how many rows a program takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backends.render import render
from backends.triton.instances import OpInstance, OpInstances, spans
from backends.triton.kernel import Arg, Case, KernelFile, deduplicate, nbytes
from backends.triton.target import Target
from compiler.ops.quantize import runs

FORWARD = {"rms_norm": "F", "add_rms_norm": "F", "rms_norm_quantize": "fp8"}
BACKWARD = {"rms_norm_grad": "G", "add_rms_norm_grad": "G"}

ELEMENTS = 4096
"""Numbers that a program holds, at least a row: 16 and more a thread, so that each thread reads
128 bits at a time and several such reads are under way."""


@dataclass(frozen=True)
class RowTiles:
    """How rows of a width are cut: `rows` of `block` columns a program, by `warps`.

    Sums over tokens are taken by so many `programs`, each of which leaves a part.
    """

    hidden: int
    rows: int
    block: int
    warps: int
    programs: int
    spans: tuple[str, ...]


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/norm.py`, for the widths that occur."""
    norms, grads = instances.of(*FORWARD), instances.of(*BACKWARD)
    if not norms and not grads:
        return None
    kinds = list(dict.fromkeys(instance.kind for instance in (*norms, *grads)))
    text = render(
        "triton/norm.py.jinja",
        kinds=kinds,
        widths=_widths(norms, target),
        grads=_widths(grads, target),
        target=target,
    )
    cases = deduplicate(
        case for instance in (*norms, *grads) for case in _cases(instance, instances)
    )
    serves = {f"{(FORWARD | BACKWARD)[kind]}.{kind}": "bfloat16" for kind in kinds}
    return KernelFile("norm", text, serves, cases)


def _widths(norms: Sequence[OpInstance], target: Target) -> list[RowTiles]:
    widths = sorted({instance.size(0) for instance in norms})
    return [
        _rows(n, [instance for instance in norms if instance.size(0) == n], target) for n in widths
    ]


def _rows(hidden: int, norms: Sequence[OpInstance], target: Target) -> RowTiles:
    block = 1 << (hidden - 1).bit_length()
    rows = max(1, ELEMENTS // block)
    # 16 numbers a thread, two reads of 128 bits of each operand; 8 where a sum of a row's length
    # stays in registers, too.
    each, most = (8, 1024) if norms[0].kind in BACKWARD else (16, 512)
    warps = max(1, min(most, rows * block // each) // target.warp_size)
    programs = target.multiprocessors * max(1, 32 // warps // (target.warp_size // 32))
    return RowTiles(hidden, rows, block, warps, programs, spans(norms))


def _cases(instance: OpInstance, instances: OpInstances) -> list[Case]:
    """Forward for any number of tokens; gradients are taken in training alone."""
    hidden, kind = instance.size(0), instance.kind
    weight = Arg((hidden,), init="ones")
    operands = len(instance.op.operands)
    cases = []
    for rows in instances.rows if kind in FORWARD else (instances.train_rows,):
        x = Arg((rows, hidden))
        results = [x, weight] if kind in BACKWARD else [x] * len(instance.op.results)
        scale = instance.op.attrs.get("scale")
        if scale:
            s = Arg((rows, runs(hidden)), "float32")
            results = [Arg((rows, hidden), "float8_e4m3fn"), s]
        cases.append(
            Case(
                name=" ".join([f"{kind} n{hidden}", *([str(scale)] if scale else []), f"m{rows}"]),
                function=kind,
                arguments=(*[x] * operands, weight),
                keywords={"eps": 1e-6, **({"scale": scale} if scale else {})},
                bytes=nbytes(*[x] * operands, weight, *results),
                spans=spans([instance]),
            )
        )
    return cases
