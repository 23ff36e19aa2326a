"""Training and validation sequences, cut from tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..config import Config, end_tokens
from ..functional import IGNORED_LABEL
from .order import permute_index, random_below
from .settings import TrainError
from .tokens import Masked

Part = Tensor | Masked
"""Tokens of whole documents, concatenated."""


class Sequences:
    """An endless series of sequences of `length` tokens and the one after them.

    Documents are packed: sequences are cut from each part (1-dim, of tokens) without regard to
    where a document ends, as in DeepSeek-V3 (report, section 4.1). In an epoch no token is trained
    on twice; each epoch cuts elsewhere, and takes the sequences in another order.
    """

    def __init__(self, parts: Sequence[Part], length: int, seed: int) -> None:
        """Raises TrainError if no part is long enough for one sequence, wherever it is cut."""
        self.parts, self.length, self.seed = list(parts), length, seed
        # The first cut is at 0 .. length - 1.
        counts = [max(0, (len(part) - length) // length) for part in self.parts]
        self._ends = list(accumulate(counts))
        self.count = self._ends[-1] if self._ends else 0
        if not self.count:
            longest = max(map(len, self.parts), default=0)
            raise TrainError(
                f"sequences of {length} tokens need a text of {2 * length}, this has {longest}"
            )

    @property
    def masked(self) -> bool:
        """Whether some tokens are not trained on."""
        return any(isinstance(part, Masked) for part in self.parts)

    def __getitem__(self, index: int) -> Tensor:
        """The index-th sequence of training: int64 [length + 1].

        A token that is not trained on is its complement, as in `inputs_and_labels`.
        """
        epoch, place = divmod(index, self.count)
        place = permute_index(place, self.count, f"{self.seed} {epoch}")
        number = bisect_right(self._ends, place)
        before = self._ends[number - 1] if number else 0
        start = random_below(self.length, f"{self.seed} {epoch} {number} cut")
        start += (place - before) * self.length
        return self.parts[number][start : start + self.length + 1].to(torch.int64)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """[len(indices), length + 1]"""
        return torch.stack([self[index] for index in indices])


class ValidationSet:
    """The held-out tokens of each part, once, in order, in sequences of `length`."""

    def __init__(self, parts: Sequence[Part], length: int) -> None:
        self.parts, self.length = list(parts), length
        self._ends = list(accumulate(max(0, (len(part) - 1) // length) for part in self.parts))
        self.count = self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Tensor:
        """int64 [length + 1]"""
        number = bisect_right(self._ends, index)
        start = (index - (self._ends[number - 1] if number else 0)) * self.length
        return self.parts[number][start : start + self.length + 1].to(torch.int64)


def inputs_and_labels(sequences: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of sequences int64 [batch, seq + 1] but the last, and the labels of each.

    A token below 0 is the complement of one that is not trained on: as a label it is left out.
    """
    tokens = sequences.where(sequences >= 0, ~sequences)
    return tokens[:, :-1], sequences[:, 1:].where(sequences[:, 1:] >= 0, IGNORED_LABEL)


def count_labels(sequences: Tensor) -> int:
    """How many tokens of int64 [batch, seq + 1] are trained on."""
    return int((sequences[:, 1:] >= 0).sum())


def positions(tokens: Tensor, config: Config) -> Tensor | None:
    """The position of each of tokens [batch, seq] in its document, from 0 after each EOS token.

    None for models without a mask between documents: positions then count through a sequence.
    """
    if not config.train.document_mask:
        return None
    place = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    ended = torch.zeros_like(tokens, dtype=torch.bool)
    ended[:, 1:] = tokens[:, :-1] == end_tokens(config)[0]
    return place - place.where(ended, 0).cummax(1).values


def split(parts: Sequence[Part], held_out: float) -> tuple[list[Part], list[Part]]:
    """The parts without and with the last `held_out` (0 to 1) of each."""
    cuts = [len(part) - int(len(part) * held_out) for part in parts]
    trained = [part[:cut] for part, cut in zip(parts, cuts, strict=True)]
    return trained, [part[cut:] for part, cut in zip(parts, cuts, strict=True)]
