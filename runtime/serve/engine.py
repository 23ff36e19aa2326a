"""The engine: requests in, steps of the model, tokens out.

Each request gives the same tokens and log-probabilities, bit for bit, alone or in any company,
whatever its prompt was cut into, found of in the prefix cache, or computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from .scheduler import Planned, Request, Scheduler, in_order


class Decoder(Protocol):
    """What the engine needs of a model."""

    @property
    def config(self) -> Config: ...
    @property
    def device(self) -> torch.device: ...
    def decode(self, tokens: Tensor, position: Tensor, cache: Pages) -> Tensor: ...


class Engine:
    """Computes the requests that were added, a step at a time.

    Raises ValueError for options that do not fit the model, and for a model without weights.
    """

    def __init__(self, model: Decoder, options: Options | None = None) -> None:
        self.model = model
        self.options = options = options or Options()
        if model.device.type == "meta":
            raise ValueError("the model has no weights yet (device='meta'): load some first")
        longest = model.config.sequence.max_position_embeddings
        self.max_model_len = options.max_model_len or longest
        if self.max_model_len > longest:
            raise ValueError(
                f"max_model_len {self.max_model_len} exceeds max_position_embeddings ({longest})"
            )
        self.vocab_size = model.config.params.vocab_size
        self.block_bytes = self._bytes_of_a_block()
        self.pages = Pages(self._count_blocks(), options.page)
        self.scheduler = Scheduler(options, Blocks(self.pages.blocks))
        self._requests: dict[str, Request] = {}
        self._ended: list[Event] = []
        self._counts = dict.fromkeys(
            ("steps", "prompt_tokens", "cached_tokens", "generated_tokens"), 0
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

    # ---- a step ----------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Computes one step, and says what it brought: at most one event for each request."""
        ended, self._ended = self._ended, []
        planned = in_order(self.scheduler.plan())
        if not planned:
            return ended
        logits = self._compute(planned)
        self._counts["steps"] += 1
        finite = iter(logits.isfinite().all(-1).tolist())
        rows = iter(logits)
        events = []
        for request, new in planned:
            self.scheduler.computed(request, new)
            if request.computed == request.known:
                events.append(self._next(request, next(rows), next(finite)))
        return [*ended, *events]

    @torch.inference_mode()
    def _compute(self, planned: Sequence[Planned]) -> Tensor:
        """Logits of the requests all of whose tokens are computed now, in order."""
        tokens: list[int] = []
        scored: list[int] = []
        for request, new in planned:
            tokens += request.tokens(request.computed, request.computed + new)
            if request.computed + new == request.known:
                scored.append(len(tokens) - 1)
        sequences = [(request.blocks, request.computed, new) for request, new in planned]
        device = self.model.device
        self.pages.rows, position = make_rows(sequences, scored, self.options.page, device)
        with matmul.batch_invariant():
            return self.model.decode(torch.tensor([tokens], device=device), position, self.pages)

    def _next(self, request: Request, logits: Tensor, finite: bool) -> Event:
        """Chooses the next token of a request, which may end it."""
        sampling = request.sampling
        first = not request.output
        if first:
            self._counts["cached_tokens"] += request.cached or 0
        cached = request.cached or 0 if first else 0
        if not finite:
            message = f"the logits are NaN or infinite at token {request.known}"
            return self._end(request, (), "error", message)
        id = choose(logits, sampling, request.prompt, request.output)
        token = told(logits, id, sampling.logprobs)
        request.output.append(id)
        self._counts["generated_tokens"] += 1
        finish: FinishReason | None = None
        if id in sampling.end_tokens:
            finish = "stop"
        elif len(request.output) == sampling.max_tokens:
            finish = "length"
        if finish:
            return self._end(request, (token,), finish, cached=cached)
        return Event(request.id, (token,), cached=cached)

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
    def _bytes_of_a_block(self) -> int:
        """By computing one token in a cache of two blocks."""
        pages = Pages(2, self.options.page)
        pages.rows, position = make_rows([([1], 0, 1)], [0], pages.page, self.model.device)
        with matmul.batch_invariant():
            self.model.decode(torch.zeros_like(position), position, pages)
        return pages.bytes // 2

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
