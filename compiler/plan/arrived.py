"""What ranks save of the tokens that came to their experts, in place of what one rank saves.

Tokens bring the weights of their experts along; a rank also saves which of its experts they are
for, and the way that they came by (`runtime/exchange.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from compiler.parallel.mesh import Mesh
from compiler.plan.saved import Activations, SavedValue
from compiler.plan.traffic import ExpertTraffic

# The number of an expert where it is saved, and that of a token on its way.
NUMBER_BYTES = 8


def spread(
    whole: Activations, exchanges: Sequence[ExpertTraffic], mesh: Mesh, tokens: int
) -> Activations:
    """What is saved where the experts of a unit are on several ranks, for `tokens` tokens."""
    if mesh.expert == 1 or not exchanges:
        return whole
    elsewhere = whole.filling - whole.filling // mesh.expert  # for experts of other ranks
    return replace(
        whole,
        saved=tuple(_saved(whole, exchanges, mesh, tokens)),
        operands=whole.operands - elsewhere,
        filling=whole.filling - elsewhere,
    )


def _saved(
    whole: Activations, exchanges: Sequence[ExpertTraffic], mesh: Mesh, tokens: int
) -> Iterator[SavedValue]:
    by_block = {one.block: one for one in exchanges}
    nodes = len({mesh.node(rank) for rank in mesh.group(0, ("expert",))})
    inside = mesh.expert // nodes
    for value in whole.saved:
        if not value.expert_weights:
            yield value
            continue
        one = by_block[value.block]
        comes = one.ranks(inside)
        yield replace(value, bytes=comes * value.bytes)
        # Rows of experts, and of the way: across nodes and inside them where there are both.
        rows = comes * one.k + comes + (one.nodes if nodes > 1 and inside > 1 else 0)
        size = rows * tokens * NUMBER_BYTES
        yield SavedValue(f"{value.name}_route", value.block, size, value.span)
