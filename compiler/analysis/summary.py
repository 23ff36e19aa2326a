"""A model in numbers: parameters, published tensors, arithmetic and cache for each token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from compiler.analysis.modules import Module, Modules, TensorCount
from compiler.analysis.work import Tally, Work, total
from compiler.graph.core import Op, Program, Value, walk
from compiler.graph.types import BYTES
from dsl.diagnostic import Diagnostic, DiagnosticError

# Forward, and twice as much backward: gradients of the input and of the weight.
TRAINING_PASSES = 3

# Far beyond what a person would list; blocks that each call two others reach it in 17 steps.
MAX_LINES = 100_000

CONVENTIONS = (
    "Parameters are all elements of all weights, the balancing bias of gates included; those of"
    " the model leave multi-token prediction out.",
    "Activated parameters are those that one token meets: k of E routed experts; embedding and"
    " head count in full.",
    "Stored counts what a checkpoint holds: the model, multi-token prediction, and second copies"
    " of tensors.",
    "FLOPs count matrix products and the core of attention, a multiply-add as two; norms, softmax,"
    " rotary embedding and the look-up of embeddings are left out.",
    "Training is three times the forward pass, without recomputation; attention is causal, so that"
    " a query sees half of the sequence, or its window. What a mask leaves out is counted, too."
    " Multi-token prediction is counted apart.",
    "Decoding is the forward pass for one more token, as the built decode program computes it; the"
    " context includes that token. Where the program projects the whole cache again in each step,"
    " that is a share of its own.",
    "FP8 counts what the precision of the spec asks for: weights whose products are in FP8, and the"
    " FLOPs of these, of all products with weights, gates and head among them, but without the core"
    " of attention and multi-token prediction. Both gradients have the forward pass's share.",
    "The cache holds, for each token, what the blocks mark with `cache`, in the model's element"
    " type.",
)


@dataclass(frozen=True)
class Copy:
    """A tensor that checkpoints hold a second time under another name."""

    name: str
    original: str
    tensor: TensorCount


@dataclass(frozen=True)
class PublishedRange:
    """`count` tensors of a checkpoint. `{3..60}` in the name is any number of the range.

    `original` names the tensor that these are a copy of.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    original: str = ""

    @property
    def elements(self) -> int:
        """Of all of them."""
        return self.count * math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * BYTES[self.dtype]


@dataclass(frozen=True)
class Summary:
    """A model in numbers; whole numbers throughout. `CONVENTIONS` says how they count.

    `model` is what the logits need. `mtp` is what the other outputs need besides: multi-token
    prediction, without the tensors that it shares with the model, whose elements
    `mtp_shared` counts. FLOPs are for one token, of a sequence of `sequence_length` tokens in
    training and after `context_length` - 1 tokens in decoding, rounded down.
    """

    name: str
    sequence_length: int
    context_length: int
    model: Module
    mtp: Module
    mtp_shared: int
    copies: tuple[Copy, ...]
    training_flops: Tally
    mtp_training_flops: Tally
    decoding_flops: Tally

    @property
    def parameters(self) -> int:
        return self.model.parameters

    @property
    def activated(self) -> int:
        """With the embedding and the head."""
        return self.model.activated

    @property
    def activated_without_embedding(self) -> int:
        return self.activated - self.model.active_elements.get(Work.EMBEDDING, 0)

    @property
    def activated_in_layers(self) -> int:
        """Without the embedding and the head."""
        head = self.model.active_elements.get(Work.HEAD, 0)
        return self.activated_without_embedding - head

    @property
    def stored(self) -> int:
        """Elements in a checkpoint, copies included."""
        copies = sum(copy.tensor.parameters for copy in self.copies)
        return self.parameters + self.mtp.parameters + copies

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors in a checkpoint in the model's element types."""
        copies = sum(copy.tensor.bytes for copy in self.copies)
        return self.model.bytes + self.mtp.bytes + copies

    @property
    def product_flops(self) -> int:
        """FLOPs of products with weights in training, for one token."""
        flops = self.training_flops
        return total(flops) - flops.get(Work.ATTENTION_CORE, 0)

    @property
    def fp8_flops(self) -> int:
        """Those of `product_flops` that are in FP8."""
        return TRAINING_PASSES * self.model.fp8_flops // self.sequence_length

    @property
    def tensor_count(self) -> int:
        """Tensors in a checkpoint."""
        return self.model.tensor_count + self.mtp.tensor_count + len(self.copies)

    @property
    def cache_bytes(self) -> int:
        """Bytes that a decoder remembers for each token."""
        return self.model.cache_bytes

    @property
    def cache_bytes_with_mtp(self) -> int:
        return self.model.cache_bytes + self.mtp.cache_bytes

    def published(self) -> Iterator[PublishedRange]:
        """Every tensor of a checkpoint, equal ones together, in the order of the graph."""
        yield from _published(self.model, "", 1)
        yield from _published(self.mtp, "", 1)
        for copy in self.copies:
            t = copy.tensor
            yield PublishedRange(copy.name, t.shape, t.dtype, t.count, copy.original)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values for `json.dumps`."""
        return {
            "model": self.name,
            "parameters": {
                "total": self.parameters,
                "activated": self.activated,
                "activated_without_embedding": self.activated_without_embedding,
                "activated_in_layers": self.activated_in_layers,
                "by_share": _named(self.model.elements),
                "activated_by_share": _named(self.model.active_elements),
            },
            "mtp": {
                "parameters": self.mtp.parameters,
                "activated": self.mtp.activated,
                "shared_with_model": self.mtp_shared,
            },
            "checkpoint": {
                "parameters": self.stored,
                "bytes": self.stored_bytes,
                "tensors": self.tensor_count,
            },
            "flops_per_token": {
                "training": _flops(self.training_flops, sequence_length=self.sequence_length),
                "mtp_training": _flops(
                    self.mtp_training_flops, sequence_length=self.sequence_length
                ),
                "decoding": _flops(self.decoding_flops, context_length=self.context_length),
            },
            "fp8": {
                "parameters": self.model.fp8_elements,
                "product_flops_per_token": self.fp8_flops,
                "of_product_flops_per_token": self.product_flops,
            },
            "cache_bytes_per_token": {
                "model": self.cache_bytes,
                "with_mtp": self.cache_bytes_with_mtp,
            },
            "modules": {"model": _tree(self.model), "mtp": _tree(self.mtp)},
            "copies": {copy.name: copy.original for copy in self.copies},
            "conventions": list(CONVENTIONS),
        }


def summary(
    lowered: Program, decode: Program, *, sequence_length: int = 4096, context_length: int = 4096
) -> Summary:
    """The numbers of a model from its lowered program and the decode program cut from it.

    `sequence_length` is that of training, `context_length` the tokens that a decoder attends to;
    both at least 1. Raises `DiagnosticError` for a model with too many modules to list.
    """
    modules = Modules(lowered)
    sizes = {"batch": 1, "seq": sequence_length, "context": sequence_length}
    needed = _needed_for(lowered, "logits")
    model = modules.root([op for op in lowered.main.ops if op in needed], sizes)
    others = [op for op in lowered.main.ops if op not in needed]
    mtp = modules.root(others, sizes, without=model)
    if model.lines + mtp.lines > MAX_LINES:
        raise DiagnosticError([_too_many(lowered, model.lines + mtp.lines)])
    one_token = {"batch": 1, "seq": 1, "context": context_length}
    return Summary(
        name=lowered.name,
        sequence_length=sequence_length,
        context_length=context_length,
        model=model,
        mtp=mtp,
        mtp_shared=modules.root(others, sizes).parameters - mtp.parameters,
        copies=_copies(lowered, (*model.tensors, *mtp.tensors)),
        training_flops=training_flops(model, sequence_length),
        mtp_training_flops=training_flops(mtp, sequence_length),
        decoding_flops=Modules(decode).root(decode.main.ops, one_token).flops,
    )


def _needed_for(program: Program, result: str) -> set[Op]:
    """Operators of the outermost block that its results of that name follow from."""
    main = program.main
    wanted: set[Value] = {
        value for name, value in zip(main.result_names, main.results, strict=True) if name == result
    }
    found: set[Op] = set()
    for op in reversed(main.ops):
        if any(value in wanted for value in op.results):
            found.add(op)
            wanted.update(op.operands)
            wanted.update(v for inner in walk([op]) for v in inner.operands)
    return found


def _copies(program: Program, tensors: Sequence[TensorCount]) -> tuple[Copy, ...]:
    by_name = {t.name: t for t in tensors}
    return tuple(Copy(copy, name, by_name[name]) for copy, name in program.aliases.items())


def training_flops(module: Module, tokens: int, passes: int = 1) -> dict[Work, int]:
    """FLOPs of training for each token, from those of forward passes over `tokens`."""
    return {work: TRAINING_PASSES * passes * n // tokens for work, n in module.flops.items()}


def _published(module: Module, prefix: str, count: int) -> Iterator[PublishedRange]:
    for t in module.tensors:
        yield PublishedRange(prefix + t.name, t.shape, t.dtype, count * t.count)
    for part in module.parts:
        yield from _published(part.module, f"{prefix}{part.name}.", count * part.count)


def _named(tally: Tally) -> dict[str, int]:
    return {work.value: n for work, n in tally.items()}


def _flops(tally: Tally, **at: int) -> dict[str, Any]:
    return {"total": total(tally), **at, "by_share": _named(tally)}


def _tree(module: Module) -> dict[str, Any]:
    """A module as plain values; numbers of parameters are those of one instance."""
    return {
        "block": module.block,
        "parameters": module.parameters,
        "activated": module.activated,
        "tensors": [
            {
                "name": t.name,
                "shape": list(t.shape),
                "dims": [d.name for d in t.dims],
                "dtype": t.dtype,
                "count": t.count,
                "trainable": t.trainable,
            }
            for t in module.tensors
        ],
        "parts": [
            {"name": part.name, "count": part.count, **_tree(part.module)} for part in module.parts
        ],
    }


def _too_many(program: Program, lines: int) -> Diagnostic:
    return Diagnostic(
        "E590",
        f"{program.name} has {lines:,} modules and weights, layers and experts counted once",
        program.main.span,
        "too many to list",
        help=f"the limit is {MAX_LINES:,}; do blocks that call others twice nest?",
    )
