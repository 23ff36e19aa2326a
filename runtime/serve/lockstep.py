"""A model that all ranks call together, each with its own rows: what an engine sees of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import matmul
from ..config import Config
from ..model import LanguageModel
from ..pages import Draft, PagedAttention, Pages, make_rows
from .group import Group, RankFailure
from .spread import Layer

DECODE = 0
"""The first call of a step; MTP module k, from 1, has number k."""
DONE = 1 << 16


class Lockstep:
    """Lets no rank call the model alone, for each needs the experts of all.

    Before a call, ranks say what they want. All those that want what comes first make their call,
    the others the same call with a row of no request: so they need not know of each other how many
    calls a step has. `finish` ends the step of this rank, and returns when all have ended theirs.
    """

    def __init__(
        self, model: LanguageModel, layers: Sequence[Layer], group: Group | None, page: int
    ) -> None:
        self.model, self.layers, self.group = model, layers, group
        self.steps = 0
        self._pages = Pages(1, page)  # block 0 alone, which belongs to no sequence

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def paged_latent_attention(self) -> PagedAttention | None:
        return self.model.paged_latent_attention

    @property
    def draft_offsets(self) -> tuple[int, ...]:
        return self.model.draft_offsets

    def decode(self, tokens: Tensor, position: Tensor, cache: Pages) -> Tensor:
        self._turn(DECODE)
        return self._call(DECODE, tokens, position, cache)

    def drafter(self, module: int) -> Draft:
        """The calls of an MTP module, from 0."""

        def draft(state: Tensor, tokens: Tensor, position: Tensor, cache: Pages) -> Tensor:
            self._turn(1 + module)
            return self._call(1 + module, state, tokens, position, cache)

        return draft

    def finish(self) -> None:
        """The end of a step of this rank."""
        self._turn(DONE)
        self.steps += 1

    def warm_up(self) -> None:
        """Tries all sizes of calls, for which ranks take unlike times, and waits for all."""
        with ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(layer.alone())
            for call in range(1 + len(self.draft_offsets)):
                self._join(call)
        if self.group is not None:
            self.group.meet()

    def _turn(self, want: int) -> None:
        """Takes part in the calls of others until it is this rank's turn."""
        while self.group is not None:
            said = self.group.all_gather(want, self.steps)
            steps = sorted({step for _, step in said})
            if len(steps) > 1:
                raise RankFailure(f"ranks are in different steps: {steps}")
            first = min(wanted for wanted, _ in said)
            if first == want:
                return
            with self._uncounted():
                self._join(first)

    @torch.inference_mode()
    def _join(self, call: int) -> None:
        """A call with one row, whose result is not read."""
        rows, position = make_rows([([0], 0, 1)], [0], self._pages.page, self.device)
        self._pages.begin(rows)
        given = [torch.zeros_like(position), position, self._pages]
        with matmul.batch_invariant():
            self._call(call, *(given if call == DECODE else [self._state, *given]))

    def _call(self, call: int, *given: Any) -> Tensor:
        if call != DECODE:
            return self.model.drafter(call - 1)(*given)
        sent = sum(layer.sent for layer in self.layers)
        logits = self.model.decode(*given)
        if sum(layer.sent for layer in self.layers) == sent:
            raise RuntimeError(f"{self.config.model} does not call the blocks of its experts")
        self._state = given[-1].states[:, :1]
        return logits

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        for layer in self.layers:
            layer.counting = False
        try:
            yield
        finally:
            for layer in self.layers:
                layer.counting = True
