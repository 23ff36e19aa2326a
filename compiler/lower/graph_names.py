"""Names of graphs, which become those of classes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from compiler.lower.bind import BlockRef, Bound, SlotValue

MAX_NAME = 60


def graph_names(bounds: Mapping[str, Bound]) -> dict[str, str]:
    """A name for each graph: that of its block, and what distinguishes it from others."""
    by_block: dict[str, list[str]] = {}
    for graph, bound in bounds.items():
        by_block.setdefault(bound.block.name.value, []).append(graph)
    final: dict[str, str] = {}
    taken: set[str] = set()
    for block, graphs in by_block.items():
        facts = {g: _facts(bounds[g]) for g in graphs}
        differing = [
            key
            for key in next(iter(facts.values()))
            if len({f.get(key) for f in facts.values()}) > 1
        ]
        for graph in graphs:
            parts = [block, *(facts[graph].get(key, "") for key in differing)]
            name = re.sub(r"[^A-Za-z0-9_]", "_", "_".join(p for p in parts if p))
            base = name = name[:MAX_NAME]
            n = 1
            while name in taken:
                n += 1
                name = f"{base}_{n}"
            taken.add(name)
            final[graph] = name
    return final


def _facts(bound: Bound) -> dict[str, str]:
    """What may tell two graphs of one block apart, in the order in which names list it."""

    def word(slot: SlotValue) -> str:
        if isinstance(slot, BlockRef):
            return "_".join(
                [slot.block.name.value, *(str(c.value) for c in slot.arguments.values())]
            )
        return "_".join(word(g.ref) for g in slot)

    slots = {name: word(slot) for name, slot in bound.slots.items()}
    return {**slots, **{name: str(const.value) for name, const in bound.params.items()}}
