"""Head and cross entropy: how many tokens' scores are there at a time, and how rows are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from backends.render import render
from backends.triton.instances import OpInstance, OpInstances, spans
from backends.triton.kernel import TORCH, Arg, Case, KernelFile, nbytes
from backends.triton.target import Target

SCORES = 2**27
"""Scores that are there at a time: 256 MB in BF16, of 1,024 tokens of V3. Products of so many rows
fill a GPU, and what they read of the head (1.9 GB for V3) is read a quarter as often as by 256."""

BLOCK = 4096
"""Scores that a program reads at a time: 16 a thread on sm_90, two reads of 128 bits in BF16."""

FEW = 64
"""Tokens of a small case beside that of the training step: a last piece, and what tests can run."""

FUNCTIONS = {
    "linear_cross_entropy": "G.linear_cross_entropy",
    "cross_entropy": "F.cross_entropy",
    "cross_entropy_grad": "G.cross_entropy_grad",
}
"""What serves each kind of operator."""


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/cross_entropy.py`, with the functions that occur."""
    found = {kind: instances.of(kind) for kind in FUNCTIONS if instances.of(kind)}
    if not found:
        return None
    words = sorted({_vocab(instance) for those in found.values() for instance in those})
    text = render(
        "triton/cross_entropy.py.jinja",
        kinds={kind: ", ".join(spans(those)) for kind, those in found.items()},
        blocks={vocab: _cut(vocab, target) for vocab in words},
        chunks={vocab: _rows(vocab) for vocab in words},
    )
    serves = {FUNCTIONS[kind]: TORCH[_first(those[0])] for kind, those in found.items()}
    cases = tuple(case for rows in (FEW, instances.train_rows) for case in _cases(found, rows))
    return KernelFile("cross_entropy", text, serves, cases)


def _first(instance: OpInstance) -> str:
    """The element type of its first tensor."""
    return instance.op.operands[0].type.dtype


def _vocab(instance: OpInstance) -> int:
    if instance.kind == "linear_cross_entropy":
        return instance.weights[0].type.dims[0].size or 0
    return instance.size(1 if instance.kind == "cross_entropy_grad" else 0)


def _cut(vocab: int, target: Target) -> tuple[int, int]:
    """Scores at a time, and warps: each thread reads at least 8."""
    block = min(BLOCK, 1 << (vocab - 1).bit_length())
    return block, max(1, min(8, block // (8 * target.warp_size)))


def _rows(vocab: int) -> int:
    return max(128, SCORES // vocab // 128 * 128)


def _cases(found: Mapping[str, Sequence[OpInstance]], tokens: int) -> Iterator[Case]:
    for kind, those in found.items():
        for instance in {(_vocab(u), u.op.operands[-2].type.last): u for u in those}.values():
            dtype, vocab = TORCH[instance.op.operands[-2].type.dtype], _vocab(instance)
            labels, scalar = Arg((tokens,), "int64", "index", vocab), Arg((), "float32")
            logits = Arg((tokens, vocab), dtype)
            if kind == "linear_cross_entropy":
                yield _head(instance, Arg((tokens, instance.size(0)), dtype), labels, spans(those))
                continue
            grad = kind == "cross_entropy_grad"
            yield Case(
                name=f"{kind} v{vocab} m{tokens}",
                function=kind,
                arguments=(scalar, logits, labels) if grad else (logits, labels),
                bytes=nbytes(logits, labels, logits if grad else scalar),
                spans=spans(those),
                main="cross_entropy_kernel",
            )


def _head(instance: OpInstance, x: Arg, labels: Arg, lines: tuple[str, ...]) -> Case:
    (tokens, hidden), vocab = x.shape, _vocab(instance)
    weight = Arg((vocab, hidden), x.dtype)
    return Case(
        name=f"linear_cross_entropy v{vocab} n{hidden} m{tokens}",
        function="linear_cross_entropy",
        arguments=(x, labels, weight),
        keywords={"gradients": True},
        flops=3 * 2 * tokens * hidden * vocab,
        bytes=2 * nbytes(x, weight) + nbytes(labels),
        bound_by="bf16",
        spans=lines,
        main="cross_entropy_kernel",
    )
