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
    forward: Sequence[OverlapSegment],
    backward: Sequence[OverlapSegment],
    later: Sequence[OverlapSegment],
) -> float:
    """Seconds of both chunks on one queue of computing and one of sending.

    Whichever segment can begin first is computed next; gradients of weights, `later`, fill what
    is left, and wait until as large a part of the backward chunk has been computed. What is sent
    goes out in the order in which it was made.
    """
    chains = (forward, backward)
    place, ready = [0, 0], [0.0, 0.0]  # of each chunk: its next segment, and from when on
    work = sum(one.computing for one in later)
    whole = sum(one.computing for one in backward)
    filled = computed = now = sent = 0.0
    while any(place[i] < len(chains[i]) for i in (0, 1)):
        left = [i for i in (0, 1) if place[i] < len(chains[i])]
        chosen = min(left, key=lambda i: ready[i])
        if ready[chosen] > now:
            allowed = work * computed / whole if whole else work
            fill = min(ready[chosen] - now, max(0.0, allowed - filled))
            filled += fill
            now = ready[chosen]
        segment = chains[chosen][place[chosen]]
        now += segment.computing
        computed += segment.computing if chosen else 0.0
        ready[chosen] = now
        if segment.sending:
            sent = ready[chosen] = max(now, sent) + segment.sending
        place[chosen] += 1
    return max(now + work - filled, sent)
