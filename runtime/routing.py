"""Which ranks compute the rows of experts: this one, unless a block is called within `routed`.

Generated code asks `functional.permute` for the rows of its experts and gives their results to
`functional.unpermute`. Between the two every operation is by row, so that it computes the rows of
other ranks' tokens like its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor


class Routing(Protocol):
    """The experts of one block on several ranks."""

    def send(self, rows: Sequence[Tensor], index: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Rows [.., width] of each token to the ranks of its experts, `index` int64 [.., k].

        Gives the rows that came for the experts here, sorted by them; int32 [experts here], where
        those of each end; and int64, the places in the flattened `index` in the order in which
        `give_back` brings results. Experts that give back their tokens have no rows.
        """

    def give_back(self, y: Tensor) -> Tensor:
        """Results of the rows that came, to where they came from: [places, width]."""


_state = threading.local()


@contextmanager
def routed(ranks: Routing) -> Iterator[None]:
    """Around a call of a block whose experts are on several ranks."""
    before, _state.ranks = current(), ranks
    try:
        yield
    finally:
        _state.ranks = before


def current() -> Routing | None:
    return getattr(_state, "ranks", None)
