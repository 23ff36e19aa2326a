"""The gradient of the embedding: how rows are summed by token."""

from __future__ import annotations

from backends.render import render
from backends.triton.instances import OpInstance, OpInstances, spans
from backends.triton.kernel import TORCH, Arg, Case, KernelFile, deduplicate, nbytes
from backends.triton.target import Target
from compiler.ops.base import dims_of

BLOCK, THREADS = 1024, 128
"""Columns of a program, and threads: 8 numbers for each, which are 128 bits of bfloat16. A token
that fills a sequence is summed by one program a block, 7 of them for rows of 7168."""


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/embedding.py`, where a model trains an embedding."""
    found = instances.of("embedding_grad")
    if not found:
        return None
    text = render(
        "triton/embedding.py.jinja",
        spans=", ".join(spans(found)),
        block=BLOCK,
        warps=THREADS // target.warp_size,
    )
    return KernelFile(
        "embedding",
        text,
        {"G.embedding_grad": TORCH[found[0].op.operands[0].type.dtype]},
        deduplicate(_case(one, tokens) for one in found for tokens in (instances.train_rows, 33)),
    )


def _case(instance: OpInstance, tokens: int) -> Case:
    hidden, vocab = instance.size(0), dims_of(instance.op.attrs["rows"])[0].at({})
    d = Arg((tokens, hidden), TORCH[instance.op.operands[0].type.dtype])
    given = Arg((tokens,), "int64", "index", vocab)
    return Case(
        name=f"embedding_grad v{vocab} n{hidden} m{tokens}",
        function="embedding_grad",
        arguments=(d, given, vocab),
        bytes=nbytes(d, given, Arg((vocab, hidden), d.dtype)),
        spans=spans([instance]),
    )
