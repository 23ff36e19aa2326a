"""The mesh: which ranks there are, and which of them form groups.

It has three axes. Ranks count along `expert` first, then `replica`, then `pipeline`, so that the
ranks of one expert group are neighbours and fill whole nodes, and the neighbours of a rank along
the pipeline have its place within their nodes.
"""

from __future__ import annotations

from dataclasses import dataclass


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

    def data_group(self, rank: int) -> range:
        """The ranks with the same layers, which share gradients of all but routed experts."""
        start = rank - rank % self.data
        return range(start, start + self.data)

    def expert_group(self, rank: int) -> range:
        """The ranks that exchange tokens with `rank` around the routed experts."""
        start = rank - rank % self.expert
        return range(start, start + self.expert)

    def expert_replicas(self, rank: int) -> range:
        """The ranks of one pipeline rank that hold the same routed experts as `rank`."""
        group = self.data_group(rank)
        return range(group.start + rank % self.expert, group.stop, self.expert)
