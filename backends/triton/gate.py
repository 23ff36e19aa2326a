"""The gate: how many tokens a program takes, and which parts of it a model needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from backends.render import render
from backends.triton.instances import OpInstance, OpInstances, spans
from backends.triton.kernel import Arg, Case, KernelFile, nbytes
from backends.triton.target import Target
from compiler.ops.base import dims_of

SCORES = 1024
"""Scores that a program holds: 8 for each of 128 threads. With 256 experts a warp has a token for
itself, so that looking for the best one never leaves it."""

FUNCTIONS = {"gate": "F.gate", "gate_saving": "F.gate_saving", "gate_grad": "G.gate_grad"}
"""What serves each kind of operator."""


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/gate.py`, with the functions that occur on float32."""
    found = {kind: [u for u in instances.of(kind) if _in_float32(u)] for kind in FUNCTIONS}
    found = {kind: those for kind, those in found.items() if those}
    if not found:
        return None
    choosing = [u for kind in ("gate", "gate_saving") for u in found.get(kind, ())]
    text = render(
        "triton/gate.py.jinja",
        kinds={kind: ", ".join(spans(those)) for kind, those in found.items()},
        sizes={e: _tokens(e) for e in sorted({_experts(u) for us in found.values() for u in us})},
        scorings={u.op.attrs["scoring"] for us in found.values() for u in us},
        group_scores={u.op.attrs["group_score"] for u in choosing},
        grouped=any(u.op.attrs["topk_group"] != u.op.attrs["n_group"] for u in choosing),
        chooses=bool(choosing),
    )
    serves = {FUNCTIONS[kind]: "float32" for kind in found}
    return KernelFile("gate", text, serves, tuple(_cases(found, instances.rows)))


def _in_float32(instance: OpInstance) -> bool:
    return instance.op.operands[0].type.dtype == "f32"


def _experts(instance: OpInstance) -> int:
    return instance.size(2 if instance.kind == "gate_grad" else 0)


def _tokens(experts: int) -> int:
    return max(1, SCORES // (1 << (experts - 1).bit_length()))


def _cases(found: Mapping[str, Sequence[OpInstance]], rows: Sequence[int]) -> Iterator[Case]:
    for those in found.values():
        for instance in {(_experts(u), *sorted(u.op.attrs.items())): u for u in those}.values():
            for tokens in rows:
                yield _case(instance, tokens, spans(those))


def _case(instance: OpInstance, tokens: int, lines: tuple[str, ...]) -> Case:
    experts, keywords = _experts(instance), dict(instance.op.attrs)
    k = (
        instance.size(3)
        if instance.kind == "gate_grad"
        else dims_of(keywords.pop("k"))[0].size or 0
    )
    scores = Arg((tokens, experts), "float32")
    route = Arg((tokens, k), "int64", "index", experts)
    weight = Arg((tokens, k), "float32")
    bias = Arg((experts,), "float32") if instance.op.symbols else None
    if instance.kind == "gate_grad":
        # Weights are divided by the sum of the affinities chosen, which is not near zero.
        affinity = Arg((tokens, experts), "float32", "affinity")
        taken: tuple[Arg | None, ...] = (weight, scores, affinity, route)
        given: tuple[Arg, ...] = (scores,)
    else:
        taken, keywords["k"] = (scores, bias), k
        given = (route, weight, scores) if instance.kind == "gate_saving" else (route, weight)
    return Case(
        name=f"{instance.kind} e{experts} k{k} m{tokens}",
        function=instance.kind,
        arguments=taken,
        keywords=keywords,
        bytes=nbytes(*(t for t in taken if t is not None), *given),
        access=64 if instance.kind == "gate" else 128,  # what it writes is k numbers for each token
        spans=lines,
        main="gate_kernel",
    )
