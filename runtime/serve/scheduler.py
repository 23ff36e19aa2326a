"""What a step computes: which requests, and how many tokens of each.

A request has tokens that are known and, of these, tokens that are computed: their entries are in
the cache. Each step brings the two closer, for a running answer by one token, for a prompt by a
part of it. A request that was preempted has nothing computed any more and everything still known,
so that it resumes like a longer prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..pages import FEW
from .blocks import Blocks, first_hash, next_hash
from .options import Options
from .request import Sampling


class Matcher(Protocol):
    """An answer that follows a grammar."""

    def mask(self) -> Tensor:
        """bool [vocab] on the CPU: which tokens may come next."""

    def consume(self, id: int) -> None:
        """Follows a token that was chosen."""

    def copy(self) -> Matcher:
        """Another one at the same place."""


@dataclass(eq=False)
class Request:
    """One request inside the engine."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    salt: bytes = b""
    output: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose entries are in the cache."""
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    """Of the full blocks of its text, as far as they were needed."""
    cached: int | None = None
    """Tokens of the prompt that were found in the prefix cache; None before it runs."""
    matcher: Matcher | None = None
    """Follows its output by the grammar that it asks for."""
    drafts: list[int] = field(default_factory=list)
    """What MTP modules expect for the tokens after the known ones."""
    tails: dict[int, Tensor] = field(default_factory=dict)
    """By MTP module, from 2: the state [1, hidden] of the module before that it needs next."""
    tried: int = 0
    """Steps that had a draft,"""
    right: int = 0
    """and of these those whose first draft was right."""

    @property
    def known(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def pending(self) -> int:
        """Known tokens that are not computed: one of a running answer, more of a prompt."""
        return self.known - self.computed

    def tokens(self, start: int, stop: int) -> list[int]:
        """Of prompt and output together, and of the drafts after them."""
        found: list[int] = []
        for part in (self.prompt, self.output, self.drafts):
            found += part[max(start, 0) : max(stop, 0)]
            start, stop = start - len(part), stop - len(part)
        return found

    def hash_of(self, block: int, page: int) -> bytes:
        """Of the full block `block` of its text."""
        while len(self.hashes) <= block:
            i = len(self.hashes)
            before = self.hashes[-1] if self.hashes else first_hash(self.salt)
            self.hashes.append(next_hash(before, self.tokens(i * page, (i + 1) * page)))
        return self.hashes[block]


Planned = tuple[Request, int]
"""A request and how many of its tokens a step computes; those after the known ones are drafts."""


class Scheduler:
    """Requests that run and wait, and the blocks that they hold.

    The oldest request is never preempted for a younger one and fits into the cache alone, so that
    every request ends.
    """

    def __init__(self, options: Options, blocks: Blocks) -> None:
        self.options = options
        self.blocks = blocks
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # the oldest first
        self.preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is; its blocks are available at once."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def plan(self) -> list[Planned]:
        """What the next step computes, with blocks for all of it.

        Answers come first, one token each, then prompts, the oldest first, as far as `step_tokens`
        allows, then waiting requests that fit; what is left is for drafts. Raises RuntimeError if
        nothing can be computed although somebody waits, which would be a fault of the scheduler.
        """
        left = self.options.step_tokens
        planned: list[Planned] = []
        for request in list(self.running):
            answers = request in self.running and request.pending == 1
            if left and answers and self._make_room(request):
                planned.append((request, 1))
                left -= 1
        for request in self.running:
            new = min(request.pending, left)
            if new and request.pending > 1:
                planned.append((request, new))
                left -= new
        while left and self.waiting and len(self.running) < self.options.max_requests:
            request = self.waiting[0]
            if not self._admit(request):
                break
            self.waiting.popleft()
            new = min(request.pending, left)
            planned.append((request, new))
            left -= new
        if self.waiting and not planned:
            raise RuntimeError(f"no request of {len(self.waiting)} that wait can run")
        for i, (request, new) in enumerate(planned):
            drafts = min(len(request.drafts), left)
            if drafts:
                drafts = max(min(self.reserve(request, drafts), drafts), 0)
                planned[i] = (request, new + drafts)
                left -= drafts
        return planned

    def admit(self, request: Request) -> bool:
        """Starts a request that is computed already, unless others wait or there is no room."""
        full = len(self.running) >= self.options.max_requests
        return not full and not self.waiting and self._admit(request)

    def computed(self, request: Request, new: int) -> None:
        """Notes that a step computed `new` tokens; full blocks can be found from now on."""
        page = self.options.page
        first, request.computed = request.computed // page, request.computed + new
        if self.options.prefix_cache:
            for block in range(first, request.computed // page):
                self.blocks.publish(request.blocks[block], request.hash_of(block, page))

    def _make_room(self, request: Request) -> bool:
        """A block for the next token of an answer; whether it is still running then."""
        while len(request.blocks) * self.options.page < request.known:
            if self.blocks.available:
                request.blocks.append(self.blocks.take())
            else:
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is request:
                    return False
        return True

    def reserve(self, request: Request, tokens: int) -> int:
        """Blocks for so many tokens after the known ones, as far as there are any: nobody is
        preempted. For how many there is room now."""
        page = self.options.page
        while len(request.blocks) * page < request.known + tokens and self.blocks.available:
            request.blocks.append(self.blocks.take())
        return len(request.blocks) * page - request.known

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _release(self, request: Request) -> None:
        self.blocks.release(request.blocks)
        request.blocks, request.computed = [], 0
        request.drafts, request.tails = [], {}

    def _admit(self, request: Request) -> bool:
        """Starts a request if there are blocks for all its known tokens and the next one.

        Blocks that its text has in common with others are shared, but never that of its last token,
        which is computed for its logits.
        """
        page = self.options.page
        found: list[int] = []
        if self.options.prefix_cache:
            full = (request.known - 1) // page
            found = self.blocks.find([request.hash_of(i, page) for i in range(full)])
        needed = _blocks_for(min(request.known + 1, self._longest(request)), page) - len(found)
        # A few blocks stay free, so that admission does not preempt somebody at once.
        spare = self.blocks.count // 100 if self.running else 0
        if self.blocks.available - self.blocks.resting(found) < needed + spare:
            return False
        self.blocks.hold(found)
        request.blocks = [*found, *(self.blocks.take() for _ in range(needed))]
        request.computed = len(found) * page
        if request.cached is None:
            request.cached = request.computed
        self.running.append(request)
        return True

    def _longest(self, request: Request) -> int:
        return len(request.prompt) + request.sampling.max_tokens

    def fits(self, request: Request) -> bool:
        """Whether the request could run alone to its end."""
        return _blocks_for(self._longest(request), self.options.page) < self.blocks.count


def _blocks_for(tokens: int, page: int) -> int:
    return -(-tokens // page)


def in_order(planned: Sequence[Planned]) -> list[Planned]:
    """Short sequences first: neighbours of about the same length attend together."""
    return sorted(planned, key=lambda one: (one[1] > FEW, one[0].known))
