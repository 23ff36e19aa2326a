"""Who holds which block of the KV cache, and what is found again by its text."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence


class Blocks:
    """Blocks 1 to `count` - 1 of the cache; block 0 is never given out.

    A block is free, held by one or more requests, or cached: held by none, but found by the hash of
    all text up to its end. Cached blocks are given out again when no free one is left, those that
    were released first before others.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = deque(range(1, count))
        self._holders: dict[int, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._by_hash: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """How many blocks `take` could give out."""
        return len(self._free) + len(self._cached)

    @property
    def held(self) -> int:
        """How many blocks requests hold."""
        return len(self._holders)

    def take(self) -> int:
        """A free block. Raises IndexError when there is none."""
        if self._free:
            block = self._free.popleft()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            del self._by_hash[self._hash_of.pop(block)]
        else:
            raise IndexError("all blocks of the cache are held")
        self._holders[block] = 1
        return block

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning of a text; `hold` must follow."""
        found = []
        for hash in hashes:
            if hash not in self._by_hash:
                break
            found.append(self._by_hash[hash])
        return found

    def resting(self, blocks: Sequence[int]) -> int:
        """How many of these are free, so that holding them makes fewer available."""
        return sum(block in self._cached for block in blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._cached.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1

    def release(self, blocks: Sequence[int]) -> None:
        """The blocks of a request in order; the end of its text is given out again first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def publish(self, block: int, hash: bytes) -> None:
        """Lets others find a full block; of two with the same text the first is found."""
        if hash not in self._by_hash and block not in self._hash_of:
            self._by_hash[hash] = block
            self._hash_of[block] = hash

    def check(self) -> None:
        """Raises AssertionError if a block is lost, or in two states at once."""
        states = [*self._free, *self._holders, *self._cached]
        assert sorted(states) == list(range(1, self.count)), "a block is lost or in two states"
        assert all(n > 0 for n in self._holders.values())
        assert {self._by_hash[h]: h for h in self._by_hash} == self._hash_of
        assert not {*self._free} & {*self._hash_of}


def first_hash(salt: bytes = b"") -> bytes:
    """What the hashes of a text's blocks begin with: texts of other salts have other hashes."""
    return hashlib.sha256(b"salt" + salt).digest()


def next_hash(before: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of all text up to the end of a full block.

    Cryptographic, so that nobody can make a text that finds another's blocks.
    """
    text = b"".join(token.to_bytes(8, "little") for token in tokens)
    return hashlib.sha256(before + text).digest()
