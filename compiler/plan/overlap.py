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
    gradients of weights, which fill what is left, as far as the backward chunk has been computed.
    """
    chains = (backward, forward)
    place, ready = [0, 0], [0.0, 0.0]  # of each chunk: its next segment, and from when on
    whole = sum(one.computing for one in backward)
    filled = computed = now = sent = 0.0
    turn = 0
    while any(place[i] < len(chains[i]) for i in (0, 1)):
        if place[turn] < len(chains[turn]):
            segment = chains[turn][place[turn]]
            if ready[turn] > now:
                allowed = later * computed / whole if whole else later
                filled += min(ready[turn] - now, max(0.0, allowed - filled))
                now = ready[turn]
            ready[turn] = now = now + segment.computing
            computed += segment.computing if turn == 0 else 0.0
            if segment.sending:
                sent = ready[turn] = max(now, sent) + segment.sending
            place[turn] += 1
        turn = 1 - turn
    return max(now + later - filled, sent)
