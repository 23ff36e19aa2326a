"""Operators that hold or call others."""

from __future__ import annotations

from typing import ClassVar

from compiler.graph.core import bind_dims, substitute
from compiler.graph.types import Dim, Type
from compiler.ops.base import Operator, Site, TypeMismatch


class Call(Operator):
    """Another graph, its weights under `scope`; a `*` there is the layer of the repeat around."""

    kind = "call"
    calls = True
    variadic = True
    sums = "own"
    attrs: ClassVar = {"callee": str, "scope": str}
    pure = False  # the callee may write a cache; simplify looks inside

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        assert site.callee is not None
        formal, results = site.callee
        if len(formal) != len(site.types):
            raise TypeMismatch(
                f"{site.attrs['callee']} takes {len(formal)} tensors, got {len(site.types)}"
            )
        try:
            bound = bind_dims(formal, site.types)
        except ValueError as error:
            raise TypeMismatch(f"{site.attrs['callee']} {error}") from None
        return tuple(substitute(r, bound) for r in results)


class Repeat(Operator):
    """The region `count` times with layers start, start + 1, ..; operands are carried along.

    The region yields the carried values first; what it yields beyond them is stacked along a new
    first dimension `layer`.
    """

    kind = "repeat"
    calls = True
    variadic = True
    sums = "own"
    attrs: ClassVar = {"start": int, "count": int}
    regions = 1
    pure = False

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        arguments, yields = site.regions[0]
        carried = len(site.types)
        if arguments != site.types or yields[:carried] != site.types:
            for i, (x, y) in enumerate(zip(site.types, yields, strict=False)):
                if x != y:
                    raise TypeMismatch(f"repeat carries {x}, but its region makes {y} of it", i)
            raise TypeMismatch("the region of a repeat takes and yields what the repeat carries")
        layer = Dim("layer", site.number("count"))
        stacked = tuple(y.with_dims(layer, *y.dims) for y in yields[carried:])
        return (*site.types, *stacked)


class RepeatBackward(Operator):
    """The region once for each layer, from the last of start, start + 1, .. to the first.

    The first `carried` operands are carried along; of the others, [layer, ..], the region takes
    the entry of the layer at hand. It yields what is carried.
    """

    kind = "repeat_backward"
    calls = True
    sums = "own"
    variadic = True
    attrs: ClassVar = {"start": int, "count": int, "carried": int}
    regions = 1
    pure = False

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        carried, sliced = site.types[: site.number("carried")], site.types[site.number("carried") :]
        layer = Dim("layer", site.number("count"))
        for i, x in enumerate(sliced):
            if x.dims[:1] != (layer,):
                raise TypeMismatch(f"{x.words} holds nothing for {layer.words}", len(carried) + i)
        inside = (*carried, *(Type(x.dtype, x.dims[1:]) for x in sliced))
        arguments, yields = site.regions[0]
        if arguments != inside or yields != carried:
            raise TypeMismatch("the region of a repeat takes and yields what the repeat carries")
        return carried


class Save(Operator):
    """Saves values for the graph of gradients that follows, in order; once, outermost."""

    kind = "save"
    sums = "own"
    variadic = True
    pure = False

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return ()


class Saved(Operator):
    """What the graph before saved, in order; the first operator of every graph of gradients.

    `Program.derivatives` says which graph that is; the verifier holds the types of both together.
    """

    kind = "saved"
    sums = "own"
    pure = False

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return site.saved


class AccumulateGrad(Operator):
    """Adds to the gradient of a weight, or of several below one another: [out, in].

    Of the weights of all experts at once: [experts, out, in].
    """

    kind = "accumulate_grad"
    sums = "own"
    operands = ("d",)
    symbols = ("weight*",)
    pure = False

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        (d,) = site.types
        rank = len(site.weights[0].dims)
        rows = sum(w.dims[0].size or 0 for w in site.weights)
        sizes = tuple(x.size for x in d.dims[-rank:])
        if sizes != (rows, *(x.size for x in site.weights[0].dims[1:])):
            raise TypeMismatch(f"{d.words} is no gradient of {site.weights[0].words}", 0)
        return ()


class _End(Operator):
    variadic = True
    sums = "own"
    pure = False

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        return ()


class Yield(_End):
    """Results of a region."""

    kind = "yield"


class Return(_End):
    """Results of a graph."""

    kind = "return"
