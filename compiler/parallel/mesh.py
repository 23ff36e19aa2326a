"""The mesh: which ranks there are, and which of them form groups.

It has three axes. Ranks count along `expert` first, then `replica`, then `pipeline`, so that the
ranks of one expert group are neighbours and fill whole nodes, and the neighbours of a rank along
the pipeline have its place within their nodes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Coordinates:
    """The place of a rank in the mesh. Together `replica` and `expert` are its data rank."""

    pipeline: int
    replica: int
    expert: int


@dataclass(frozen=True)
class Mesh:
    """`pipeline` x `replicas` x `expert` ranks on nodes of `node_size` ranks each.

    Each data rank, of `replicas` x `expert`, works on sequences of its own. The routed experts of
    a layer lie spread over the `expert` ranks of a group, and once in each of the `replicas`.
    """

    pipeline: int
    replicas: int
    expert: int
    node_size: int

    @property
    def data(self) -> int:
        """Ranks that work on different sequences with the same layers."""
        return self.replicas * self.expert

    @property
    def size(self) -> int:
        return self.pipeline * self.data

    @property
    def nodes(self) -> int:
        return -(-self.size // self.node_size)

    def coordinates(self, rank: int) -> Coordinates:
        rest, expert = divmod(rank, self.expert)
        pipeline, replica = divmod(rest, self.replicas)
        return Coordinates(pipeline, replica, expert)

    def rank(self, pipeline: int, replica: int, expert: int) -> int:
        return (pipeline * self.replicas + replica) * self.expert + expert

    def node(self, rank: int) -> int:
        return rank // self.node_size

    def group(self, rank: int, axes: Collection[str]) -> tuple[int, ...]:
        """The ranks that differ from `rank` in `axes` only, in order.

        Over `expert` they exchange tokens around the routed experts; over `replica` they hold the
        same routed experts, over both the same other weights. `mirror` adds the pipeline rank that
        is as far from the other end: under DualPipe it holds the same stages.
        """
        here = self.coordinates(rank)
        mirrored = self.pipeline - 1 - here.pipeline
        pipelines = {here.pipeline, mirrored} if "mirror" in axes else {here.pipeline}
        replicas = range(self.replicas) if "replica" in axes else (here.replica,)
        experts = range(self.expert) if "expert" in axes else (here.expert,)
        places = product(sorted(pipelines), replicas, experts)
        return tuple(self.rank(*place) for place in places)

    @property
    def data_axes(self) -> tuple[str, ...]:
        """The axes with more than one rank over which sequences are spread."""
        ranks = {"replica": self.replicas, "expert": self.expert}
        return tuple(axis for axis, count in ranks.items() if count > 1)
