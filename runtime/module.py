"""A module that is a whole checkpoint: all weights, the copies among them, and its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .weights import Block


class CheckpointModule(Block):
    """Its `state_dict` holds every tensor of a published checkpoint, copies included."""

    aliases: ClassVar[Mapping[str, str]] = {}
    """Copy -> original: published tensors that checkpoints hold a second time."""
    hf_config: ClassVar[Mapping[str, Any]] = {}
    """What `checkpoint.save` writes to config.json."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_add_copies)
        self.register_load_state_dict_pre_hook(_take_copies)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, except those that always have their own."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def _add_copies(
    module: CheckpointModule, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """After `state_dict()`: a copy is the same tensor under another name."""
    for copy, original in module.aliases.items():
        state[prefix + copy] = state[prefix + original]


def _take_copies(
    module: CheckpointModule,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Before `load_state_dict()`: takes the copies out, which may be absent but not differ."""
    for copy, original in module.aliases.items():
        value = state.pop(prefix + copy, None)
        kept = state.get(prefix + original)
        if value is not None and kept is not None and not _same(value, kept):
            errors.append(f"{prefix}{copy} differs from {prefix}{original}, whose copy it is.")


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and (a.is_meta or b.is_meta or torch.equal(a, b)))
