"""The order of sequences: a permutation for each epoch, computed by index.

Nothing is stored and nothing shuffled: the n-th sequence of training follows from n, so that a run
can resume anywhere, and any number of ranks and workers see the same order.
"""

from __future__ import annotations

import hashlib

ROUNDS = 4


def permute_index(index: int, count: int, key: str) -> int:
    """The place of `index` in the permutation of 0 .. count - 1 that `key` selects.

    A Feistel network over the smallest even number of bits, walked until the result is below
    `count` (cycle walking; Black and Rogaway 2002): less than four walks on average.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for n in range(ROUNDS):
            left, right = right, left ^ (_hash(f"{key} {n} {right}") & mask)
        index = left << half | right
        if index < count:
            return index


def random_below(limit: int, key: str) -> int:
    """A number from 0 to limit - 1 that follows from `key`."""
    return _hash(key) % limit


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
