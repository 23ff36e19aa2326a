"""Blocks of the cache as a state machine: none lost, none in two states, none with two writers."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime.serve.blocks import Blocks, first_hash, next_hash


class Requests(RuleBasedStateMachine):
    """Requests that take, publish, share and release blocks in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks(9)
        self.requests: list[list[int]] = []
        self.published: dict[bytes, int] = {}

    @rule(text=st.integers(0, 3), length=st.integers(1, 4))
    def start(self, text: int, length: int) -> None:
        """A request whose text is one of four: it shares what is known of it."""
        hashes = [bytes([text, i]) for i in range(length)]
        found = self.blocks.find(hashes)
        if self.blocks.available - self.blocks.resting(found) < length - len(found):
            return
        self.blocks.hold(found)
        new = [self.blocks.take() for _ in range(length - len(found))]
        assert not {*new} & {block for request in self.requests for block in request}
        self.requests.append([*found, *new])
        for hash, block in zip(hashes, self.requests[-1], strict=True):
            self.blocks.publish(block, hash)

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 100))
    def end(self, which: int) -> None:
        self.blocks.release(self.requests.pop(which % len(self.requests)))

    @invariant()
    def holds(self) -> None:
        self.blocks.check()
        held = {block for request in self.requests for block in request}
        assert self.blocks.held == len(held)
        assert self.blocks.available == 8 - len(held)


TestBlocks = Requests.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_what_was_released_first_is_given_out_first() -> None:
    blocks = Blocks(4)
    a, b, c = (blocks.take() for _ in range(3))
    for block, hash in ((a, b"a"), (b, b"b"), (c, b"c")):
        blocks.publish(block, hash)
    blocks.release([b])
    blocks.release([a, c])
    assert blocks.find([b"a"]) == [a]
    # b was released first; of the text a, c its end goes before its beginning.
    assert [blocks.take() for _ in range(3)] == [b, c, a]
    assert blocks.find([b"a"]) == []
    with pytest.raises(IndexError, match="all blocks of the cache are held"):
        blocks.take()


def test_a_hash_is_that_of_all_text_before_and_of_the_salt() -> None:
    start = first_hash()
    assert next_hash(start, [1, 2]) == next_hash(start, (1, 2))
    ends = {
        next_hash(next_hash(start, [1, 2]), [3, 4]),
        next_hash(next_hash(start, [1, 5]), [3, 4]),
        next_hash(next_hash(first_hash(b"another"), [1, 2]), [3, 4]),
        next_hash(start, [3, 4]),
        next_hash(start, [3 + 4 * 2**8]),
    }
    assert len(ends) == 5
