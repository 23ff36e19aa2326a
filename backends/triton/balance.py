"""The balance loss: how many tokens a program counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from backends.render import render
from backends.triton.instances import OpInstance, OpInstances, spans
from backends.triton.kernel import Arg, Case, KernelFile, nbytes
from backends.triton.target import Target

SCORES = 1024
"""Affinities that a program holds: 8 for each of 128 threads."""

STEPS = 8
"""With 256 experts a program counts 32 tokens: a sequence of 4,096 gives each multiprocessor one,
and few partial counts to add up."""

FEW = 64
"""Tokens of a small case beside that of the training step: what tests can run."""

FUNCTIONS = {
    "sequence_balance_loss": "F.sequence_balance_loss",
    "sequence_balance_loss_grad": "G.sequence_balance_loss_grad",
}
"""What serves each kind of operator."""


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/balance.py`, with the functions that occur on float32."""
    found = {kind: [u for u in instances.of(kind) if _in_float32(u)] for kind in FUNCTIONS}
    found = {kind: those for kind, those in found.items() if those}
    if not found:
        return None
    experts = sorted({_experts(instance) for those in found.values() for instance in those})
    text = render(
        "triton/balance.py.jinja",
        kinds={kind: ", ".join(spans(those)) for kind, those in found.items()},
        sizes={n: max(1, SCORES // (1 << (n - 1).bit_length())) for n in experts},
        steps=STEPS,
    )
    serves = {FUNCTIONS[kind]: "float32" for kind in found}
    return KernelFile("balance", text, serves, tuple(_cases(found, instances.train_rows)))


def _in_float32(instance: OpInstance) -> bool:
    return instance.op.operands[-1].type.dtype == "f32"


def _experts(instance: OpInstance) -> int:
    return instance.size(-1)


def _cases(found: Mapping[str, Sequence[OpInstance]], tokens: int) -> Iterator[Case]:
    for kind, those in found.items():
        sizes = dict.fromkeys((_experts(instance), instance.op.attrs["k"]) for instance in those)
        d = (Arg((), "float32"),) if kind.endswith("_grad") else ()
        for (experts, k), seq in product(sizes, (FEW, tokens)):
            score = Arg((1, seq, experts), "float32", "scale")  # above zero, as affinities are
            yield Case(
                name=f"{kind} e{experts} k{k} m{seq}",
                function=kind,
                arguments=(*d, score),
                keywords={"k": k},
                bytes=nbytes(score, *([score] if d else [])),
                spans=spans(those),
                main="balance_grad_kernel",
            )
