"""Which results are partial sums over ranks: one rule for every operator.

A rank holds its own part of a dimension that is spread, as `batch@expert`. What sums over such a
dimension gives every rank a part of the sum: the axis moves from the dimensions to `partial`, and
stays there through operators that are linear, until a collective adds the parts up.
"""

from __future__ import annotations

from compiler.graph.types import Type, axes_text, ordered
from compiler.ops.base import Operator, PartialSum, Site


def placed(operator: type[Operator], site: Site, results: tuple[Type, ...]) -> tuple[Type, ...]:
    """The types of results with what is partial of them. Raises `PartialSum`."""
    axes = {axis for t in site.types for dim in t.dims for axis in dim.axes}
    axes = axes.union(*(t.partial for t in site.types))
    if not axes or operator.sums == "own":
        return results
    _check(operator, site)
    return tuple(r.with_partial(ordered(axes - {*r.axes})) for r in results)


def _check(operator: type[Operator], site: Site) -> None:
    """Raises `PartialSum` where an operand that needs the whole is a partial sum."""
    partial = [i for i, t in enumerate(site.types) if t.partial]
    if not partial:
        return
    # Parts of a sum times parts of a tensor, each of the same ranks, make parts of nothing.
    spread = {axis for t in site.types for axis in t.axes}
    meets = any(spread & {*t.partial} for t in site.types)
    allowed = {
        "nowhere": False,
        "first": partial == [0],
        "one": len(partial) < 2,
        "all": len({t.partial for t in site.types}) == 1,
    }
    if meets or not allowed[operator.sums]:
        at = partial[-1]
        over = axes_text(site.types[at].partial)
        message = f"{operator.kind} needs the whole of what is a partial sum over {over}"
        raise PartialSum(message, at, "`all_reduce` adds the parts up")
