"""Uses of externs: the attributes of their operators, and what builds call them."""

from __future__ import annotations

import keyword
from typing import Any

from compiler.lower.bind import Bound
from compiler.lower.state import Lowering
from compiler.ops import TypeMismatch
from compiler.ops.extern import flops_text
from dsl import ast


def extern_attributes(low: Lowering, bound: Bound, function: ast.Function) -> dict[str, Any]:
    """What the operator of a use says of its function; uses that agree in it have one name.

    Raises `DiagnosticError` where `flops` is no number, `TypeMismatch` where the spec masks
    documents, of which the function does not know.
    """
    block = bound.block
    takes = tuple(_formal(low, a.type, bound) for a in block.arguments)
    results = (r.type if isinstance(r, ast.Value) else r for r in block.results)
    numbers = ((name, bound.params[name].value) for name in function.numbers)
    attrs = {
        "function": f"{function.module}.{function.name}",
        "gradient": f"{function.module}.{function.gradient}" if function.gradient else "",
        "numbers": tuple(item for pair in numbers for item in pair),
        "takes": takes,
        "gives": tuple(_formal(low, type, bound) for type in results),
        "flops": flops_text(function.flops, bound.numbers),
    }
    masked = low.description.spec.train.document_mask and function.per == "sequence"
    if masked and not any(text.startswith("i64") for text in takes):
        raise TypeMismatch(
            "train.document_mask is true, and this function cannot tell documents apart",
            help="let it take `position: i64[batch, seq]`, from 0 in each document",
        )
    return {"name": _name(low, block.name.value, repr(attrs)), **attrs}


def _name(low: Lowering, wish: str, key: str) -> str:
    """A name in the build for functions of equal attributes, which no file there has."""
    if key not in low.externs:
        taken = {*low.externs.values(), *low.description.user_files, "Extern"}
        name, n = wish, 2
        while name in taken or keyword.iskeyword(name):
            name, n = f"{wish}_{n}", n + 1
        low.externs[key] = name
    return low.externs[key]


def _formal(low: Lowering, node: ast.TensorType, bound: Bound) -> str:
    """A type as an extern declares it, where names that are no parameters are any dimension."""
    params = bound.params
    dims = (str(low.size(d, params[d.value])) if d.value in params else d.value for d in node.dims)
    return f"{node.dtype or low.dtype}[{', '.join(dims)}]"
