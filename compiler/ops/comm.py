"""What moves tensors between ranks.

Every rank runs the same program on its own part; these operators are where it meets the others.
`moved` counts the bytes that one rank sends. Ranks of a group are spread evenly over `nodes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar

from compiler.graph.core import Op, Value
from compiler.graph.types import BYTES, Dim, Type, ordered, parse_type
from compiler.ops.base import Adjoint, CommBytes, Operator, Site, TypeMismatch, dims_of
from compiler.ops.moe import computing


class _Exchange(Operator):
    """Between the ranks that tokens are on and those that hold their experts.

    Of `ranks` ranks on `nodes` nodes each holds `count / ranks` experts that follow each other. The
    experts of a token lie on at most `limit` of the nodes. Experts from `count` on, of which there
    are `identity`, lie on no rank.
    """

    variadic = True
    sums = "own"
    attrs: ClassVar = {"count": int, "ranks": int, "nodes": int, "limit": int, "identity?": int}

    @classmethod
    def check(cls, site: Site) -> None:
        """Raises `TypeMismatch` where experts, ranks and nodes do not go into each other."""
        count, ranks, nodes = (site.number(n) for n in ("count", "ranks", "nodes"))
        if ranks < 1 or nodes < 1 or count % ranks or ranks % nodes:
            raise TypeMismatch(f"{count} experts on {ranks} ranks of {nodes} nodes: not evenly")
        if not 1 <= site.number("limit") <= nodes:
            raise TypeMismatch(f"limit is {site.number('limit')}, of {nodes} nodes")

    @classmethod
    def spread(cls, site: Site, bytes_a_token: int, tokens: int, k: int) -> CommBytes:
        """Bytes sent when each token goes once to each of its nodes, and inside to its ranks.

        To another node it goes to the rank of the same place, which passes it on inside. Each of
        the `tokens` has `k` experts.
        """
        nodes, limit = site.number("nodes"), site.number("limit")
        others = site.number("ranks") // nodes - 1  # on a node, beside the one that it arrives at
        across = min(k, limit, nodes - 1)
        return CommBytes(
            tokens * min(k, limit * others) * bytes_a_token, tokens * across * bytes_a_token
        )


class Dispatch(_Exchange):
    """Rows of tokens to the ranks that hold the experts in topk_indices [.., k].

    rows [.., width], any number of them, then topk_indices -> for each of them [arrived, width], in
    the order of the ranks and of their tokens; then topk_indices [arrived, k], with the experts of
    this rank counted from 0 and -1 for all others, and a handle [arrived]: all that is needed to
    send rows the same way again or back, as the rank and token that each came from. A token goes
    once to each node that it needs (at most `limit`) and there to the ranks. DeepSeek-V3 report,
    sections 2.1.2 and 3.2.2.
    """

    kind = "dispatch"

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        cls.check(site)
        if len(site.types) < 2:
            raise TypeMismatch("dispatch takes rows and topk_indices")
        *rows, topk_indices = site.types
        for i, row in enumerate(rows):
            if row.dims[:-1] != topk_indices.dims[:-1]:
                raise TypeMismatch(
                    f"dispatch: {topk_indices.words} does not fit the rows {row.words}", i
                )
        arrived = Dim("arrived", axes=topk_indices.axes)
        there = [row.with_dims(arrived, row.last) for row in (*rows, topk_indices)]
        return (*there, Type("i64", (arrived,)))

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        *rows, topk_indices = op.operands
        given = zip(rows, d, strict=False)
        needed = [(row, dy) for row, dy in given if dy is not None and at.needs_grad(row)]
        if not needed:
            return [None for _ in op.operands]
        # One message with the gradients of all rows of a token.
        operands = [*(dy for _, dy in needed), op.results[-1], topk_indices]
        names = [f"d_{row.name}" for row, _ in needed]
        found = at.add("combine", operands, names=names, **_attrs(op))
        gradients = {row: back for (row, _), back in zip(needed, found, strict=True)}
        return [*(gradients.get(row) for row in rows), None]

    @classmethod
    def token_bytes(cls, site: Site) -> int:
        """Bytes of one token for one destination, without its routing: weights and experts."""
        *rows, topk_indices = site.types
        return sum(_row_bytes(row) for row in rows if row.last != topk_indices.last)

    @classmethod
    def moved(cls, site: Site, sizes: Mapping[str, int]) -> CommBytes:
        return cls.spread(site, sum(map(_row_bytes, site.types)), *_tokens(site.types[-1], sizes))

    @classmethod
    def sizes(cls, site: Site, sizes: Mapping[str, int]) -> dict[str, int]:
        """As many as every rank gets when all experts get the same number of tokens, at most."""
        topk_indices = site.types[-1]
        k = topk_indices.last.size or 1
        choices = topk_indices.count(sizes)
        arrived = choices // k * min(computing(site, k), site.number("ranks"))
        return {"slot": computing(site, choices), "arrived": arrived}


class DispatchAgain(_Exchange):
    """Other rows of the same tokens, sent as an earlier `dispatch` sent its rows.

    rows [.., width], any number of them, then its handle [arrived] -> for each [arrived, width], in
    the same order. No rank needs to be told how many come. A token has `k` experts.
    """

    kind = "dispatch_again"
    attrs: ClassVar = {**_Exchange.attrs, "k": int}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        cls.check(site)
        if len(site.types) < 2:
            raise TypeMismatch("dispatch_again takes rows and a handle")
        *rows, handle = site.types
        return tuple(row.with_dims(*handle.dims, row.last) for row in rows)

    @classmethod
    def moved(cls, site: Site, sizes: Mapping[str, int]) -> CommBytes:
        *rows, _ = site.types
        tokens = rows[0].count(sizes) // (rows[0].last.size or 1)
        return cls.spread(site, sum(map(_row_bytes, rows)), tokens, site.number("k"))


class Combine(_Exchange):
    """The rows of each token back from the ranks it was sent to, summed: `dispatch` transposed.

    y [arrived, width], any number of them, then the handle [arrived] of the `dispatch` and the
    topk_indices [.., k] that it was given -> for each of them [.., width]. Sums are made on each
    node, by rank, and then over the nodes, in order.
    """

    kind = "combine"

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        cls.check(site)
        if len(site.types) < 3:
            raise TypeMismatch("combine takes rows, a handle and topk_indices")
        *rows, handle, topk_indices = site.types
        for i, y in enumerate(rows):
            if y.dims[:-1] != handle.dims:
                raise TypeMismatch(f"combine: {handle.words} does not fit the rows {y.words}", i)
        return tuple(y.with_dims(*topk_indices.dims[:-1], y.last) for y in rows)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        *rows, handle, topk_indices = op.operands
        given = [(y, dx) for y, dx in zip(rows, d, strict=True) if dx is not None]
        if not given:
            return [None for _ in op.operands]
        names = [f"d_{y.name}" for y, _ in given]
        operands, k = [*(dx for _, dx in given), handle], topk_indices.type.last.size or 1
        found = at.add("dispatch_again", operands, names=names, **_attrs(op), k=k)
        gradients = {y: dy for (y, _), dy in zip(given, found, strict=True)}
        return [*(gradients.get(y) for y in rows), None, None]

    @classmethod
    def moved(cls, site: Site, sizes: Mapping[str, int]) -> CommBytes:
        *rows, _, topk_indices = site.types
        return cls.spread(site, sum(map(_row_bytes, rows)), *_tokens(topk_indices, sizes))


class Send(Operator):
    """x to the data rank of the same place at another pipeline rank, `pipeline`."""

    kind = "send"
    operands = ("x",)
    attrs: ClassVar = {"pipeline": int}
    sums = "own"
    pure = False

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return ()

    @classmethod
    def moved(cls, site: Site, sizes: Mapping[str, int]) -> CommBytes:
        # Pipeline ranks have nodes of their own.
        return CommBytes(inter_node=site.types[0].bytes(sizes))


class Recv(Operator):
    """What the data rank of the same place at another pipeline rank, `pipeline`, sends."""

    kind = "recv"
    attrs: ClassVar = {"pipeline": int, "type": str}
    sums = "own"
    pure = False

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        try:
            return (parse_type(site.text("type")),)
        except ValueError as error:
            raise TypeMismatch(str(error)) from None


class _Collective(Operator):
    """Between all ranks of `axes` of the mesh, which are `ranks` on `nodes` nodes."""

    operands = ("x",)
    attrs: ClassVar = {"axes": tuple, "ranks": int, "nodes": int}
    sums = "own"

    @classmethod
    def group(cls, site: Site) -> tuple[str, ...]:
        """The axes. Raises `TypeMismatch` where the ranks are not spread evenly over the nodes."""
        ranks, nodes = site.number("ranks"), site.number("nodes")
        if nodes < 1 or ranks < 1 or ranks % nodes:
            raise TypeMismatch(f"{ranks} ranks on {nodes} nodes: not evenly")
        return site.texts("axes")

    @classmethod
    def summed(cls, site: Site) -> Type:
        """x without the partial sum. Raises `TypeMismatch` where there is none to add up."""
        x, axes = site.types[0], cls.group(site)
        if not axes or not {*axes} <= {*x.partial}:
            raise TypeMismatch(f"{cls.kind} over {', '.join(axes)} of what is no such sum: {x}", 0)
        return x.with_partial(tuple(a for a in x.partial if a not in axes))

    @classmethod
    def once(cls, site: Site, whole: int) -> CommBytes:
        """Bytes sent when each rank ends with its share of `whole` bytes, or begins with it.

        First inside of each node, then between the ranks of the same place of all nodes.
        """
        ranks, nodes = site.number("ranks"), site.number("nodes")
        on_node = ranks // nodes
        return CommBytes(whole * (on_node - 1) // on_node, whole * (nodes - 1) // ranks)


class AllReduce(_Collective):
    """The sum of what all ranks hold, on all of them."""

    kind = "all_reduce"

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return (cls.summed(site),)

    @classmethod
    def moved(cls, site: Site, sizes: Mapping[str, int]) -> CommBytes:
        there = cls.once(site, site.types[0].bytes(sizes))
        return CommBytes(2 * there.intra_node, 2 * there.inter_node)


class ReduceScatter(_Collective):
    """The sum of what all ranks hold, flat, and of that each rank's share: [shard].

    Shares are equal; the last one is filled up with zeros.
    """

    kind = "reduce_scatter"

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        axes, x = cls.group(site), cls.summed(site)
        if any(dim.size is None for dim in x.dims):
            raise TypeMismatch(f"reduce_scatter needs known sizes, got {x.words}", 0)
        share = Dim("shard", -(-x.count() // site.number("ranks")), axes=axes)
        return (x.with_dims(share._replace(axes=ordered((*axes, *x.axes)))),)

    @classmethod
    def moved(cls, site: Site, sizes: Mapping[str, int]) -> CommBytes:
        return cls.once(site, site.types[0].bytes(sizes))


class AllGather(_Collective):
    """The shares [shard] of all ranks as one tensor of dimensions `into`, on all of them."""

    kind = "all_gather"
    attrs: ClassVar = {**_Collective.attrs, "into": tuple}

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        x, axes, into = site.types[0], cls.group(site), dims_of(site.attrs["into"])
        share = -(-prod(dim.size or 0 for dim in into) // site.number("ranks"))
        if len(x.dims) != 1 or x.last.size != share or not {*axes} <= {*x.axes}:
            raise TypeMismatch(f"all_gather takes a share of {share}, got {x}", 0)
        left = tuple(axis for axis in x.axes if axis not in axes)
        return (x.with_dims(into[0]._replace(axes=left), *into[1:]),)

    @classmethod
    def moved(cls, site: Site, sizes: Mapping[str, int]) -> CommBytes:
        whole = site.types[0].bytes(sizes) * site.number("ranks")
        return cls.once(site, whole)


def _attrs(op: Op) -> dict[str, Any]:
    return dict(op.attrs)


def _tokens(topk_indices: Type, sizes: Mapping[str, int]) -> tuple[int, int]:
    """The number of tokens, and of experts of each."""
    k = topk_indices.last.size or 1
    return topk_indices.count(sizes) // k, k


def _row_bytes(row: Type) -> int:
    return (row.last.size or 0) * BYTES[row.dtype]
