"""Placement of experts and copies of them on ranks, by load: expert-parallel load balancing.

The algorithm is that of github.com/deepseek-ai/EPLB (DeepSeek-V3 report, section 3.4), in whole
numbers, with ties to the lowest index, so that every rank computes the same. Besides, no rank gets
two copies of an expert where that can be avoided, the busiest rank is never busier than it would be
without copies, and ranks may hold one expert less than others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from heapq import heappop, heappush

Placement = list[list[int]]
"""Of one layer: the experts of each rank, in the order of its slots."""

EVEN = 720_720
"""A load is counted in such parts of a token, which up to 16 copies of an expert share evenly."""


def place(
    load: Sequence[int], redundant: int, ranks: int, nodes: int = 1, groups: int = 1
) -> Placement:
    """Where the experts of a layer go, with `redundant` copies in all besides one of each.

    `load` are tokens of each expert, in any unit. Hierarchical where `nodes` divide the router's
    `groups`: these are packed onto nodes first, so that a token visits few of them. Raises
    ValueError for sizes that cannot be placed.
    """
    experts = len(load)
    if min(experts, ranks, nodes, groups) < 1 or redundant < 0 or min(load) < 0:
        raise ValueError("loads, copies, ranks, nodes and groups cannot be negative or missing")
    slots = experts + redundant
    if slots < ranks:
        raise ValueError(f"{slots} experts, copies included, leave some of {ranks} ranks empty")
    parts = (experts % groups, groups % nodes, ranks % nodes, slots % nodes)
    if nodes == 1 or any(parts):
        return _on_node(load, range(experts), redundant, ranks)
    size = experts // groups
    members = [range(group * size, (group + 1) * size) for group in range(groups)]
    sums = [sum(load[expert] for expert in group) for group in members]
    found: Placement = []
    for packed in _pack(range(groups), sums, nodes):
        here = [expert for group in packed for expert in members[group]]
        found += _on_node(load, here, redundant // nodes, ranks // nodes)
    return found


def imbalance(load: Sequence[int], placement: Placement) -> Fraction:
    """The tokens of the busiest rank over the mean of all; 1 is perfect, also without any tokens.

    Copies of an expert share its tokens evenly.
    """
    copies = [0] * len(load)
    for rank in placement:
        for expert in rank:
            copies[expert] += 1
    shares = [tokens * EVEN // max(n, 1) for tokens, n in zip(load, copies, strict=True)]
    loads = [sum(shares[expert] for expert in rank) for rank in placement]
    total = sum(loads)
    return Fraction(max(loads) * len(loads), total) if total else Fraction(1)


def _on_node(load: Sequence[int], experts: Sequence[int], redundant: int, ranks: int) -> Placement:
    """The experts of a node, with copies, on its ranks."""
    copies = dict.fromkeys(experts, 1)
    replicas = list(experts)
    for _ in range(redundant):
        # A second copy on a rank would take no load from it.
        free = [expert for expert in experts if copies[expert] < ranks] or experts
        busiest = _busiest(load, free, copies)
        copies[busiest] += 1
        replicas.append(busiest)
    found = _pack(replicas, [load[expert] * EVEN // copies[expert] for expert in replicas], ranks)
    if not redundant or len(experts) < ranks:
        return found
    without = _pack(experts, [load[expert] for expert in experts], ranks)
    if imbalance(load, found) <= imbalance(load, without):
        return found
    # Packing goes step by step, and with other sizes it may end worse: then copies bring nothing.
    for _ in range(redundant):
        rank = min(without, key=len)
        rank.append(rank[0])
    return without


def _busiest(load: Sequence[int], experts: Iterable[int], copies: dict[int, int]) -> int:
    """The expert whose copies have most load each; of equals the first."""
    found = next(iter(experts))
    for expert in experts:
        if load[expert] * copies[found] > load[found] * copies[expert]:
            found = expert
    return found


def _pack(items: Sequence[int], weights: Sequence[int], packs: int) -> Placement:
    """Items into packs that have equally many, or one less, and about the same weight.

    The heaviest comes first, into the lightest pack that has a place for it and holds no equal one.
    """
    if len(items) <= packs:
        return [[item] for item in items]
    found = _Packs(len(items), packs)
    for i in sorted(range(len(items)), key=lambda i: (-weights[i], i)):
        found.add(items[i], weights[i])
    return found.items


class _Packs:
    """Packs that are filled with `count` items in all."""

    def __init__(self, count: int, packs: int) -> None:
        self.items: Placement = [[] for _ in range(packs)]
        self.sums = [0] * packs
        self.held: list[dict[int, int]] = [{} for _ in range(packs)]  # item -> weight
        self.most = -(-count // packs)
        self.may_fill = packs - (self.most * packs - count)  # all others get one less
        self.lightest = [(0, pack) for pack in range(packs)]  # a heap of those with places

    def add(self, item: int, weight: int) -> None:
        passed: list[tuple[int, int]] = []
        pack = self._lightest_without(item, passed)
        if pack is None:
            pack = passed.pop(0)[1]
            item, weight = self._swap(pack, item, weight)
        self._put(pack, item, weight)
        self.may_fill -= len(self.items[pack]) == self.most
        for at in (*passed, (self.sums[pack], pack)):
            heappush(self.lightest, at)

    def _lightest_without(self, item: int, passed: list[tuple[int, int]]) -> int | None:
        """Takes a pack off the heap, and with it those that hold the item: they are `passed`."""
        while self.lightest:
            at = heappop(self.lightest)
            if len(self.items[at[1]]) >= self.most - (self.may_fill == 0):
                continue
            if item not in self.held[at[1]]:
                return at[1]
            passed.append(at)
        return None

    def _put(self, pack: int, item: int, weight: int) -> None:
        self.items[pack].append(item)
        self.sums[pack] += weight
        self.held[pack][item] = weight

    def _swap(self, pack: int, item: int, weight: int) -> tuple[int, int]:
        """Puts `item` where another was, which `pack` can take, and gives that and its weight.

        There is one where an item has no more copies than there are packs: packs without it are
        full, and `pack` holds fewer kinds than one of those. Otherwise it gives `item` itself.
        """
        best: tuple[int, int, int] | None = None
        for other in range(len(self.items)):
            if item in self.held[other]:
                continue
            for place, moved in enumerate(self.items[other]):
                if moved not in self.held[pack]:
                    less = self.held[other][moved]
                    sums = self.sums[pack] + less, self.sums[other] - less + weight
                    best = min(best or (max(sums), other, place), (max(sums), other, place))
        if best is None:
            return item, weight
        _, other, place = best
        moved = self.items[other].pop(place)
        less = self.held[other].pop(moved)
        self.sums[other] -= less
        self._put(other, item, weight)
        return moved, less
