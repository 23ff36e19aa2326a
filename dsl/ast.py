"""Syntax trees of the block language and of expressions. Every node knows its source span."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsl.source import Span

# ---- expressions: shared by YAML values and by blocks -------------------------------------


@dataclass(frozen=True, slots=True)
class Number:
    """An integer or a real number; units such as `4K` are already applied."""

    value: int | float
    span: Span


@dataclass(frozen=True, slots=True)
class Text:
    """A quoted string."""

    value: str
    span: Span


@dataclass(frozen=True, slots=True)
class Boolean:
    value: bool
    span: Span


@dataclass(frozen=True, slots=True)
class Name:
    value: str
    span: Span


@dataclass(frozen=True, slots=True)
class Unary:
    """`-x`, `not x`."""

    operator: str
    operand: Expr
    span: Span


@dataclass(frozen=True, slots=True)
class Binary:
    """`+ - * / // % **`, comparisons, `and`, `or`."""

    operator: str
    left: Expr
    right: Expr
    span: Span
    operator_span: Span


@dataclass(frozen=True, slots=True)
class Conditional:
    """`a if condition else b`."""

    condition: Expr
    then: Expr
    otherwise: Expr
    span: Span


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a call: by position when `name` is None, else by keyword."""

    name: Name | None
    value: Expr
    span: Span


@dataclass(frozen=True, slots=True)
class Call:
    """`function(arguments)`: an operator, a block, or an arithmetic function such as `log`."""

    function: Name
    arguments: tuple[Argument, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class Path:
    """A dotted path of weights, `model.layers.{index}`; each part is text or an expression."""

    parts: tuple[tuple[str | Expr, ...], ...]
    span: Span


Expr = Number | Text | Boolean | Name | Unary | Binary | Conditional | Call | Path


def names_in(node: Expr) -> list[str]:
    """Names that an expression reads, in order, each once; those of functions are left out."""
    if isinstance(node, Name):
        return [node.value]
    return list(dict.fromkeys(name for part in _parts(node) for name in names_in(part)))


def _parts(node: Expr) -> tuple[Expr, ...]:
    """Expressions right inside another, in reading order."""
    match node:
        case Unary():
            return (node.operand,)
        case Binary():
            return (node.left, node.right)
        case Conditional():
            return (node.then, node.condition, node.otherwise)
        case Call():
            return tuple(argument.value for argument in node.arguments)
        case Path():
            return tuple(item for part in node.parts for item in part if not isinstance(item, str))
        case _:
            return ()


# ---- blocks -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorType:
    """`f32[batch, seq, hidden_size]`; without an element type the model's own is meant."""

    dtype: str | None
    dims: tuple[Name, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class Value:
    """A named tensor in a block's signature."""

    name: Name
    type: TensorType
    span: Span


@dataclass(frozen=True, slots=True)
class Param:
    """A number, flag or text that a block needs from the spec; `default` may use earlier ones."""

    name: Name
    default: Expr | None
    span: Span


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for another block, filled by the spec: `slots attention, feed_forward = SwiGLU`."""

    name: Name
    default: Expr | None
    span: Span


@dataclass(frozen=True, slots=True)
class Require:
    """`require CONDITION, "message with {expressions}", "help"`, checked when a block is used."""

    condition: Expr
    message: Text
    help: Text | None
    span: Span


@dataclass(frozen=True, slots=True)
class Let:
    """`let name = expression`: a number known when the model is built."""

    name: Name
    value: Expr
    span: Span


@dataclass(frozen=True, slots=True)
class Assign:
    """`a, b = expression` over tensors."""

    targets: tuple[Name, ...]
    value: Expr
    span: Span


@dataclass(frozen=True, slots=True)
class Collect:
    """`collect name = expression`: a side result that every enclosing block hands up."""

    name: Name
    value: Expr
    span: Span


@dataclass(frozen=True, slots=True)
class Output:
    """`output name = expression`: a result of the whole model; in a `for`, one for each copy."""

    name: Name
    value: Expr
    span: Span


@dataclass(frozen=True, slots=True)
class Alias:
    """`alias model.layers.61.embed_tokens.weight = model.embed_tokens.weight`."""

    copy: Path
    original: Path
    span: Span


@dataclass(frozen=True, slots=True)
class If:
    """A choice made when the model is built."""

    condition: Expr
    then: tuple[Statement, ...]
    otherwise: tuple[Statement, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class For:
    """`for module, index in slot:` written out once for each block of the slot, index from 1."""

    module: Name
    index: Name
    slot: Name
    body: tuple[Statement, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class Repeat:
    """`repeat layer, index in layers:` one region for each group of equal blocks, index from 0."""

    module: Name
    index: Name
    slot: Name
    body: tuple[Statement, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class Return:
    values: tuple[Expr, ...]
    span: Span


Statement = Require | Let | Assign | Collect | Output | Alias | If | For | Repeat | Return


@dataclass(frozen=True, slots=True)
class Setting:
    """`flops = 2 * width`: what an extern says of its function."""

    name: Name
    value: Expr
    span: Span


@dataclass(frozen=True, slots=True)
class Function:
    """The torch function of an extern: a name in `module`, the copy of its file in builds.

    It treats each token by itself, or each sequence (`per`). `numbers` are the parameters that it
    takes by name, `flops` those of its matrix products for one token. Without the name of a
    `gradient`, autograd differentiates it.
    """

    module: str
    name: str
    gradient: str
    per: str
    numbers: tuple[str, ...]
    flops: Expr


@dataclass(frozen=True)
class Block:
    """`block NAME(values) -> types`, its parameters, slots and equations.

    The outermost block of a model has outputs instead of results. An extern has `settings` and,
    once its file is read, a `function` in place of equations.
    """

    name: Name
    about: str
    arguments: tuple[Value, ...]
    results: tuple[TensorType | Value, ...]
    params: tuple[Param, ...]
    slots: tuple[Slot, ...]
    body: tuple[Statement, ...]
    span: Span = field(repr=False)
    settings: tuple[Setting, ...] = ()
    function: Function | None = None
