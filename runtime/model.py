"""The base class of generated models: construction, loading, saving and generation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor

from . import checkpoint, fp8, optimizer
from .cache import Cache
from .compiled import Source
from .config import Config
from .generate import Prompts, generate
from .module import CheckpointModule
from .stage import ModelShare, hold
from .weights import Tensors, initialize

Quantized = Literal["fp8", "int8"]
"""Forms of the weights of products."""

Draft = Callable[[Tensor, Tensor, Tensor, Cache], Tensor]
"""Logits of the token after the last one, of states, the tokens after them, positions, cache."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8_blockwise": torch.bfloat16}
"""Dtype of the weights by `config.precision.policy`."""


@dataclass(frozen=True)
class Output:
    """The result of `forward`: logits of the next token at each position, and of later ones."""

    logits: Tensor
    """[batch, seq, vocab]"""
    mtp_logits: tuple[Tensor, ...] = ()
    """One for each MTP depth k: [batch, seq - k, vocab], position i predicting token i + k + 1."""


@dataclass(frozen=True)
class Loss:
    """The result of `loss`; every loss is a scalar, in nats per token."""

    total: Tensor
    """What training minimises: main + weighted MTP + weighted balance."""
    main: Tensor
    mtp: tuple[Tensor, ...]
    """Of each depth, before its weight."""
    balance: Tensor
    """Sum over the MoE layers, before its weight: the number of layers at perfect balance."""
    load: tuple[Tensor, ...] = ()
    """int64 [layers, experts] of each group of MoE layers, [experts] of each MTP module: how many
    tokens chose each expert."""


class LanguageModel(CheckpointModule, ABC):
    """A language model with weights, a loss and a decoder; generated code says how it computes.

    `device="meta"` makes no weights at all: shapes are known, `load` fills them in. `dtype`
    defaults to the precision policy of the spec. Weights follow from `seed` and their published
    names alone. `weights="fp8"` holds the weights of FP8 products in E4M3 with their scales and in
    no other form, for inference: they are read from published FP8 folders, and saved, as they are.
    `weights="int8"` holds those of all products in int8 with a scale for each row, which only
    compiled steps can read, those of a build for CPUs: such a model serves and does nothing else.
    With `share` it is what one of several ranks holds; other modules are `Absent`.
    """

    config: ClassVar[Config]
    optimizer: ClassVar[Any] = optimizer
    """What the end of a training step computes with: that module, or kernels in its place."""
    fp8: ClassVar[Any] = fp8
    """What makes the FP8 copies of weights: that module, or kernels in its place."""
    paged_latent_attention: ClassVar[Callable[..., Tensor] | None] = None
    """A kernel for the paged cache on GPUs, of the arguments of that function of `functional`."""
    compiled: ClassVar[Source | None] = None
    """The served programs as C++, where the build has them."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
        weights: Quantized | None = None,
        share: ModelShare | None = None,
    ) -> None:
        super().__init__()
        policy = self.config.precision.policy
        if policy == "fp32" and dtype in (torch.bfloat16, torch.float16):
            # Its gate would silently be computed in less than float32.
            raise ValueError(f"this model was built for fp32, not for {dtype}: build it with bf16")
        self.build()
        self.share = share
        if share is not None:
            hold(self, share)
        for module in self.modules():
            if isinstance(module, Tensors):
                module.quantize_weight = self.fp8.quantize_weight
        self.to(dtype=dtype or DTYPES[policy])
        self.quantized = weights
        """The form of quantized weights, if they have one."""
        if weights is not None:
            self._quantize(weights)
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            initialize(self, seed)

    draft_offsets: ClassVar[tuple[int, ...]] = ()
    """Of each MTP module that can draft, from the position of a state to that which it takes."""

    def drafter(self, module: int) -> Draft:
        """How MTP module `module`, from 0, scores a token after the next one: `draft`, `draft_2`,
        ..., of generated models."""
        draft: Draft = getattr(self, f"draft_{module + 1}" if module else "draft")
        return draft

    @property
    def whole(self) -> LanguageModel:
        """The model; of one that holds a share, all of it, without weights."""
        return self if self.share is None else type(self)(device="meta")

    def _quantize(self, form: Quantized) -> None:
        """Raises ValueError where nothing of the model is read in that form."""
        if form == "fp8":
            dtype, found, refused = fp8.E4M3, self._of_fp8_products(), ["loss"]
            why = "cannot be trained: its weights have no other form"
        elif form == "int8":
            dtype, found = torch.int8, self._of_compiled_products()
            refused = ["loss", "forward", "prefill", "decode"]
            why = "can only be served: nothing but compiled steps reads int8"
        else:
            raise ValueError(f"weights can be fp8 or int8, not {form!r}")
        for module in found:
            module.quantize(dtype)
        for method in refused:
            setattr(self, method, _refusal(f"a model with weights={form!r} {why}"))

    def _of_fp8_products(self) -> list[Tensors]:
        found = [one for one in self.modules() if isinstance(one, Tensors) and one.has_fp8]
        if not found:
            raise ValueError(
                f"weights='fp8': no product of {self.config.model} is in FP8; build it with "
                "`precision.policy: fp8_blockwise`"
            )
        return found

    def _of_compiled_products(self) -> list[Tensors]:
        if self.compiled is None:
            raise ValueError(
                f"weights='int8': only compiled steps read them; build {self.config.model} with "
                "`--target cpu`"
            )
        names = {name for one in self.compiled.programs.values() for name in one.products}
        paths = sorted(name.removesuffix(".weight") for name in names)
        return [self.get_submodule(path) for path in paths]  # type: ignore[misc]

    @abstractmethod
    def build(self) -> None:
        """Adds the submodules; their weights are on the meta device."""

    @abstractmethod
    def loss(
        self, tokens: Tensor, labels: Tensor, position: Tensor | None = None, tokens_seen: int = 0
    ) -> Loss:
        """The loss of int64 tokens [batch, seq]; labels[:, i] is the token after tokens[:, i].

        Labels of -100 count nowhere. `position` [batch, seq] defaults to 0, 1, 2, ..., and starts
        from 0 in each document where the spec has a mask between them (`train.document_mask`).
        Schedules by tokens depend on `tokens_seen`.
        """

    @abstractmethod
    def prefill(self, tokens: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Scores of the next token, [batch, vocab], after tokens [batch, new] at `position`."""

    @abstractmethod
    def decode(self, tokens: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """What `prefill` computes, in the way that is best for one new token."""

    def load(self, folder: str | Path) -> checkpoint.LoadReport:
        """Reads all weights from a folder of safetensors; see `checkpoint.load`."""
        return checkpoint.load(self, folder)

    def save(self, folder: str | Path) -> None:
        """Writes safetensors and config.json, as transformers reads them; see `checkpoint.save`.

        Raises ValueError for weights in int8, which no folder holds.
        """
        if self.quantized == "int8":
            raise ValueError("a model with weights='int8' cannot be saved: no folder holds int8")
        checkpoint.save(self, folder)

    @overload
    def generate(self, tokens: Tensor, max_new_tokens: int, **settings: Any) -> Tensor: ...
    @overload
    def generate(
        self, tokens: Prompts, max_new_tokens: int, **settings: Any
    ) -> list[list[int]]: ...

    def generate(
        self, tokens: Tensor | Prompts, max_new_tokens: int, **settings: Any
    ) -> Tensor | list[list[int]]:
        """Continues prompts, int64 [batch, seq] or lists of token ids; see `generate.generate`."""
        decoder: Any = self  # its cache is of either kind
        return generate(decoder, tokens, max_new_tokens, **settings)


def _refusal(why: str) -> Callable[..., Any]:
    """In place of a method that needs weights in another form."""

    def refuse(*inputs: Any, **named: Any) -> Any:
        raise ValueError(f"{why}; make one without `weights`")

    return refuse
