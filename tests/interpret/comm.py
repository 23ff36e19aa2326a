"""What operators do that move tensors between ranks, and ranks that run in lockstep.

Every rank is a thread that runs its own program; at a collective they wait for each other. What
each of them sends is counted message by message, the way `compiler/ops/comm.py` describes it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from queue import Queue
from threading import Barrier, BrokenBarrierError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compiler.graph.core import Op
from compiler.graph.types import MESH_AXES
from compiler.ops.base import CommBytes, dims_of
from compiler.parallel.mesh import Coordinates, Mesh

if TYPE_CHECKING:
    from tests.interpret.frame import Frame

TOKEN = 0xFFFFFFFF
"""The bits of a handle that are the token; those above are the rank it came from."""
WAIT = 60.0
"""Seconds after which a rank that waits for the others gives up: they have failed."""


class World:
    """The ranks of a mesh, and what is under way between them."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.ranks = [Rank(self, i) for i in range(mesh.size)]
        self.barriers: dict[tuple[int, ...], Barrier] = {}
        self.posted: dict[tuple[int, ...], dict[int, Any]] = defaultdict(dict)
        self.mail: dict[tuple[int, int], Queue[Any]] = defaultdict(Queue)
        self.barriers[tuple(range(mesh.size))] = Barrier(mesh.size)
        for rank in self.ranks:
            for n in range(1, len(MESH_AXES) + 1):
                for axes in combinations(MESH_AXES, n):
                    group = rank.group(axes)
                    self.barriers.setdefault(group, Barrier(len(group)))

    def run(self, one: Callable[[Rank], Any]) -> list[Any]:
        """What `one` gives for each rank, all of them at once."""

        def guarded(rank: Rank) -> Any:
            try:
                return one(rank)
            except BaseException:
                # Nobody waits for a rank that has failed.
                for barrier in self.barriers.values():
                    barrier.abort()
                for other in self.ranks:
                    self.mail[rank.number, other.number].put(None)
                raise

        with ThreadPoolExecutor(len(self.ranks)) as pool:
            jobs = [pool.submit(guarded, rank) for rank in self.ranks]
        # The first mistake, and not that somebody waited for it in vain.
        errors = [error for job in jobs if (error := job.exception())]
        for error in sorted(errors, key=lambda e: isinstance(e, BrokenBarrierError)):
            raise error
        return [job.result() for job in jobs]


@dataclass
class Rank:
    """One rank: its place, and the bytes that it has sent for each kind of operator."""

    world: World
    number: int
    sent: dict[str, CommBytes] = field(default_factory=dict)

    @property
    def place(self) -> Coordinates:
        return self.world.mesh.coordinates(self.number)

    def group(self, axes: Sequence[str]) -> tuple[int, ...]:
        """The ranks that differ from this one in `axes` only, in order."""
        return self.world.mesh.group(self.number, axes)

    def exchange(self, axes: Sequence[str], value: Any) -> list[Any]:
        """What every rank of the group gave, in order."""
        return self._exchange(self.group(axes), value)

    def everywhere(self, value: Any) -> list[Any]:
        """What every rank of the world gave, in order."""
        return self._exchange(tuple(range(self.world.mesh.size)), value)

    def _exchange(self, group: tuple[int, ...], value: Any) -> list[Any]:
        barrier, posted = self.world.barriers[group], self.world.posted[group]
        posted[self.number] = value
        barrier.wait(WAIT)
        found = [posted[rank] for rank in group]
        barrier.wait(WAIT)
        return found

    def send(self, pipeline: int, x: Any) -> None:
        """Gives x to the rank of the same place at another pipeline rank."""
        self.world.mail[self.number, self._at(pipeline)].put(x)

    def receive(self, pipeline: int) -> Any:
        """What the rank of the same place at another pipeline rank sends next."""
        found = self.world.mail[self._at(pipeline), self.number].get(timeout=WAIT)
        assert found is not None, "the sender has failed"
        return found

    def _at(self, pipeline: int) -> int:
        return self.world.mesh.rank(pipeline, self.place.replica, self.place.expert)

    def count(self, op: Op, inside: int = 0, across: int = 0) -> None:
        """Bytes that this rank sends to others on its node, and to other nodes."""
        before = self.sent.get(op.kind, CommBytes())
        self.sent[op.kind] = CommBytes(before.intra_node + inside, before.inter_node + across)


def _rank(f: Frame) -> Rank:
    assert f.rank is not None, "a program of one rank runs in a World"
    return f.rank


def _dispatch(f: Frame, op: Op, *given: Tensor) -> list[Tensor]:
    rank, each = _rank(f), op.number("count") // op.number("ranks")
    rows = [x.flatten(0, -2) for x in given]
    _count_tokens(f, op, (rows[-1] // each).tolist(), sum(x[:1].nbytes for x in rows))
    first = rank.place.expert * each
    arrived: list[list[Tensor]] = []
    for source, (*theirs, route) in enumerate(rank.exchange(("expert",), rows)):
        mine = (route >= first) & (route < first + each)
        (token,) = mine.any(-1).nonzero(as_tuple=True)
        local = torch.where(mine, route - first, -1)
        arrived.append([x[token] for x in (*theirs, local)] + [token + (source << 32)])
    return [torch.cat(parts) for parts in zip(*arrived, strict=True)]


def _count_tokens(f: Frame, op: Op, ranks: Sequence[Sequence[int]], size: int) -> None:
    """Each token once to each node, and there from the rank it arrives at to the others.

    `ranks` are those of the experts of each token. What is passed on is counted as sent by the
    rank of the token: a balanced load makes the two alike.
    """
    rank, mesh = _rank(f), _rank(f).world.mesh
    group = rank.group(("expert",))
    for chosen in ranks:
        to = {group[r] for r in chosen if r < len(group)}  # others give back their tokens
        nodes = {mesh.node(r) for r in to}
        assert len(nodes) <= op.number("limit"), f"a token goes to {len(nodes)} nodes"
        # On each node it arrives at the rank of the same place.
        landings = {node * mesh.node_size + rank.number % mesh.node_size for node in nodes}
        across = len(nodes - {mesh.node(rank.number)})
        rank.count(op, size * len(to - landings), size * across)


def _dispatch_again(f: Frame, op: Op, *given: Tensor) -> list[Tensor]:
    """By the handle alone, in which each rank finds the rank and token of every row."""
    rank = _rank(f)
    here, rows = rank.place.expert, [x.flatten(0, -2) for x in given[:-1]]
    arrived: list[list[Tensor]] = []
    ranks = torch.full((len(rows[0]), op.number("ranks")), -1)
    for source, (*theirs, handle) in enumerate(rank.exchange(("expert",), [*rows, given[-1]])):
        token = given[-1][given[-1] >> 32 == source] & TOKEN
        arrived.append([x[token] for x in theirs])
        ranks[handle[handle >> 32 == here] & TOKEN, source] = source
    to = [[r for r in chosen if r >= 0] for chosen in ranks.tolist()]
    _count_tokens(f, op, to, sum(x[:1].nbytes for x in rows))
    return [torch.cat(parts) for parts in zip(*arrived, strict=True)]


def _combine(f: Frame, op: Op, *given: Tensor) -> list[Tensor]:
    *rows, handle, route = given
    size = sum(y.shape[-1] * y.element_size() for y in rows)
    ranks = route.flatten(0, -2) // (op.number("count") // op.number("ranks"))
    _count_tokens(f, op, ranks.tolist(), size)
    return [_combined(f, op, y, handle, route) for y in rows]


def _combined(f: Frame, op: Op, y: Tensor, handle: Tensor, route: Tensor) -> Tensor:
    rank, tokens = _rank(f), route.flatten(0, -2).shape[0]
    on_node = op.number("ranks") // op.number("nodes")
    total = y.new_zeros(tokens, y.shape[-1])
    part = torch.zeros_like(total)
    for i, (rows, sources) in enumerate(rank.exchange(("expert",), (y, handle))):
        (back,) = (sources >> 32 == rank.place.expert).nonzero(as_tuple=True)
        part.index_add_(0, sources[back] & TOKEN, rows[back])
        if (i + 1) % on_node == 0:
            total, part = total + part, torch.zeros_like(part)
    return total.view(*route.shape[:-1], -1)


def _summed(f: Frame, op: Op, x: Tensor) -> Tensor:
    parts = _rank(f).exchange(op.texts("axes"), x)
    return torch.stack(parts).sum(0)


def place_of(f: Frame, op: Op) -> int:
    """The place of this rank among those of a collective."""
    rank = _rank(f)
    return rank.group(op.texts("axes")).index(rank.number)


def _reduce_scatter(f: Frame, op: Op, x: Tensor) -> Tensor:
    flat, share = _summed(f, op, x).flatten(), op.result.type.last.size or 0
    filled = torch.nn.functional.pad(flat, (0, share * op.number("ranks") - len(flat)))
    return filled.split(share)[place_of(f, op)]


def _all_gather(f: Frame, op: Op, x: Tensor) -> Tensor:
    whole = torch.cat(_rank(f).exchange(op.texts("axes"), x))
    shape = [d.size or 0 for d in dims_of(op.attrs["into"])]
    return whole[: torch.Size(shape).numel()].view(shape)


def _send(f: Frame, op: Op, x: Tensor) -> list[Tensor]:
    rank = _rank(f)
    rank.count(op, across=x.nbytes)
    rank.send(op.number("pipeline"), x)
    return []


def _recv(f: Frame, op: Op) -> Tensor:
    found = _rank(f).receive(op.number("pipeline"))
    assert isinstance(found, Tensor)
    return found


COMM: dict[str, Callable[..., Any]] = {
    "dispatch": _dispatch,
    "dispatch_again": _dispatch_again,
    "combine": _combine,
    "all_reduce": _summed,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "send": _send,
    "recv": _recv,
}
