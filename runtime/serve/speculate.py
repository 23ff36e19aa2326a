"""Drafts by MTP modules: what the tokens after the next one may be.

A right draft saves a step. What is drafted changes how many steps an answer takes and nothing else.

Module k, from 1, turns the state that module k - 1 has at a token (the main model for k = 1) and
the token k places further on into its own entry and state. After a step the modules compute these
for the tokens whose entries the step added; the last k - 1 of them need tokens that are only
drafted, and are computed again when these are known. Behind the last module its own states stand
for those of the next token, so that one module can draft any number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..pages import Draft, Pages, make_rows
from .sampler import choose
from .scheduler import Matcher, Planned, Request, Scheduler

TRIED = 64
"""First drafts after which a request's luck is judged."""
LUCK = 0.3
"""Share of right first drafts below which drafting costs more than it saves."""


@dataclass(eq=False)
class _Text:
    """What one request takes part with."""

    request: Request
    start: int
    """The position of the first of `states`."""
    states: Tensor
    """[n, hidden], of the module before."""
    tails: dict[int, Tensor]
    """`Request.tails` of the step before."""
    drafting: bool
    matcher: Matcher | None
    """Follows the drafts by the request's grammar."""


class Drafter:
    """Drafts up to `most` tokens of each answer, by a model's MTP modules in order."""

    def __init__(
        self,
        modules: Sequence[tuple[Draft, int]],
        most: int,
        pages: Pages,
        scheduler: Scheduler,
    ) -> None:
        """`modules` are each the scores of a module, and its offset of positions."""
        self.modules = modules[:most]
        self.most = most
        self.pages = pages
        self.scheduler = scheduler

    def draft(self, planned: Sequence[Planned], firsts: Sequence[int], running: Running) -> int:
        """Drafts of those requests that are still running; how many there are.

        `firsts` says from where on a step computed each request, whose states the pages hold.
        """
        texts = list(self._texts(planned, firsts, running))
        drafts = 0
        for depth in range(1, self.most + 1):
            if depth <= len(self.modules):
                texts = [text for text in texts if self._catch_up(text, depth)]
            else:
                texts = [text for text in texts if text.drafting and self._go_on(text, depth)]
            if not texts:
                break
            drafts += self._run(texts, depth)
        return drafts

    def _texts(
        self, planned: Sequence[Planned], firsts: Sequence[int], running: Running
    ) -> Iterator[_Text]:
        row = 0
        for (request, new), first in zip(planned, firsts, strict=True):
            request.drafts = []
            if running(request) and not unlucky(request):
                states = self.pages.states[0, row : row + request.computed - first]
                drafting, matcher = request.pending == 1, request.matcher
                if matcher is not None:
                    matcher = matcher.copy() if drafting else None
                tails, request.tails = request.tails, {}
                yield _Text(request, first, states, tails, drafting, matcher)
            row += new

    def _catch_up(self, text: _Text, depth: int) -> bool:
        """The states of the module before for this one; whether there are any."""
        before = text.tails.get(depth)
        if before is not None:
            text.start -= 1
            text.states = torch.cat([before, text.states])
        known = text.request.known + len(text.request.drafts)
        text.states = text.states[: max(known - depth - text.start, 0)]
        return len(text.states) > 0

    def _go_on(self, text: _Text, depth: int) -> bool:
        """After the last module its last state serves as that of the next token."""
        text.start += len(text.states)
        text.states = text.states[-1:]
        ahead = text.start + 1 - text.request.known
        return self.scheduler.reserve(text.request, ahead) >= ahead

    def _run(self, texts: list[_Text], depth: int) -> int:
        """Entries and states of one module, and its drafts; how many."""
        module = min(depth, len(self.modules))
        draft, offset = self.modules[module - 1]
        tokens: list[int] = []
        scored: list[int] = []
        drafting = []
        for text in texts:
            request, first = text.request, text.start + module
            tokens += request.tokens(first, first + len(text.states))
            left = request.sampling.max_tokens - len(request.output)
            # Only after a draft, and in front of a token that will be chosen.
            text.drafting &= len(request.drafts) == depth - 1 and left > depth
            if text.drafting:
                drafting.append(text)
                scored.append(len(tokens) - 1)
        device = self.pages.states.device
        sequences = [(t.request.blocks, t.start, len(t.states)) for t in texts]
        rows, position = make_rows(sequences, scored, self.pages.page, device)
        self.pages.begin(rows)
        states = torch.cat([text.states for text in texts]).unsqueeze(0)
        given = torch.tensor([tokens], device=device)
        logits = draft(states, given, position + offset, self.pages)
        drafts = sum(self._choose(*one) for one in zip(drafting, logits, strict=True))
        new = self.pages.states[0].split([len(text.states) for text in texts])
        for text, own in zip(texts, new, strict=True):
            text.states = own
            # What the next module needs first after the next step: its last state of known tokens.
            at = text.request.computed - depth - text.start
            if depth < len(self.modules) and 0 <= at < len(own):
                text.request.tails[depth + 1] = own[at : at + 1].clone()
        return drafts

    def _choose(self, text: _Text, logits: Tensor) -> bool:
        """By the same chance as the token itself will be; false where nothing can be chosen."""
        request, matcher = text.request, text.matcher
        allowed = matcher.mask() if matcher is not None else None
        if not logits.isfinite().all() or (allowed is not None and not allowed.any()):
            text.drafting = False
            return False
        output = [*request.output, *request.drafts]
        id = choose(logits, request.sampling, request.prompt, output, allowed)
        request.drafts.append(id)
        if id in request.sampling.end_tokens:
            text.drafting = False
        elif matcher is not None:
            matcher.consume(id)
        return True


Running = Callable[[Request], bool]
"""Whether a request has not ended."""


def unlucky(request: Request) -> bool:
    """Whether too few first drafts were right for more of them to pay."""
    return request.tried >= TRIED and request.right < LUCK * request.tried
