"""Attention: how heads are cut into parts that are powers of two, and scores into tiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from backends.render import render
from backends.triton.instances import OpInstance, OpInstances, attentions, spans
from backends.triton.kernel import Arg, Case, KernelFile, nbytes
from backends.triton.target import Target
from backends.triton.tuning_table import TuningTable
from compiler.ops.attention import also_of

FUNCTIONS = {
    "attention": "F.attention",
    "attention_saving": "G.attention_saving",
    "attention_grad": "G.attention_grad",
    "document_attention": "F.document_attention",
    "document_attention_saving": "G.document_attention_saving",
    "document_attention_grad": "G.document_attention_grad",
}
"""What serves each kind of operator."""

MIN_DOT_DIM = 16
"""The narrowest operand of a matrix instruction."""

REFERENCE_HEAD_DIM = 320
"""The head dimension that tiles are made for: 192 of a query and a key, 128 of a value."""


@dataclass(frozen=True)
class AttentionTile:
    """Queries (m) and keys (n) of a tile of scores."""

    m: int
    n: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return f"{self.m}x{self.n} s{self.stages}"

    def __str__(self) -> str:
        return (
            f"dict(BLOCK_M={self.m}, BLOCK_N={self.n}, "
            f"num_warps={self.warps}, num_stages={self.stages})"
        )


FORWARD = {
    # Sums and scores in registers: m (value + 1.5 n) / 256 = 112 of a thread's 255 for the first;
    # the next larger one spills, and 4 warps do at half of it.
    "sm_90": (AttentionTile(128, 64, 8, 3), AttentionTile(128, 64, 8, 4)),
    # Sums in tensor memory, 128 rows of 512 columns; scores pass through registers.
    "sm_100": (AttentionTile(128, 64, 8, 3), AttentionTile(128, 64, 8, 2)),
    # Operands take registers, too: 512 of a thread with 4 warps, 256 with 8.
    "gfx942": (AttentionTile(128, 32, 4, 2), AttentionTile(128, 32, 4, 1)),
}
"""Tiles without spills. All operands are read again for the next tile: the largest reads least, and
comes first. `dslc tune` measures the others, which read ahead more, or less."""

GRAD_QUERIES = {
    "sm_90": AttentionTile(128, 64, 8, 3),
    "sm_100": AttentionTile(128, 64, 8, 2),
    "gfx942": AttentionTile(128, 32, 8, 1),
}
"""The largest tiles of dQ without spills."""

GRAD_KEYS = {
    "sm_90": AttentionTile(32, 128, 8, 3),
    "sm_100": AttentionTile(32, 128, 8, 2),
    "gfx942": AttentionTile(32, 64, 8, 1),
}
"""Those of dK and dV, whose sums are n times 320 numbers: 192 of a thread's 255 registers on sm_90,
with two tiles of scores."""

GRAD_BOUNDED = {**GRAD_KEYS, "gfx942": AttentionTile(16, 64, 8, 1)}
"""The same within documents and windows: where they begin takes registers, too."""


@dataclass(frozen=True)
class HeadShape:
    """Heads of some width: `dim` of queries and keys, cut in `low` and `rest`; `width` of values.

    `rest` and `value` are rounded up to powers of two.
    """

    dim: int
    width: int
    target: str
    tuning: TuningTable

    @property
    def low(self) -> int:
        return max(MIN_DOT_DIM, _power(self.dim) // 2)

    @property
    def rest(self) -> int:
        return max(MIN_DOT_DIM, _power(self.dim - self.low))

    @property
    def value(self) -> int:
        return max(MIN_DOT_DIM, _power(self.width))

    @property
    def tiles(self) -> dict[str, AttentionTile]:
        """By kernel: half of the keys for each doubling of `REFERENCE_HEAD_DIM`."""
        forward = {tile.name: tile for tile in FORWARD[self.target]}
        return {
            "FORWARD": self._fitting(
                self.tuning.pick(tuning_key(self.dim, self.width), forward, next(iter(forward)))
            ),
            "GRAD_QUERIES": self._fitting(GRAD_QUERIES[self.target]),
            "GRAD_KEYS": self._fitting(GRAD_KEYS[self.target]),
            "GRAD_BOUNDED": self._fitting(GRAD_BOUNDED[self.target]),
        }

    def _fitting(self, tile: AttentionTile) -> AttentionTile:
        head = self.low + self.rest + self.value
        while head > REFERENCE_HEAD_DIM and tile.n > MIN_DOT_DIM:
            tile, head = replace(tile, n=tile.n // 2, stages=min(tile.stages, 2)), head // 2
        return tile


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/attention.py`, for the widths of heads that occur."""
    found = {kind: those for kind in FUNCTIONS if (those := attentions(instances, kind))}
    if not found:
        return None
    grad = any(kind.endswith("grad") for kind in found)
    documents = any(kind.startswith("document") for kind in found)
    kernels = ["FORWARD", *(["GRAD_QUERIES", "GRAD_KEYS"] if grad else [])]
    bounded = documents or any(
        "window" in one.op.attrs for those in found.values() for one in those
    )
    kernels += ["GRAD_BOUNDED"] if bounded and grad else []
    text = render(
        "triton/attention.py.jinja",
        kinds={kind: ", ".join(spans(those)) for kind, those in found.items()},
        shapes=_shapes(found, target, instances.tuning),
        documents=documents,
        bounded=bounded,
        grad=grad,
        kernels=kernels,
    )
    serves = {FUNCTIONS[kind]: "bfloat16" for kind in found}
    if "attention" in found:
        serves["F.attention_varlen"] = "bfloat16"
    if "attention_grad" in found:
        serves["G.attention_varlen_saving"] = serves["G.attention_varlen_grad"] = "bfloat16"
    return KernelFile("attention", text, serves, tuple(_cases(found, instances)))


def _shapes(
    found: Mapping[str, Sequence[OpInstance]], target: Target, tuning: TuningTable
) -> list[HeadShape]:
    heads = (_heads(instance) for those in found.values() for instance in those)
    widths = sorted({(head.dim, head.width) for head in heads})
    return [HeadShape(dim, width, target.name, tuning) for dim, width in widths]


def tuning_key(dim: int, width: int) -> str:
    """Which tile the forward pass of such heads takes."""
    return f"attention d{dim} v{width}"


def _power(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


@dataclass(frozen=True)
class Heads:
    """What the spec fixes of one attention."""

    heads: int
    kv_heads: int
    dim: int
    width: int
    scale: float
    window: int = 0
    sinks: bool = False

    def case(self, kind: str, sizes: tuple[int, int, int], lines: tuple[str, ...]) -> Case:
        batch, queries, keys = sizes
        q = Arg((batch, queries, self.heads, self.dim))
        k = Arg((batch, keys, self.kv_heads, self.dim))
        v = Arg((batch, keys, self.kv_heads, self.width))
        o = Arg((batch, queries, self.heads, self.width))
        lse = Arg((batch, queries, self.heads), "float32")
        grad, length = kind.endswith("grad"), 0
        where: tuple[Arg, ...] = ()
        if kind.startswith("document"):  # four of each sequence
            length = max(1, queries // 4)
            where = (Arg((batch, queries), "int64", "positions", length),)
        taken = (o, q, k, v, *where, o, lse) if grad else (q, k, v, *where)
        given = (q, k, v) if grad else (o, lse) if kind.endswith("saving") else (o,)
        # Forward two products, backward five: scores, d V^T, dV, dQ, dK.
        products = (3, 2) if grad else (1, 1)
        seen = _seen(queries, keys, self.window)
        if length:
            seen = queries // length * _seen(length, length, self.window)
        of = f" w{self.window}" * bool(self.window) + " sinks" * self.sinks
        return Case(
            name=f"{kind} h{self.heads} d{self.dim} b{batch} q{queries} k{keys}{of}",
            function=kind,
            arguments=(*taken, self.scale),
            keywords={
                **({"window": self.window} if self.window else {}),
                **({"sinks": Arg((self.heads,))} if self.sinks else {}),
            },
            flops=2 * batch * self.heads * seen * _dot(products, (self.dim, self.width)),
            bytes=nbytes(*taken, *given),
            bound_by="bf16",
            spans=lines,
            tuning_key="" if grad or where or of else tuning_key(self.dim, self.width),
        )

    def packed(self, kind: str, sizes: tuple[int, int], lines: tuple[str, ...]) -> Case:
        """Packed sequences of `max_seqlen` tokens: prompts, or documents of a batch."""
        sequences, max_seqlen = sizes
        tokens = sequences * max_seqlen
        q = Arg((tokens, self.heads, self.dim))
        k = Arg((tokens, self.kv_heads, self.dim))
        v = Arg((tokens, self.kv_heads, self.width))
        o = Arg((tokens, self.heads, self.width))
        lse = Arg((tokens, self.heads), "float32")
        cu_seqlens = Arg((sequences + 1,), "int32", "starts", max_seqlen)
        seen, grad = sequences * max_seqlen * (max_seqlen + 1) // 2, kind == "attention_grad"
        given = {"attention": (o,), "attention_saving": (o, lse), "attention_grad": (q, k, v)}[kind]
        taken = (o, q, k, v, o, lse) if grad else (q, k, v)
        function = kind.replace("attention", "attention_varlen")
        return Case(
            name=f"{function} h{self.heads} d{self.dim} b{sequences} k{max_seqlen}",
            function=function,
            arguments=(*taken, cu_seqlens, cu_seqlens, max_seqlen, self.scale),
            flops=2 * self.heads * seen * _dot((3, 2) if grad else (1, 1), (self.dim, self.width)),
            bytes=nbytes(*taken, *given),
            bound_by="bf16",
            spans=lines,
        )


def _seen(queries: int, keys: int, window: int) -> int:
    """Pairs of a query and a key that it sees, the last query all or its window (0: none)."""
    window, first = min(window or keys, keys), keys - queries + 1
    few = min(max(window - first, 0), queries)  # of queries whose window reaches the beginning
    return few * first + few * (few - 1) // 2 + (queries - few) * window


def _dot(a: tuple[int, int], b: tuple[int, int]) -> int:
    return a[0] * b[0] + a[1] * b[1]


def _heads(instance: OpInstance) -> Heads:
    op, q = instance.op, 1 if instance.kind.endswith("grad") else 0
    return Heads(
        heads=instance.size(q, 2),
        kv_heads=instance.size(q + 1, 2),
        dim=instance.size(q),
        width=instance.size(q + 2),
        scale=op.real("scale"),
        window=op.number("window") if "window" in op.attrs else 0,
        sinks="sinks" in also_of(op),
    )


def _cases(found: Mapping[str, Sequence[OpInstance]], instances: OpInstances) -> Iterator[Case]:
    """A sequence as in training; less than a tile; behind a cached prefix, where there is one."""
    rows = instances.train_rows
    for kind, those in found.items():
        sizes = [(1, rows, rows), (2, 33, 33)]
        if kind == "attention":
            sizes += [(1, max(1, rows // 8), rows), (2, 33, 77)]
        heads = list(dict.fromkeys(map(_heads, those)))
        for one in heads:
            for size in sizes:
                yield one.case(kind, size, spans(those))
        if kind.startswith("document"):
            continue
        for one in dict.fromkeys(replace(one, window=0, sinks=False) for one in heads):
            yield one.packed(kind, (4, max(1, rows // 4)), spans(those))
            yield one.packed(kind, (3, 21), spans(those))
