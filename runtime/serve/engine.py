"""The engine: requests in, steps of the model, tokens out.

Each request gives the same tokens and log-probabilities, bit for bit, alone or in any company,
whatever its prompt was cut into, found of in the prefix cache, or computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import matmul
from ..config import Config
from ..pages import Pages, make_rows
from .blocks import Blocks
from .options import Options
from .request import Event, FinishReason, Sampling, Token
from .sampler import choose, told
from .scheduler import Matcher, Planned, Request, Scheduler, in_order

Show = Callable[[int, Token], None]


class Decoder(Protocol):
    """What the engine needs of a model."""

    @property
    def config(self) -> Config: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def draft_offset(self) -> int | None: ...
    def decode(self, tokens: Tensor, position: Tensor, cache: Pages) -> Tensor: ...
    def draft(self, state: Tensor, tokens: Tensor, position: Tensor, cache: Pages) -> Tensor: ...


class Grammars(Protocol):
    """What the engine needs for answers that follow a grammar."""

    def matcher(self, grammar: str) -> Matcher:
        """Raises ValueError for a grammar that cannot be followed."""


class Engine:
    """Computes the requests that were added, a step at a time.

    Raises ValueError for options that do not fit the model, and for a model without weights.
    """

    def __init__(
        self,
        model: Decoder,
        options: Options | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.model = model
        self.grammars = grammars
        self.options = options = options or Options()
        if model.device.type == "meta":
            raise ValueError("the model has no weights yet (device='meta'): load some first")
        longest = model.config.sequence.max_position_embeddings
        self.max_model_len = options.max_model_len or longest
        if self.max_model_len > longest:
            raise ValueError(
                f"max_model_len {self.max_model_len} exceeds max_position_embeddings ({longest})"
            )
        if options.speculate and model.draft_offset is None:
            raise ValueError("speculate=1, but the model has no MTP module that could draft")
        self.vocab_size = model.config.params.vocab_size
        one = Pages(1, options.page)
        self._compute_one(one)
        self.block_bytes = one.bytes
        self.pages = Pages(self._count_blocks(), options.page)
        self._compute_one(self.pages)
        self.scheduler = Scheduler(options, Blocks(self.pages.blocks))
        self._requests: dict[str, Request] = {}
        self._ended: list[Event] = []
        self._counts = dict.fromkeys(
            (
                "steps",
                "prompt_tokens",
                "cached_tokens",
                "generated_tokens",
                "drafts",
                "accepted_drafts",
            ),
            0,
        )

    # ---- requests --------------------------------------------------------------------------------

    def add(self, id: str, prompt: Sequence[int], sampling: Sampling, salt: bytes = b"") -> None:
        """Takes a request up. Requests with other salts share no blocks of the cache.

        Raises ValueError for a prompt or settings that can never run.
        """
        if id in self._requests:
            raise ValueError(f"there is a request {id!r} already")
        sampling.check(self.vocab_size)
        if not prompt:
            raise ValueError("the prompt is empty: it needs at least one token")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"token ids must be from 0 to {self.vocab_size - 1}: {low} to {high}")
        if len(prompt) + sampling.max_tokens > self.max_model_len:
            raise ValueError(
                f"{len(prompt)} tokens and {sampling.max_tokens} new ones exceed the longest text "
                f"({self.max_model_len}): max_tokens can be "
                f"{max(self.max_model_len - len(prompt), 0)} at most"
            )
        request = Request(id, tuple(prompt), sampling, salt)
        if sampling.grammar is not None:
            if self.grammars is None:
                raise ValueError("this engine was made without grammars")
            request.matcher = self.grammars.matcher(sampling.grammar)
        if not self.scheduler.fits(request):
            room = (self.pages.blocks - 1) * self.options.page
            raise ValueError(
                f"{len(prompt)} tokens and {sampling.max_tokens} new ones do not fit in the KV "
                f"cache, which holds {room}: give it more memory"
            )
        self._counts["prompt_tokens"] += len(prompt)
        if not sampling.max_tokens:
            self._ended.append(Event(id, finish="length"))
            return
        self._requests[id] = request
        self.scheduler.add(request)

    def abort(self, id: str) -> None:
        """Ends a request, with an event that says so; nothing happens if it has ended."""
        request = self._requests.pop(id, None)
        if request is not None:
            self.scheduler.remove(request)
            self._ended.append(Event(id, finish="abort"))

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._requests or self._ended)

    def stats(self) -> dict[str, float]:
        """Numbers of now (running, waiting, kv_cache_usage) and counts since the start."""
        scheduler = self.scheduler
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "kv_cache_usage": scheduler.blocks.held / max(self.pages.blocks - 1, 1),
            "preemptions": scheduler.preemptions,
            **self._counts,
        }

    def generate(
        self, requests: Sequence[tuple[Sequence[int], Sampling]], show: Show | None = None
    ) -> list[list[Token]]:
        """The answers to prompts of any lengths, in their order, computed together.

        `show` is called with the number of a request and each of its tokens as they come. Raises
        ValueError as `add` does, and FloatingPointError for logits that are NaN or infinite.
        """
        for i, (prompt, sampling) in enumerate(requests):
            self.add(str(i), prompt, sampling)
        answers: list[list[Token]] = [[] for _ in requests]
        while self.busy:
            for event in self.step():
                if event.finish == "error":
                    raise FloatingPointError(event.message)
                answers[int(event.id)] += event.tokens
                if show is not None:
                    for token in event.tokens:
                        show(int(event.id), token)
        return answers

    # ---- a step ----------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Computes one step, and says what it brought: at most one event for each request."""
        ended, self._ended = self._ended, []
        planned = in_order(self.scheduler.plan())
        if not planned:
            return ended
        with torch.inference_mode(), matmul.batch_invariant():
            firsts = [request.computed for request, _ in planned]
            logits = self._compute(planned)
            events = self._events(planned, logits)
            if self.options.speculate:
                self._draft(planned, firsts)
        self._counts["steps"] += 1
        return [*ended, *events]

    def _events(self, planned: Sequence[Planned], logits: Tensor) -> list[Event]:
        """What a step brought to each request."""
        broken = (self.pages.broken | ~self.pages.states[0].isfinite().all(-1)).tolist()
        finite = iter(logits.isfinite().all(-1).tolist())
        scores = iter(logits)
        events, row = [], 0
        for request, new in planned:
            drafted = new > request.pending
            true = new - drafted
            answers = true == request.pending
            scored = [(next(scores), next(finite)) for _ in range(answers * (1 + drafted))]
            if any(broken[row : row + true]):  # none of its blocks is published
                events.append(self._broken(request, ()))
            else:
                self.scheduler.computed(request, true)
                if answers:
                    if drafted:
                        scored[1] = (scored[1][0], scored[1][1] and not broken[row + true])
                    events.append(self._answer(request, scored))
            row += new
        return events

    def _compute(self, planned: Sequence[Planned]) -> Tensor:
        """Logits of requests whose known tokens are all computed now, each with its draft's."""
        tokens: list[int] = []
        scored: list[int] = []
        for request, new in planned:
            end = request.computed + new
            scored += (len(tokens) + i - request.computed for i in range(request.known - 1, end))
            tokens += request.tokens(request.computed, end)
        sequences = [(request.blocks, request.computed, new) for request, new in planned]
        device = self.model.device
        rows, position = make_rows(sequences, scored, self.options.page, device)
        self.pages.begin(rows)
        return self.model.decode(torch.tensor([tokens], device=device), position, self.pages)

    def _answer(self, request: Request, scored: Sequence[tuple[Tensor, bool]]) -> Event:
        """Chooses the next token of a request from its logits, which may end it; and one more from
        the next row, if that token was drafted."""
        sampling = request.sampling
        cached, draft = 0, request.draft
        if not request.output:
            cached = request.cached or 0
            self._counts["cached_tokens"] += cached
        tokens: list[Token] = []
        for logits, finite in scored:
            if tokens and tokens[-1].id != draft:
                break
            if not finite:
                return self._broken(request, tuple(tokens))
            if tokens:
                self._counts["accepted_drafts"] += 1
                self.scheduler.computed(request, 1)
            id = self._choose(request, logits)
            if request.matcher is not None:
                try:
                    request.matcher.consume(id)
                except ValueError as error:  # nothing may come: a fault of this answer alone
                    return self._end(request, tuple(tokens), "error", str(error))
            tokens.append(told(logits, id, sampling.logprobs))
            request.output.append(id)
            self._counts["generated_tokens"] += 1
            if id in sampling.end_tokens and len(request.output) > sampling.min_tokens:
                return self._end(request, tuple(tokens), "stop", cached=cached)
            if len(request.output) == sampling.max_tokens:
                return self._end(request, tuple(tokens), "length", cached=cached)
        return Event(request.id, tuple(tokens), cached=cached)

    def _draft(self, planned: Sequence[Planned], firsts: Sequence[int]) -> None:
        """Computes the MTP module's entries of this step's tokens, and drafts of running answers.

        The entry of a token is made from its state and the token after it, and stored in its slot.
        A draft is chosen as the token itself will be, by the same chance. What is drafted changes
        how many steps an answer takes and nothing else.
        """
        states, tokens, sequences = [], [], []
        drafting: list[tuple[Request, int]] = []
        row = 0
        for (request, new), first in zip(planned, firsts, strict=True):
            count = request.computed - first
            if request.id in self._requests:
                states.append(self.pages.states[:, row : row + count])
                tokens += request.tokens(first + 1, first + 1 + count)
                sequences.append((request.blocks, first, count))
                request.draft = None
                if request.pending == 1 and len(request.output) + 1 < request.sampling.max_tokens:
                    drafting.append((request, len(tokens) - 1))
            row += new
        if not sequences:
            return
        device, scored = self.model.device, [i for _, i in drafting]
        rows, position = make_rows(sequences, scored, self.options.page, device)
        self.pages.begin(rows)
        position += self.model.draft_offset or 0
        given = torch.cat(states, 1), torch.tensor([tokens], device=device), position
        for (request, _), logits in zip(
            drafting, self.model.draft(*given, self.pages), strict=True
        ):
            request.draft = self._choose(request, logits)
            self._counts["drafts"] += 1

    def _choose(self, request: Request, logits: Tensor) -> int:
        allowed = request.matcher.mask() if request.matcher is not None else None
        return choose(logits, request.sampling, request.prompt, request.output, allowed)

    def _broken(self, request: Request, tokens: tuple[Token, ...]) -> Event:
        message = f"the logits are NaN or infinite at token {request.known}"
        return self._end(request, tokens, "error", message)

    def _end(
        self,
        request: Request,
        tokens: tuple[Token, ...],
        finish: FinishReason,
        message: str = "",
        cached: int = 0,
    ) -> Event:
        del self._requests[request.id]
        self.scheduler.remove(request)
        return Event(request.id, tokens, finish, message, cached)

    # ---- memory ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def _compute_one(self, pages: Pages) -> None:
        """A token in block 0, so that all pools are there and all sizes of calls tried."""
        rows, position = make_rows([([0], 0, 1)], [0], pages.page, self.model.device)
        token = torch.zeros_like(position)
        with matmul.batch_invariant():
            pages.begin(rows)
            self.model.decode(token, position, pages)
            if self.options.speculate:
                self.model.draft(pages.states, token, position, pages)

    def _count_blocks(self) -> int:
        """Block 0, and as many as the options ask for and memory allows."""
        page = self.options.page
        each = -(-self.max_model_len // page)
        wanted = each * self.options.max_requests + 1
        if self.options.cache_bytes is None or not self.block_bytes:
            return wanted
        count = min(self.options.cache_bytes // self.block_bytes, wanted)
        if count - 1 < each:
            raise ValueError(
                f"a KV cache of {self.options.cache_bytes} bytes holds "
                f"{max(count - 1, 0) * page} tokens, one request may have {self.max_model_len}: "
                f"give it {(each + 1) * self.block_bytes} bytes, or make max_model_len less"
            )
        return count
