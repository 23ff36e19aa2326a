"""Why a plan does or does not fit: the tensors that take the room, down to the line of the spec."""

from __future__ import annotations

from dataclasses import dataclass

from compiler.plan.memory import Use
from compiler.plan.plan import Plan, Planner
from compiler.plan.search import changes, neighbours, that_fit
from dsl.diagnostic import Diagnostic, Label
from dsl.load import Description
from dsl.source import Span

CONVENTIONS = (
    "Every rank of a pipeline rank holds, does and sends the same, but for which experts and which"
    " shards are its own; a row of a table stands for all of them.",
    "Parameters lie in the model's element type; gradients add up in FP32; master weights are FP32,"
    " the two moments of AdamW in the element type of the weight. With ZeRO-1 masters and moments"
    " are cut into equal slices over all ranks that hold the weight, which may need some padding."
    " Weights of FP8 products have a"
    " copy in FP8 with its scales, made once in a step.",
    "Activations are those that the graphs of the training program save, in the formats in which"
    " they do; the rest is recomputed (`dslc explain recompute`). They are saved for as many"
    " micro-batches as a stage has in flight at most. Messages between stages count until they"
    " are sent or read.",
    "Working memory is one block at its largest while it runs backward: all its values and as many"
    " gradients. Buffers of libraries and fragmentation are not counted.",
    "FLOPs are three times those of the forward pass, without recomputation. Experts are"
    " chosen evenly.",
    "Dispatch and combine are counted forward and backward, what comes back in the model's element"
    " type: a token and its gradient go once to each of the token's nodes, to the rank with the"
    " same place there, and on to the ranks of its experts; the token with their weights and"
    " numbers.",
    "Gradients and parameters go around rings through the ranks that hold the same elements,"
    " gradients in FP32. A second is one at the full speed that the cluster file gives.",
)


def misfit(plan: Plan, planner: Planner, description: Description) -> Diagnostic:
    """What to tell where the fullest rank needs more memory than there is."""
    memory, limit = plan.fullest.memory, plan.cluster.memory
    assert limit is not None
    near = [
        f"{changes(plan.parallel, one.parallel)} ({gigabytes(one.fullest.memory.peak)})"
        for one in that_fit(planner, plan.parallel)
    ]
    help = f"the nearest that fit: {'; '.join(near)}" if near else "no layout nearby fits"
    help += "; or save less, by `train.saved_bytes_per_token`"
    return Diagnostic(
        "E531",
        f"a rank needs {gigabytes(memory.peak)}, but a GPU of {plan.cluster.cluster} has"
        f" {gigabytes(limit)}",
        description.span("parallel"),
        f"pipeline rank {memory.pipeline} is the fullest",
        tuple(
            Label(use.span, f"{gigabytes(use.bytes)} of {use.kind.words}: {use.name}")
            for use in memory.largest()[:4]
            if use.span is not None
        ),
        help,
    )


def gigabytes(size: int) -> str:
    """A size as messages say it: `79.26 GB`, or in MB where that is nothing."""
    return f"{size / 10**9:.2f} GB" if size >= 10**8 else f"{size / 10**6:.2f} MB"


def place(span: Span) -> str:
    """`file:line:column`, without the folder in which the file happened to lie."""
    return span.location.replace("\\", "/").rsplit("/", 1)[-1]


def spec_span(use: Use, description: Description) -> Span:
    """The line of the spec that asks for the layers that a use of memory belongs to."""
    if use.layer is None:
        return description.span("architecture")
    first = 0
    for i, group in enumerate(description.spec.architecture.layers):
        first += group.repeat
        if use.layer < first:
            return description.span("architecture", "layers", i)
    return description.span("architecture", "mtp")


@dataclass(frozen=True)
class Alternative:
    """A layout near the plan's: what to write instead, and what comes of it."""

    changes: str
    peak: int
    fits: bool
    reason: str


def alternatives(plan: Plan, planner: Planner, count: int = 8) -> list[Alternative]:
    """The nearest layouts that can be, whether they fit, and what takes most where not."""
    found = []
    for candidate in neighbours(planner, plan.parallel)[:count]:
        other = planner.plan(candidate)
        memory = other.fullest.memory
        top = memory.largest()[0]
        reason = f"pipeline rank {memory.pipeline}: {gigabytes(top.bytes)} of {top.name}"
        found.append(
            Alternative(changes(plan.parallel, candidate), memory.peak, other.fits, reason)
        )
    return found
