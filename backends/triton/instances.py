"""The operators of a model and their sizes, which kernels are chosen by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from backends.triton.tuning_table import TuningTable
from compiler.graph.core import Graph, Op, Program, Weight
from compiler.ops import OPS
from compiler.ops.attention import Attention, LatentAttention
from dsl.load import Description

DECODE_ROWS = (1, 16, 64, 128)
"""Tokens of a decoding step that kernels are looked at for: sequences that are served at once."""

TRAIN_ROWS = 4096
"""Tokens of a training step or a prompt, where the spec does not say."""


@dataclass(frozen=True)
class OpInstance:
    """One operator of a program. Blocks are there once, however many layers they serve."""

    program: str
    graph: Graph
    op: Op

    @property
    def kind(self) -> str:
        return self.op.kind

    @property
    def weights(self) -> list[Weight]:
        return [self.graph.weights[symbol] for symbol in self.op.symbols]

    @property
    def span(self) -> str:
        """The line of the block that it comes from: `mla.dsl:24`."""
        if not self.op.spans:
            return ""
        span = self.op.spans[0]
        return f"{span.source.name.rsplit('/', 1)[-1]}:{span.line}"

    def size(self, operand: int, dim: int = -1) -> int:
        """The size of a dimension of an operand that the spec fixes."""
        size = self.op.operands[operand].type.dims[dim].size
        assert size is not None, f"{self.kind}: {self.op.operands[operand].type} varies"
        return size


class OpInstances:
    """All operators of the programs of a model; `rows` are the tokens of the launches to look at.

    `train_rows` are those of a micro-batch of the spec; `spec.kernels` says which libraries it asks
    for; `tuning` decides where there are several ways to cut a kernel.
    """

    def __init__(
        self, programs: Mapping[str, Program], description: Description, tuning: TuningTable
    ) -> None:
        self._all = [
            OpInstance(program.name, graph, op)
            for program in programs.values()
            for graph in program.graphs.values()
            for op in graph.walk()
        ]
        self.spec = description.spec
        self.tuning = tuning
        parallel = self.spec.parallel
        length = parallel.sequence_length if parallel is not None else None
        batch = parallel.micro_batch if parallel is not None else 1
        self.train_rows = length * batch if length else TRAIN_ROWS
        self.rows: Sequence[int] = (*DECODE_ROWS, self.train_rows)

    def of(self, *kinds: str, dtype: str = "") -> list[OpInstance]:
        """The uses of operators of these kinds, in program order; `dtype` is of the operand."""
        found = [instance for instance in self._all if instance.kind in kinds]
        return [one for one in found if not dtype or one.op.operands[0].type.dtype == dtype]


KNOWN = ("scale", "window", "sinks")
"""What kernels know of how an attention makes its scores; of attention to latents the first."""


def extras(op: Op) -> list[str]:
    """What of an attention no kernel knows: `mask`, `softcap`, `selected`."""
    known = KNOWN[:1] if op.kind == LatentAttention.kind else KNOWN
    found = [*op.attrs, *(op.texts("also") if "also" in op.attrs else ())]
    return [name for name in found if name not in (*known, "also")]


def attentions(instances: OpInstances, kind: str) -> list[OpInstance]:
    """The uses of a kind of attention that kernels serve; torch's own code has the others."""
    return [one for one in instances.of(kind) if not extras(one.op)]


def left_to_torch(programs: Mapping[str, Program]) -> list[str]:
    """Attentions that no kernel serves: `attention with mask (gemma.dsl:25)`."""
    found: dict[str, None] = {}
    for program in programs.values():
        for graph in program.graphs.values():
            for op in graph.walk():
                if issubclass(OPS[op.kind], Attention | LatentAttention) and (extra := extras(op)):
                    place = OpInstance(program.name, graph, op).span
                    found[f"attention with {', '.join(extra)} ({place})"] = None
    return list(found)


def spans(instances: Sequence[OpInstance]) -> tuple[str, ...]:
    """Where they come from, each line once."""
    return tuple(dict.fromkeys(instance.span for instance in instances if instance.span))


def kinds_of(instances: Sequence[OpInstance], among: Iterable[str]) -> list[str]:
    """Those of some kinds that occur, in their order."""
    occur = {instance.kind for instance in instances}
    return [kind for kind in among if kind in occur]
