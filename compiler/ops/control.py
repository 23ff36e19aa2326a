"""Operators that hold or call others."""

from __future__ import annotations

from typing import ClassVar

from compiler.graph.core import bind_dims, substitute
from compiler.graph.types import Dim, Type
from compiler.ops.base import Operator, Site, TypeMismatch


class Call(Operator):
    """Another graph, its weights under `scope`; a `*` there is the layer of the repeat around."""

    kind = "call"
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
