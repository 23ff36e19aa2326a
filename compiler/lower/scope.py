"""What equations of a block are lowered into: names known so far, weights, operators, errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from compiler.graph.build import Builder
from compiler.graph.core import Attr, Region, Value, Weight
from compiler.graph.types import Dim, Type
from compiler.lower.bind import BlockRef, Bound, Const, related_settings
from compiler.ops import TypeMismatch
from dsl import ast
from dsl.source import Span

if TYPE_CHECKING:
    from compiler.lower.model import Lowering


class Poison:
    """Stands for what could not be made; whatever follows from it is not reported again."""


POISON = Poison()


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """The index of a `repeat`: it may only stand in names, where it becomes `*`."""


Entry = Value | Const | BlockRef | LayerIndex | Poison
Result = list[Value] | Const | Poison


class Stop(Exception):
    """The expression at hand cannot be made; it is reported already."""


class TooLarge(Exception):
    """The model has more equations than any model; it is reported already."""


@dataclass
class Scope:
    """A block being lowered. Inlined blocks and regions share the builder of the one around."""

    low: Lowering
    bound: Bound
    builder: Builder
    prefix: tuple[str, ...] = ()
    env: dict[str, Entry] = field(default_factory=dict)
    collected: list[tuple[str, Value]] = field(default_factory=list)
    outputs: list[tuple[ast.Name, Value]] = field(default_factory=list)
    stack: int = 1
    inside: str = ""  # `repeat` in the lines of one, `region` in a block written out in a region
    here: Span | None = None
    returned: list[Value] | None = None
    returns: ast.Return | None = None

    @property
    def dtype(self) -> str:
        return self.low.dtype

    def tensor(self, name: str) -> Value:
        entry = self.env[name]
        if isinstance(entry, Poison):
            raise Stop
        assert isinstance(entry, Value)
        return entry

    def op(
        self,
        kind: str,
        operands: Sequence[Value] = (),
        symbols: Sequence[str] = (),
        *,
        wish: str = "",
        names: Sequence[str] = (),
        regions: Sequence[Region] = (),
        operand_spans: Sequence[Span] = (),
        **attrs: Attr,
    ) -> list[Value]:
        """Adds an operator here. Raises `TypeMismatch` unless the operands' spans are given."""

        self.low.count_operator(self.here)

        def make() -> list[Value]:
            return self.builder.add(
                kind,
                operands,
                symbols,
                names=names or ([wish] if wish else []),
                regions=regions,
                spans=(self.here,) if self.here else (),
                **attrs,
            )

        if not operand_spans:
            return make()
        place = ast.Name("", operand_spans[0].to(operand_spans[-1]))
        return self.checked(make, place, operand_spans, names)

    def weight(
        self,
        name: str,
        dims: tuple[Dim, ...],
        *,
        init: str = "normal",
        std: float | None = None,
        value: float = 0.0,
        dtype: str | None = None,
        trainable: bool = True,
        decay: bool = True,
    ) -> str:
        """Declares a weight of this block, once; the same name must mean the same tensor.

        It starts as N(value, std^2), with the `std` of the spec by default, or as ones or zeros.
        """
        if "." not in name:
            raise TypeMismatch(f"the name of a weight has two parts, as in gate.bias, not {name}")
        if "*" in name and self.stack == 1:
            raise TypeMismatch(
                f"{name} would be a weight of each layer",
                help="put the equation into a block of its own, named `model.layers.{index}`",
            )
        if std is None:
            std = self.low.initializer_range if init == "normal" else 0.0
        type = Type(dtype or self.dtype, dims)
        weight = Weight(type, init, std, trainable, self.stack, value=value, decay=decay)
        known = self.builder.graph.weights.setdefault(name, weight)
        if known != weight:
            raise TypeMismatch(f"{name} is {known.type.words} above and {weight.type.words} here")
        return name

    def checked(
        self,
        make: Callable[[], list[Value]],
        node: ast.Expr,
        spans: Sequence[Span],
        names: Sequence[str],
    ) -> list[Value]:
        """Runs `make` with this node as the place of what it adds; names its results."""
        outer, self.here = self.here, node.span
        try:
            results = make()
        except TypeMismatch as error:
            place = node.span
            if error.operand is not None and error.operand < len(spans):
                place = spans[error.operand]
            # An argument that the message names may come from a parameter of another name.
            words = set(re.findall(r"\w+", error.message))
            arguments = node.arguments if isinstance(node, ast.Call) else ()
            values = [a.value for a in arguments if a.name and a.name.value in words]
            settings = [name for value in values for name in ast.names_in(value)]
            self.error(
                "E410",
                error.message,
                None,
                "does not fit",
                help=error.help,
                span=place,
                settings=settings,
            )
        finally:
            self.here = outer
        # A cast that changes nothing makes no operator; its result keeps the name it has.
        made = self.builder.ops[-1].results if self.builder.ops else []
        for name, value in zip(names, results, strict=False):
            if value.name != name and value in made:
                self.builder.names.discard(value.name)
                value.name = self.builder.unique(name)
        return results

    def error(
        self,
        code: str,
        message: str,
        node: ast.Expr | ast.Name | None,
        label: str,
        *,
        help: str = "",
        span: Span | None = None,
        settings: Sequence[str] = (),
    ) -> NoReturn:
        """Reports a problem; where the numbers that it names, and `settings`, were set, too."""
        place = span or (node.span if node is not None else self.here)
        names = [*re.findall(r"[A-Za-z_][A-Za-z0-9_]*", message), *settings]
        related = related_settings(names, self.bound.params, place) if place else ()
        self.low.problems.error(code, message, place, label, related, help)
        raise Stop
