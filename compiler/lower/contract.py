"""What the outermost block of a model takes and gives, so that a module can be made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compiler.graph.core import Op, Value, walk
from compiler.graph.types import Dim, Type
from dsl import ast
from dsl.diagnostic import Diagnostic
from dsl.source import Span
from dsl.suggest import nearest

_SEQUENCE = Type("i64", (Dim("batch"), Dim("seq")))
_SCALAR = Type("f32")
ARGUMENTS = {
    "tokens": _SEQUENCE,
    "labels": _SEQUENCE,
    "position": _SEQUENCE,
    "mtp_weight": _SCALAR,
    "balance_alpha": _SCALAR,
}
# Whether the output may be given several times: once for each depth, or group of layers.
OUTPUTS = {
    "logits": False,
    "mtp_logits": True,
    "main": False,
    "mtp": True,
    "balance": False,
    "total": False,
    "load": True,
}
_REQUIRED = ("logits", "main", "balance", "total")
_LOGITS_RANK = 3


def argument_problems(block: ast.Block, types: Sequence[Type]) -> Iterator[Diagnostic]:
    """Arguments that no caller provides (E238)."""
    for argument, type in zip(block.arguments, types, strict=True):
        name = argument.name.value
        wanted = ARGUMENTS.get(name)
        if wanted is None:
            near = nearest(name, ARGUMENTS)
            help = f"did you mean {near}?" if near else f"it may take {', '.join(ARGUMENTS)}"
            message = f"the outermost block of a model has no argument {name}"
            yield Diagnostic("E238", message, argument.span, "is not provided", help=help)
        elif type != wanted:
            message = f"{name} of the outermost block is {wanted}, not {type}"
            yield Diagnostic("E238", message, argument.span, f"is {type}", help=f"write {wanted}")


def output_problems(
    block: ast.Block, ops: Sequence[Op], outputs: Sequence[tuple[ast.Name, Value]]
) -> Iterator[Diagnostic]:
    """Outputs that are missing, unknown, given twice, or of the wrong shape (E233, E238)."""
    given = [name.value for name, _ in outputs]
    missing = [name for name in _REQUIRED if name not in given]
    if missing:
        message = f"{block.name.value} has no output {', '.join(missing)}"
        help = f"add `output {missing[0]} = ..`"
        yield Diagnostic("E233", message, block.name.span, "the outermost block", help=help)
    for i, (name, value) in enumerate(outputs):
        message = _output_problem(name.value, value.type, name.value in given[:i])
        if message:
            help = f"outputs are {', '.join(OUTPUTS)}"
            yield Diagnostic("E238", message, name.span, "this output", help=help)
        elif name.value in ("logits", "mtp_logits"):
            yield from _foreseen(name.value, value, ops, name.span)


def _output_problem(name: str, type: Type, again: bool) -> str:
    if name not in OUTPUTS:
        return f"a model has no output {name}"
    if again and not OUTPUTS[name]:
        return f"the output {name} is given twice"
    if name in ("logits", "mtp_logits"):
        sequence = len(type.dims) == _LOGITS_RANK and [d.name for d in type.dims[:2]] == [
            "batch",
            "seq",
        ]
        fits = sequence and (name == "mtp_logits" or type.dims[:2] == _SEQUENCE.dims)
        return "" if fits else f"{name} is [batch, seq, vocab_size], not {type.words}"
    if name == "load":
        return ""
    return "" if type == _SCALAR else f"{name} is a float32 scalar, not {type}"


def _foreseen(output: str, value: Value, ops: Sequence[Op], span: Span) -> Iterator[Diagnostic]:
    """Scores may not come from what is only known when training."""
    needed = {value}
    for op in reversed(ops):
        if needed & set(op.results):
            needed.update(op.operands)
            needed.update(v for region in op.regions for o in walk(region.ops) for v in o.operands)
    for name in sorted(
        v.name for v in needed if v.name in ("labels", "mtp_weight", "balance_alpha")
    ):
        message = f"{output} depends on {name}, which is known in training only"
        help = "use it for the losses only"
        yield Diagnostic("E238", message, span, f"made from {name}", help=help)
