"""What every operator declares: operands, attributes, the type of its results, its arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, cast

from compiler.graph.core import Attr, Attributes, Op, Value
from compiler.graph.types import Dim, Type

Signature = tuple[tuple[Type, ...], tuple[Type, ...]]


@dataclass(frozen=True, slots=True)
class CommBytes:
    """Bytes that one rank sends to other ranks of its node, and to other nodes."""

    intra_node: int = 0
    inter_node: int = 0


class TypeMismatch(Exception):
    """Operands that an operator does not take. `operand` counts operands, then symbols."""

    def __init__(self, message: str, operand: int | None = None, help: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.operand = operand
        self.help = help


class PartialSum(TypeMismatch):
    """An operand that is a partial sum where the whole is needed; an `all_reduce` makes it one."""


@dataclass(slots=True)
class Site(Attributes):
    """The place of an operator, as its rules see it.

    `regions` and `callee` give the types of arguments and results of what is inside or called,
    `saved` those of the values that a graph of gradients reads.
    """

    types: tuple[Type, ...]
    weights: tuple[Type, ...] = ()
    attrs: Mapping[str, Attr] = field(default_factory=dict)
    regions: tuple[Signature, ...] = ()
    callee: Signature | None = None
    saved: tuple[Type, ...] = ()


class Adjoint(Protocol):
    """Where the operators of a derivative are put; their types are computed at once."""

    def add(
        self,
        kind: str,
        operands: Sequence[Value] = (),
        symbols: Sequence[str] = (),
        /,
        *,
        names: Sequence[str] = (),
        **attrs: Attr,
    ) -> list[Value]:
        """The results of a new operator; values of the forward pass may be its operands."""

    def weight(self, symbol: str) -> Type:
        """The type of a weight."""

    def needs_grad(self, value: Value) -> bool:
        """Whether the gradient of this value is needed."""

    def trainable(self, symbols: Sequence[str]) -> bool:
        """Whether any of these weights is trained."""


Sums = Literal["nowhere", "first", "one", "all", "own"]


class Operator:
    """One kind of operator. Subclasses declare; the docstring is what `dslc ops` prints."""

    kind: ClassVar[str]
    operands: ClassVar[tuple[str, ...]] = ()
    # A name that ends in "?" may be left out, and one that ends in "*" is one or more.
    symbols: ClassVar[tuple[str, ...]] = ()
    attrs: ClassVar[Mapping[str, type]] = {}  # likewise: a name that ends in "?" may be left out
    regions: ClassVar[int] = 0
    variadic: ClassVar[bool] = False  # takes any number of operands
    # Where a partial sum over ranks may stand, and then makes partial sums of the results, because
    # the operator is linear there: nowhere, in the `first` operand, in any `one` of them, in `all`
    # of them at once. `own`: `infer` says how the results are placed.
    sums: ClassVar[Sums] = "nowhere"
    pure: ClassVar[bool] = True  # may be dropped when none of its results is read
    # Whether its results change with its real operands so that they have a derivative.
    differentiable: ClassVar[bool] = True
    # The operator that computes the same and also what the derivative needs besides, and the names
    # of its further results.
    saving: ClassVar[tuple[str, ...]] = ()
    hoist: ClassVar[bool] = False  # depends on little: worth computing once, for all who call
    calls: ClassVar[bool] = False  # runs another graph, or a region once for each layer
    # Facts that passes go by. `view`: the results lie in the memory of the first operand.
    view: ClassVar[bool] = False
    # Reads and writes memory once: recomputed rather than saved, where that frees bytes.
    cheap: ClassVar[bool] = False
    # A product with a weight, recomputed where that frees many bytes for each FLOP.
    product: ClassVar[bool] = False
    # A product that is the gradient of a weight: nothing waits for it until the step ends.
    weight_product: ClassVar[bool] = False
    # Treats every row alike, so that it does not matter which expert a row is for.
    rowwise: ClassVar[bool] = False
    # Gives a pipeline stage its own terms of a sum over stages, from its own terms of another.
    termwise: ClassVar[bool] = False
    # Leaves values as they are, or works within each head: scales may be chosen by its operand.
    keeps_numbers: ClassVar[bool] = False
    # Its results are tiled once more for the weight gradient, or travel to experts: their scales
    # are powers of two (DeepSeek-V3 report, section 3.3.3).
    tiled_twice: ClassVar[bool] = False

    @classmethod
    def infer(cls, site: Site) -> tuple[Type, ...]:
        """Types of the results. Raises `TypeMismatch`."""
        raise NotImplementedError

    @classmethod
    def flops(cls, site: Site, sizes: Mapping[str, int]) -> int:
        """Floating-point operations of matrix products, a multiply-add being two; forward only."""
        return 0

    @classmethod
    def moved(cls, site: Site, sizes: Mapping[str, int]) -> CommBytes:
        """What a rank sends; at most, where that depends on the routing."""
        return CommBytes()

    @classmethod
    def grad(cls, at: Adjoint, op: Op, d: Sequence[Value | None]) -> Sequence[Value | None]:
        """The gradients of an operator's operands, given those of its results, as operators.

        None where there is none: a result that nothing depends on (but not all of them), an operand
        that `at` does not want or that is no real number. Gradients of weights are accumulated on
        the way.
        """
        raise NotImplementedError

    @classmethod
    def unchanged(cls, op: Op, zeros: Set[Value]) -> Value | None:
        """The operand that is the result of `op`, if its attributes or `zeros` change nothing."""
        return None

    @classmethod
    def sizes(cls, site: Site, sizes: Mapping[str, int]) -> dict[str, int]:
        """Run-time dimensions that this operator brings into being, and their sizes."""
        return {}

    @classmethod
    def inner_sizes(cls, site: Site, sizes: Mapping[str, int]) -> Mapping[str, int]:
        """Run-time sizes inside of its region."""
        return sizes


def module_of(weight: str) -> str:
    """The last name of the module that a weight belongs to: `q_b_proj`."""
    return weight.removesuffix(".weight").rpartition(".")[2]


def only(d: Sequence[Value | None]) -> Value:
    """The gradient that `grad` is given, where no more than one result can have any."""
    (found,) = [x for x in d if x is not None]
    return found


def grad_name(symbols: Sequence[str]) -> str:
    """What the gradient of a weight is called: `d_` and the name of its layer."""
    return f"d_{module_of(symbols[0])}"


def same_shape(kind: str, a: Type, b: Type) -> None:
    """Raises `TypeMismatch` that names the first pair of dimensions that do not meet."""
    help = "nothing is broadcast: both must have the same dimensions, by name and size"
    if len(a.dims) != len(b.dims):
        raise TypeMismatch(f"{kind} needs equal shapes: {a.words} does not meet {b.words}", 1, help)
    for x, y in zip(a.dims, b.dims, strict=True):
        if x != y:
            message = f"{kind} needs equal shapes: {x.words} does not meet {y.words}"
            raise TypeMismatch(message, 1, help)
    need_dtype(kind, a, b)


def need_dtype(kind: str, a: Type, b: Type) -> None:
    """Raises `TypeMismatch` where element types differ: they are never mixed in silence."""
    if a.dtype != b.dtype:
        raise TypeMismatch(
            f"{kind} needs equal element types: {a.dtype} does not meet {b.dtype}",
            1,
            "convert one of them with `float32(x)` or `cast(x)`",
        )


def need_float(kind: str, x: Type, operand: int = 0) -> None:
    if x.dtype not in ("bf16", "f32"):
        raise TypeMismatch(f"{kind} needs real numbers, got {x.dtype}", operand)


def need_rank(kind: str, x: Type, least: int, operand: int = 0) -> None:
    if len(x.dims) < least:
        raise TypeMismatch(f"{kind} needs at least {least} dimensions, got {x.words}", operand)


def find_dim(kind: str, x: Type, name: str) -> int:
    """Index of a dimension by name. Raises `TypeMismatch` that lists those there are."""
    for i, dim in enumerate(x.dims):
        if dim.name == name:
            return i
    raise TypeMismatch(f"{kind}: there is no dimension {name} in {x.words}", 0)


def dims_of(value: Attr) -> tuple[Dim, ...]:
    """Dimensions kept as an attribute: ("heads", 128, "head_dim", 192)."""
    items = cast(tuple[Attr, ...], value)
    return tuple(
        Dim(str(name), size if isinstance(size, int) else None)
        for name, size in zip(items[::2], items[1::2], strict=True)
    )


def dims_attr(*dims: Dim) -> tuple[Attr, ...]:
    """The inverse of `dims_of`."""
    return tuple(item for d in dims for item in (d.name, d.size if d.size is not None else 0))
