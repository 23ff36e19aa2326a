"""What the blocks of one model share while they are lowered: graphs made so far, and problems."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TypeGuard

from compiler.graph.core import Graph, Program, Value, bind_dims, substitute
from compiler.graph.types import RUNTIME_DIMS, Dim, Type
from compiler.lower.bind import Binder, Bound, Const, related_settings
from compiler.ops import TypeMismatch
from dsl import ast
from dsl.diagnostic import Diagnostics
from dsl.load import Description
from dsl.source import Span
from dsl.suggest import nearest

LARGEST = 10**9
"""Of dimensions: their products are numbers that a graph can hold."""
MAX_DEPTH = 40  # blocks inside blocks
# DeepSeek-V3 has some 120 operators. What is written out again and again grows without bound.
MAX_OPERATORS = 20_000

# Element types of a model by precision policy: weights and activations.
DTYPES = {"bf16": "bf16", "fp32": "f32", "fp8_blockwise": "bf16"}


class Stop(Exception):
    """The expression at hand cannot be made; it is reported already."""


class TooLarge(Exception):
    """The model has more equations than any model; it is reported already."""


class Lowering:
    """State of one lowering."""

    def __init__(self, description: Description) -> None:
        self.description = description
        self.problems = Diagnostics()
        params = {n: Const(v.value, v.span) for n, v in description.params.items()}
        self.binder = Binder(params, description.blocks, self.problems)
        self.dtype = DTYPES[description.spec.precision.policy]
        self.initializer_range = description.spec.train.initializer_range
        self.program = Program(description.spec.model, "")
        # Graphs by what they are made of: None while one is made, and where that failed.
        self.graphs: dict[object, Graph | None] = {}
        self.open: set[object] = set()  # being made at the moment
        self.bounds: dict[str, Bound] = {}
        self.externs: dict[str, str] = {}  # names of their uses, by attributes
        self.unknown: set[str] = set()  # dimensions
        self._depth = 0
        self._operators = 0

    def count_operator(self, here: Span | None) -> None:
        """Counts one more operator. Raises `TooLarge` where there are more than any model needs."""
        self._operators += 1
        if self._operators > MAX_OPERATORS:
            self.problems.error(
                "E242",
                f"this model has more than {MAX_OPERATORS:,} operators",
                here,
                "one too many",
                help="give blocks a `name`, so that equal ones are lowered once",
            )
            raise TooLarge

    @contextmanager
    def nested(self, use: Span) -> Iterator[None]:
        """Around the equations of a block inside another. Raises `Stop` where they never end."""
        if self._depth >= MAX_DEPTH:
            self.endless(use)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def endless(self, use: Span) -> NoReturn:
        self.problems.error(
            "E234",
            "blocks hold one another without end",
            use,
            "once more here",
            help="let one of them do without the other",
        )
        raise Stop

    def match_arguments(self, bound: Bound, operands: Sequence[Value]) -> dict[str, Dim]:
        """What each run-time dimension of a block is bound to with these operands.

        Raises `TypeMismatch` where a tensor does not fit what the block declares.
        """
        dims: dict[str, Dim] = {}
        for i, (argument, value) in enumerate(zip(bound.block.arguments, operands, strict=True)):
            formal = self.type(argument.type, bound, value.type.dims[:-1])
            name = f"{bound.block.name.value}: {argument.name.value}"
            try:
                here = bind_dims([formal], [value.type])
            except ValueError as error:
                raise TypeMismatch(f"{name} {error}", i) from None
            if substitute(formal, here) != value.type:
                raise TypeMismatch(f"{name} expects {formal}, got {value.type}", i)
            for dim, actual in here.items():
                if dims.setdefault(dim, actual) != actual:
                    raise TypeMismatch(f"{name} is over {actual}, another over {dims[dim]}", i)
        return dims

    def type(self, node: ast.TensorType, bound: Bound, leading: tuple[Dim, ...] | None) -> Type:
        dims: list[Dim] = []
        for name in node.dims:
            if name.value == "..":
                dims += leading or ()
            elif name.value in RUNTIME_DIMS:
                dims.append(Dim(name.value))
            elif name.value in bound.params:
                dims.append(self.size(name, bound.params[name.value]))
            else:
                near = nearest(name.value, [*bound.params, *RUNTIME_DIMS])
                self.problems.error(
                    "E237",
                    f"{name.value} is no dimension that {bound.block.name.value} knows",
                    name.span,
                    "not found",
                    help=f"did you mean {near}?" if near else "declare it under `params`",
                )
                self.unknown.add(name.value)
                dims.append(Dim(name.value, 1))
        return Type(node.dtype or self.dtype, tuple(dims))

    def size(self, name: ast.Name, const: Const) -> Dim:
        size = const.value
        if not is_size(size):
            self.not_a_size(name.value, size, const.span)
            return Dim(name.value, 1)
        return Dim(name.value, size)

    def not_a_size(
        self,
        what: str,
        size: object,
        place: Span,
        names: Sequence[str] = (),
        bound: Bound | None = None,
    ) -> None:
        """Reports a dimension that is none, and where `names`, which it comes from, were set."""
        params = bound.params if bound else {}
        large = isinstance(size, int) and size > LARGEST
        words = f"at most {LARGEST}" if large else "at least 1"
        self.problems.error(
            "E406",
            f"{what} is {size!r}, but a dimension is a whole number of {words}",
            place,
            f"is {size!r}",
            [label for label in related_settings(names, params, place) if label.span != place],
            "give it a number, without quotes"
            if isinstance(size, str)
            else f"give it a size of {LARGEST} or less"
            if large
            else "give it a size of 1 or more",
        )


def is_size(value: object) -> TypeGuard[int]:
    """Whether a number may be the size of a dimension."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST


def leading_dims(block: ast.Block, operands: Sequence[Value]) -> tuple[Dim, ...]:
    """What `..` is bound to in the signature of a block with these operands."""
    for argument, value in zip(block.arguments, operands, strict=False):
        if any(dim.value == ".." for dim in argument.type.dims):
            return value.type.dims[:-1]
    return ()
