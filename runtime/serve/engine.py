"""The engine: requests in, steps of the model, tokens out.

Each request gives the same tokens and log-probabilities, bit for bit, alone or in any company,
independent of how its prompt was cut, of hits in the prefix cache, and of recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from .. import matmul
from ..compiled import CompiledModel, served
from ..config import Config
from ..pages import Draft, PagedAttention, Pages, make_rows
from .blocks import Blocks
from .options import Options
from .request import Event, FinishReason, Sampling, Token
from .sampler import choose, with_logprobs
from .scheduler import Matcher, Planned, Request, Scheduler, in_order
from .speculate import Drafter

Show = Callable[[int, Token], None]


class Decoder(Protocol):
    """What the engine needs of a model."""

    @property
    def config(self) -> Config: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def paged_latent_attention(self) -> PagedAttention | None: ...
    @property
    def draft_offsets(self) -> tuple[int, ...]: ...
    def drafter(self, module: int) -> Draft: ...
    def decode(self, tokens: Tensor, position: Tensor, cache: Pages) -> Tensor: ...


class Grammars(Protocol):
    """What the engine needs for answers that follow a grammar."""

    def matcher(self, grammar: str) -> Matcher:
        """Raises ValueError for a grammar that cannot be followed."""


class Engine:
    """Computes the requests that were added, a step at a time.

    Raises ValueError for options that do not fit the model, and for a model without weights.
    """

    heartbeat: float | None = None
    """Nothing happens between steps, see `worker.Engine`."""

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
        if options.speculate and not model.draft_offsets:
            raise ValueError(
                f"speculate={options.speculate}, but the model has no MTP module that could draft"
            )
        self.vocab_size = model.config.params.vocab_size
        self.decoder = served(model)  # one call a step, where the build has one for this CPU
        self._alone: Callable[[], AbstractContextManager[None]] = nullcontext
        if isinstance(self.decoder, CompiledModel):
            self._alone = self.decoder.alone
        kernel = model.paged_latent_attention if model.device.type == "cuda" else None
        one = Pages(1, options.page, kernel)
        self._compute_one(one)
        self.block_bytes = one.bytes
        self.pages = Pages(self._count_blocks(), options.page, kernel)
        self._compute_one(self.pages)
        self.scheduler = Scheduler(options, Blocks(self.pages.blocks))
        self.drafter = Drafter(self._modules(), options.speculate, self.pages, self.scheduler)
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
                *(f"accepted_drafts_{i + 1}" for i in range(options.speculate)),
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
        request = self.check(id, prompt, sampling, salt)
        self._counts["prompt_tokens"] += len(prompt)
        if not sampling.max_tokens:
            self._ended.append(Event(id, finish="length"))
            return
        self._requests[id] = request
        self.scheduler.add(request)

    def check(
        self, id: str, prompt: Sequence[int], sampling: Sampling, salt: bytes = b""
    ) -> Request:
        """The request that `add` would take up. Raises ValueError as it does."""
        sampling.check(self.vocab_size)
        if not prompt:
            raise ValueError("the prompt is empty: it needs at least one token")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"token ids must be from 0 to {self.vocab_size - 1}, got {low} to {high}"
            )
        if sampling.max_tokens and len(prompt) >= self.max_model_len:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens leaves no room for an answer: the longest text "
                f"has {self.max_model_len}"
            )
        if len(prompt) + sampling.max_tokens > self.max_model_len:
            raise ValueError(
                f"{len(prompt)} tokens and {sampling.max_tokens} new ones exceed the longest text "
                f"({self.max_model_len}): max_tokens can be "
                f"{self.max_model_len - len(prompt)} at most"
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
        return request

    def abort(self, id: str) -> None:
        """Ends a request, with an event that says so; nothing happens if it has ended."""
        request = self._requests.pop(id, None)
        if request is not None:
            self.scheduler.remove(request)
            self._ended.append(Event(id, finish="abort"))

    def hand_over(self, id: str) -> tuple[Request, list[Tensor]]:
        """Takes a running request out, without an event, and a copy of its pages."""
        request = self._requests.pop(id)
        used = -(-request.computed // self.options.page)
        pages = [self.pages.read(block) for block in request.blocks[:used]]
        drafts, tails = request.drafts, request.tails
        self.scheduler.remove(request)
        request.drafts, request.tails = drafts, tails
        return request, pages

    def take_over(self, request: Request, pages: Sequence[Tensor]) -> bool:
        """Continues a request with an output by the pages of its other tokens, unless there is no
        place for it now; without pages its tokens are computed again, when it is its turn. Raises
        ValueError for pages of another engine."""
        if pages:
            for data in pages:  # before it has a place
                self.pages.check(data)
            page, computed = self.options.page, request.known - 1
            if not self.scheduler.admit(request):
                return False
            for i in range(request.computed // page, len(pages)):
                self.pages.write(request.blocks[i], pages[i])
            self.scheduler.computed(request, computed - request.computed)
        else:
            self.scheduler.add(request)
        self._requests[request.id] = request
        return True

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._requests or self._ended)

    def close(self) -> None:
        """Nobody else waits for this engine."""

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
        with torch.inference_mode(), matmul.batch_invariant(), self._alone():
            firsts = [request.computed for request, _ in planned]
            logits = self._compute(planned)
            events = self._events(planned, logits)
            if self.options.speculate:
                running = self._requests
                self._counts["drafts"] += self.drafter.draft(
                    planned, firsts, lambda request: request.id in running
                )
        self._counts["steps"] += 1
        return [*ended, *events]

    def _events(self, planned: Sequence[Planned], logits: Tensor) -> list[Event]:
        """What a step brought to each request."""
        broken = (self.pages.broken | ~self.pages.states[0].isfinite().all(-1)).tolist()
        finite = iter(logits.isfinite().all(-1).tolist())
        scores = iter(logits)
        events, row = [], 0
        for request, new in planned:
            true = min(new, request.pending)
            drafted = new - true
            answers = true == request.pending
            scored = [(next(scores), next(finite)) for _ in range(answers * (1 + drafted))]
            if any(broken[row : row + true]):  # none of its blocks is published
                events.append(self._broken(request, ()))
            else:
                self.scheduler.computed(request, true)
                if answers:
                    for i in range(drafted):
                        row_logits, finite_logits = scored[1 + i]
                        scored[1 + i] = row_logits, finite_logits and not broken[row + true + i]
                    events.append(self._answer(request, scored))
            row += new
        return events

    def _compute(self, planned: Sequence[Planned]) -> Tensor:
        """Logits of requests whose known tokens are all computed now, each with its drafts'."""
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
        return self.decoder.decode(torch.tensor([tokens], device=device), position, self.pages)

    def _answer(self, request: Request, scored: Sequence[tuple[Tensor, bool]]) -> Event:
        """Chooses the next token of a request from its logits, which may end it; and one more from
        each further row, as long as the token before was drafted."""
        sampling = request.sampling
        cached, drafts = 0, request.drafts
        request.tried += len(scored) > 1
        if not request.output:
            cached = request.cached or 0
            self._counts["cached_tokens"] += cached
        tokens: list[Token] = []
        for i, (logits, finite) in enumerate(scored):
            if i and tokens[-1].id != drafts[i - 1]:
                break
            if not finite:
                return self._broken(request, tuple(tokens))
            if i:
                self._counts["accepted_drafts"] += 1
                self._counts[f"accepted_drafts_{i}"] += 1
                request.right += i == 1
                self.scheduler.computed(request, 1)
            id = self._choose(request, logits)
            if request.matcher is not None:
                try:
                    request.matcher.consume(id)
                except ValueError as error:  # nothing may come: a fault of this answer alone
                    return self._end(request, tuple(tokens), "error", str(error))
            tokens.append(with_logprobs(logits, id, sampling.logprobs))
            request.output.append(id)
            self._counts["generated_tokens"] += 1
            if id in sampling.end_tokens and len(request.output) > sampling.min_tokens:
                return self._end(request, tuple(tokens), "stop", "", cached, len(scored) - 1)
            if len(request.output) == sampling.max_tokens:
                return self._end(request, tuple(tokens), "length", "", cached, len(scored) - 1)
        return Event(request.id, tuple(tokens), cached=cached, drafts=len(scored) - 1)

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
        drafts: int = 0,
    ) -> Event:
        del self._requests[request.id]
        self.scheduler.remove(request)
        return Event(request.id, tokens, finish, message, cached, drafts)

    def _modules(self) -> list[tuple[Draft, int]]:
        """The MTP modules that draft, and their offsets of positions."""
        offsets = self.model.draft_offsets[: self.options.speculate]
        return [(self.decoder.drafter(i), offset) for i, offset in enumerate(offsets)]

    # ---- memory ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def _compute_one(self, pages: Pages) -> None:
        """A token in block 0, so that all pools are there and all sizes of calls tried."""
        rows, position = make_rows([([0], 0, 1)], [0], pages.page, self.model.device)
        token = torch.zeros_like(position)
        with matmul.batch_invariant():
            pages.begin(rows)
            self.decoder.decode(token, position, pages)
            if self.options.speculate:
                for draft, offset in self._modules():
                    draft(pages.states, token, position + offset, pages)

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
