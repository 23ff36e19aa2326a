"""How long a pair of chunks takes, each of which computes while the other's tokens travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class OverlapSegment:
    """Seconds of computing, and of the dispatch or combine that follows and that the next one
    waits for."""

    computing: float
    sending: float = 0.0


def paired(
    backward: Sequence[OverlapSegment],
    forward: Sequence[OverlapSegment],
    later: float = 0.0,
) -> float:
    """Seconds of two chunks that compute in turn, on one queue of computing and one of sending.

    A chunk whose turn it is waits for what its last segment sent; what is sent goes out in the
    order in which it was made. So `runtime/train/overlap.py` issues them. `later` are seconds for
    gradients of weights, which are there as the backward chunk is computed: all that are there are
    computed before a chunk waits, however long that would be.
    """
    chains = (backward, forward)
    place, ready = [0, 0], [0.0, 0.0]  # of each chunk: its next segment, and from when on
    whole = sum(one.computing for one in backward)
    there = 0.0 if whole else later
    now = sent = 0.0
    turn = 0
    while any(place[i] < len(chains[i]) for i in (0, 1)):
        if place[turn] < len(chains[turn]):
            segment = chains[turn][place[turn]]
            if place[turn]:
                now, there = now + there, 0.0
            ready[turn] = now = max(now, ready[turn]) + segment.computing
            if turn == 0 and whole:
                there += later * segment.computing / whole
            if segment.sending:
                sent = ready[turn] = max(now, sent) + segment.sending
            place[turn] += 1
        turn = 1 - turn
    return max(now + there, sent)
