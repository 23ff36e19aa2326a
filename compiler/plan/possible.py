"""Which layouts can be at all: what must divide what, and what a schedule needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compiler.parallel.layout import placement
from dsl.schema import Cluster, Parallel

SYMMETRIC_RANKS = 32
"""Those that `symm_mem::all_to_all_vdev_2d` of torch takes: a thread of a warp for each."""


@dataclass(frozen=True)
class LayoutProblem:
    """Why a layout cannot be; `key` is the one of `parallel` that asks for too much."""

    key: str
    message: str


def problems(
    parallel: Parallel, cluster: Cluster, units: int, experts: Sequence[int], longest: int
) -> Iterator[LayoutProblem]:
    """What is wrong with a layout of a model.

    The model has `units` parts to cut, layers with `experts` routed experts, and sequences of at
    most `longest` tokens.
    """
    pipeline, ranks = parallel.pipeline, cluster.ranks
    if parallel.sequence_length > longest:
        yield LayoutProblem(
            "sequence_length",
            f"a sequence of {parallel.sequence_length} tokens is longer than the model takes,"
            f" {longest}",
        )
    stages = len(placement(parallel.schedule, pipeline)[0])
    if stages > units:
        yield LayoutProblem(
            "pipeline",
            f"the model has {units} parts, layers and what stands around them: too few for"
            f" {stages} stages",
        )
    if ranks % pipeline:
        yield LayoutProblem("pipeline", f"{ranks} ranks cannot be cut into {pipeline} equal stages")
        return
    data = ranks // pipeline
    yield from _expert_problems(parallel.expert, data, cluster.gpus_per_node, experts)
    if parallel.exchange == "symmetric_memory" and parallel.expert > SYMMETRIC_RANKS:
        yield LayoutProblem(
            "exchange",
            f"torch exchanges by symmetric memory between at most {SYMMETRIC_RANKS} ranks, not"
            f" {parallel.expert}",
        )
    yield from _batch_problems(parallel, data)


def _expert_problems(
    expert: int, data: int, node_size: int, experts: Sequence[int]
) -> Iterator[LayoutProblem]:
    if expert % node_size and node_size % expert:
        # A token goes to the rank with the same place in each of its nodes (report, section 3.2.2).
        yield LayoutProblem(
            "expert",
            f"groups of {expert} ranks neither fill nodes of {node_size} GPUs nor divide them",
        )
    if data % expert:
        yield LayoutProblem(
            "expert", f"the {data} ranks of a stage cannot be cut into groups of {expert}"
        )
    if expert > 1 and not experts:
        yield LayoutProblem("expert", "the model has no routed experts to spread")
    for count in experts:
        if count % expert:
            yield LayoutProblem(
                "expert",
                f"{count} routed experts cannot be spread evenly over {expert} ranks",
            )


def _batch_problems(parallel: Parallel, data: int) -> Iterator[LayoutProblem]:
    share = data * parallel.micro_batch
    if parallel.batch % share:
        yield LayoutProblem(
            "batch",
            f"{parallel.batch} sequences cannot be dealt evenly to {data} ranks in micro-batches"
            f" of {parallel.micro_batch}",
        )
        return
    count = parallel.batch // share
    if parallel.schedule == "dualpipe_v" and parallel.pipeline < 2:
        yield LayoutProblem(
            "schedule", "dualpipe_v turns back at the last of several ranks, not of 1"
        )
    if parallel.schedule == "dualpipe_v" and count < 2 * parallel.pipeline:
        yield LayoutProblem(
            "batch",
            f"dualpipe_v needs at least {2 * parallel.pipeline} micro-batches for"
            f" {parallel.pipeline} ranks; each rank has {count}",
        )
    if parallel.schedule != "dualpipe":
        return
    # Half of them enter at each end (DualPipe: an even number of ranks, two chunks for each).
    if parallel.pipeline % 2:
        yield LayoutProblem(
            "schedule", f"dualpipe needs an even number of stages, not {parallel.pipeline}"
        )
    if count % 2 or count < 2 * parallel.pipeline:
        yield LayoutProblem(
            "batch",
            f"dualpipe needs an even number of micro-batches, at least {2 * parallel.pipeline} for"
            f" {parallel.pipeline} stages; each rank has {count}",
        )
