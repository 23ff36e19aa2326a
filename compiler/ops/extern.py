"""Functions of users: operators whose types and costs are declared where they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import ClassVar

from compiler.graph.core import Op, Value
from compiler.graph.types import FLOATS, RUNTIME_DIMS, Dim, Type, parse_type
from compiler.ops.base import Adjoint, Operator, Site, TypeMismatch
from dsl import ast
from dsl.evaluate import evaluate, free_names
from dsl.parse import parse_expression
from dsl.source import Source


class _Declared(Operator):
    """What operators of users' functions say of them."""

    variadic = True
    attrs: ClassVar = {
        "name": str,
        "function": str,
        "gradient": str,
        "numbers": tuple,
        "takes": tuple,
        "gives": tuple,
        "flops": str,
    }


class Extern(_Declared):
    """A function of a user's file that treats each token by itself.

    `name` is what builds call it, with `numbers` by name and value. In the types that it `takes`
    and `gives`, `..` is any leading dimensions, and a name without a size any dimension. `flops`
    are those of products for one token, by the sizes of these names.
    """

    kind = "extern"
    rowwise = True

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        bound = _bind(site, site.types)
        return tuple(_substitute(text, bound) for text in site.texts("gives"))

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        return _flops(site, site.types, sizes)

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        """By the user's function for it, or by autograd when the program runs."""
        given = []
        for gradient, result in zip(d, op.results, strict=True):
            if gradient is None and result.type.dtype in FLOATS:
                (gradient,) = at.add("zeros_like", [result], names=["zeros"])
            given += [gradient] if gradient is not None else []
        names = [f"d_{v.name}" for v in op.operands if v.type.dtype in FLOATS]
        found = iter(at.add("extern_grad", [*given, *op.operands], names=names, **op.attrs))
        return [next(found) if v.type.dtype in FLOATS else None for v in op.operands]


class SequenceExtern(Extern):
    """A function of a user's file that reads several tokens of a sequence, each sequence by itself.

    Its operands over `context` are of all tokens so far; results are of the tokens of this call.
    """

    kind = "sequence_extern"
    rowwise = False


class ExternGrad(_Declared):
    """Gradients of the real operands of an `extern`, from those of its real results."""

    kind = "extern_grad"

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        operands = _operands(site)
        bound = _bind(site, operands)
        results = (_substitute(text, bound) for text in site.texts("gives"))
        wanted = [type for type in results if type.dtype in FLOATS]
        given = site.types[: len(site.types) - len(operands)]
        for i, (got, want) in enumerate(zip(given, wanted, strict=False)):
            if got.whole != want:
                raise TypeMismatch(f"extern_grad needs {want}, got {got}", i)
        if len(given) != len(wanted):
            raise TypeMismatch(f"extern_grad needs {len(wanted)} gradients, got {len(given)}")
        return tuple(type.whole for type in operands if type.dtype in FLOATS)

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        """Two products for each one of the forward pass, which autograd runs once more."""
        times = 2 if site.text("gradient") else 3
        return times * _flops(site, _operands(site), sizes)


def flops_text(node: ast.Expr, numbers: Mapping[str, int | float | bool | str]) -> str:
    """FLOPs for one token as text that reads no parameters, only dimensions of operands.

    Raises `DiagnosticError` where the expression has no value, `TypeMismatch` where that is no
    number.
    """
    sizes = [name.value for name in free_names(node) if name.value not in numbers]
    evaluate(node, {**numbers, **dict.fromkeys(sizes, 1)})
    text, start = node.span.text, node.span.start
    for name in sorted(free_names(node), key=lambda n: -n.span.start):
        if name.value in numbers:
            before, after = name.span.start - start, name.span.end - start
            text = f"{text[:before]}({numbers[name.value]}){text[after:]}"
    text = " ".join(text.split()) if sizes else str(evaluate(node, numbers))
    _for_one(text, tuple((name, 1) for name in sizes))
    return text


def _operands(site: Site) -> tuple[Type, ...]:
    """Those of the function itself, after the gradients of its results."""
    return site.types[len(site.types) - len(site.texts("takes")) :]


def _formal(text: str) -> tuple[bool, Type]:
    """Whether a declared type has any leading dimensions, and the type without them."""
    head, _, dims = text.partition("[")
    any_leading = dims.startswith("..")
    try:
        return any_leading, parse_type(f"{head}[{dims.removeprefix('..').removeprefix(', ')}")
    except ValueError as error:
        raise TypeMismatch(f"extern: {error}") from None


Bound = dict[str, tuple[Dim, ...]]


def _bind(site: Site, operands: Sequence[Type]) -> Bound:
    """What `..` and each run-time dimension of the declared types stand for."""
    name, takes = site.text("name"), site.texts("takes")
    if len(operands) != len(takes):
        raise TypeMismatch(f"{name} takes {len(takes)} tensors, got {len(operands)}")
    bound: Bound = {}
    for i, (text, actual) in enumerate(zip(takes, operands, strict=True)):
        leading, formal = _formal(text)
        count = len(actual.dims) - len(formal.dims)
        wanted = [(d.name, d) for d in formal.dims]
        found: list[tuple[Dim, ...]] = [(d,) for d in actual.dims[max(count, 0) :]]
        fits = actual.dtype == formal.dtype and (count >= 0 if leading else count == 0)
        if leading and fits:
            wanted, found = [("..", Dim("..")), *wanted], [actual.dims[:count], *found]
        for (key, dim), dims in zip(wanted, found, strict=False):
            if dim.size is not None:
                fits &= dims == (dim,)
            else:
                fits &= key not in RUNTIME_DIMS or dims[0].size is None
                fits &= bound.setdefault(key, dims) == dims
        if not fits:
            raise TypeMismatch(f"{name} expects {text}, got {actual.whole}", i)
    return bound


def _substitute(text: str, bound: Bound) -> Type:
    """A declared type with the dimensions that it has here."""
    leading, formal = _formal(text)
    dims: list[Dim] = [*(bound.get("..", ()) if leading else ())]
    for dim in formal.dims:
        dims += bound.get(dim.name, (dim,)) if dim.size is None else (dim,)
    return formal.with_dims(*dims)


def _flops(site: Site, operands: Sequence[Type], sizes: Mapping[str, int]) -> int:
    """Of all tokens: those of the first result."""
    bound = _bind(site, operands)
    known = {n: dims[0].at(sizes) for n, dims in bound.items() if n != ".."}
    first = _substitute(site.texts("gives")[0], bound)
    tokens = prod(d.at(sizes) for d in first.dims if d.size is None)
    return tokens * _for_one(site.text("flops"), tuple(known.items()))


@lru_cache(maxsize=1024)
def _for_one(text: str, sizes: tuple[tuple[str, int], ...]) -> int:
    value = evaluate(parse_expression(Source("flops", text), 0, len(text)), dict(sizes))
    if isinstance(value, bool | str) or value < 0:
        raise TypeMismatch(f"flops is a number of at least 0, not {value!r}")
    return round(value)
