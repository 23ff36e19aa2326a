"""What a rank holds at most while it runs a schedule."""

from __future__ import annotations

from compiler.plan.schedule import Receive, Schedule


def under_way(given: Schedule, rank: int) -> int:
    """For how many chunks a rank keeps activations at most: forward, and no gradients of inputs."""
    most = now = 0
    for step in given.steps(rank):
        for chunk in step:
            now += (chunk.kind == "F") - (chunk.kind in "BI")
        # Of an overlapped pair the one begins before the other has ended.
        most = max(most, now + sum(chunk.kind in "BI" for chunk in step) * (len(step) > 1))
    return most


def open_receives(given: Schedule, rank: int) -> int:
    """How many messages a rank holds at most that it received, and whose readers are not done."""
    most = now = 0
    arriving = {one.key for one in given.messages if one.receiver == rank}
    for entry in given.rows[rank]:
        if isinstance(entry, Receive):
            now += 1
            most = max(most, now)
        elif isinstance(entry, tuple):
            now -= sum(chunk.reads in arriving for chunk in entry)
    return most
