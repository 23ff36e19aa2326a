"""Filling in a block: parameters, slots, and the conditions that it requires."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dsl import ast
from dsl.diagnostic import Diagnostic, DiagnosticError, Diagnostics, Label
from dsl.evaluate import evaluate
from dsl.parse import parse_expression
from dsl.source import Span
from dsl.suggest import nearest

Number = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Const:
    """A number, flag or text known when the model is built, and the place that set it."""

    value: Number
    span: Span


@dataclass(frozen=True, slots=True)
class BlockRef:
    """A block chosen for a slot, with what was said of its parameters and slots there."""

    block: ast.Block
    span: Span
    arguments: Mapping[str, Const] = field(default_factory=dict)
    slots: Mapping[str, BlockRef] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BlockRun:
    """`count` equal blocks in a row."""

    ref: BlockRef
    count: int


SlotValue = BlockRef | tuple[BlockRun, ...]


@dataclass(frozen=True, slots=True)
class Bound:
    """A block whose parameters and slots are all known."""

    block: ast.Block
    params: Mapping[str, Const]
    slots: Mapping[str, SlotValue]

    @property
    def numbers(self) -> dict[str, Number]:
        return {name: const.value for name, const in self.params.items()}

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for blocks that lower to the same graph."""
        params = tuple(sorted((n, type(c.value).__name__, c.value) for n, c in self.params.items()))
        slots = tuple((n, _slot_key(s)) for n, s in sorted(self.slots.items()))
        return (self.block.name.value, params, slots)


def _slot_key(slot: SlotValue) -> tuple[object, ...]:
    if isinstance(slot, BlockRef):
        arguments = tuple(sorted((n, c.value) for n, c in slot.arguments.items()))
        inner = tuple((n, _slot_key(s)) for n, s in sorted(slot.slots.items()))
        return (slot.block.name.value, arguments, inner)
    return tuple((_slot_key(g.ref), g.count) for g in slot)


class Binder:
    """Binds blocks to the values of a spec, and remembers which of them were used."""

    def __init__(
        self,
        params: Mapping[str, Const],
        blocks: Mapping[str, ast.Block],
        problems: Diagnostics,
    ) -> None:
        self.params = params
        self.blocks = blocks
        self.problems = problems
        self.used: set[str] = set()

    def bind(
        self,
        ref: BlockRef,
        arguments: Mapping[str, Const],
        slots: Mapping[str, SlotValue],
    ) -> Bound | None:
        """Arguments of the use win over the spec's params, those over the block's defaults.

        None when something is missing or a requirement fails; it is then reported.
        """
        block = ref.block
        given = {**ref.arguments, **arguments}
        self._refuse_unknown(block, given)
        values: dict[str, Const] = {}
        complete = True
        for param in block.params:
            const = self._param(block, param, given, values, ref.span)
            if const is None:
                complete = False
            else:
                values[param.name.value] = const
        filled: dict[str, SlotValue] = {}
        for slot in block.slots:
            value = slots.get(slot.name.value, ref.slots.get(slot.name.value))
            if value is None and slot.default is not None:
                value = self.reference(slot.default, values)
            if value is None:
                complete = False
                if slot.default is None:
                    self._missing_slot(block, slot, ref.span)
            else:
                filled[slot.name.value] = value
        bound = Bound(block, values, filled)
        return bound if self._requirements_hold(bound, ref.span) and complete else None

    def reference(self, node: ast.Expr, values: Mapping[str, Const]) -> BlockRef | None:
        """`SwiGLU` or `SwiGLU(intermediate_size = ..)` in a block file."""
        name = node.function if isinstance(node, ast.Call) else node
        if not isinstance(name, ast.Name):
            self.problems.error(
                "E210",
                "this is no block",
                node.span,
                "expected the name of a block",
                help="write `NAME`, or `NAME(parameter = value)`",
            )
            return None
        block = self.blocks.get(name.value)
        if block is None:
            near = nearest(name.value, self.blocks)
            self.problems.error(
                "E211",
                f"there is no block {name.value}",
                name.span,
                "not found",
                help=f"did you mean {near}?"
                if near
                else "name its file under `blocks:` in the spec",
            )
            return None
        arguments: dict[str, Const] = {}
        found = len(self.problems)
        numbers = {n: c.value for n, c in values.items()}
        for argument in node.arguments if isinstance(node, ast.Call) else ():
            if argument.name is None:
                self.problems.error(
                    "E212",
                    f"parameters of {name.value} are given by name",
                    argument.span,
                    "whose value is this?",
                    help="write `parameter = value`",
                )
                continue
            try:
                value = evaluate(argument.value, numbers)
            except DiagnosticError as error:
                self.problems.extend(error.diagnostics)
                continue
            arguments[argument.name.value] = Const(value, argument.span)
        return BlockRef(block, node.span, arguments) if len(self.problems) == found else None

    def _param(
        self,
        block: ast.Block,
        param: ast.Param,
        given: Mapping[str, Const],
        values: Mapping[str, Const],
        use: Span,
    ) -> Const | None:
        name = param.name.value
        if name in given:
            return given[name]
        if name in self.params:
            self.used.add(name)
            return self.params[name]
        if param.default is not None:
            try:
                numbers = {n: c.value for n, c in values.items()}
                return Const(evaluate(param.default, numbers), param.span)
            except DiagnosticError as error:
                self.problems.extend(error.diagnostics)
                return None
        known = {p.name.value for p in block.params}
        near = nearest(name, [p for p in self.params if p not in known])
        self.problems.error(
            "E401",
            f"{block.name.value} needs {name}, and nothing sets it",
            use,
            f"used here without {name}",
            related=[Label(self.params[near].span, f"is this {name}?")]
            if near
            else [Label(param.span, "asked for here")],
            help=f"rename {near} to {name}"
            if near
            else f"add `{name}: ..` under `params:`, or write {block.name.value}({name}=..)",
        )
        return None

    def _refuse_unknown(self, block: ast.Block, given: Mapping[str, Const]) -> None:
        known = [p.name.value for p in block.params]
        for name, const in given.items():
            if name not in known:
                near = nearest(name, known)
                self.problems.error(
                    "E402",
                    f"{block.name.value} has no parameter {name}",
                    const.span,
                    "not known there",
                    help=f"did you mean {near}?"
                    if near
                    else f"it has {', '.join(known) or 'none'}",
                )

    def _missing_slot(self, block: ast.Block, slot: ast.Slot, use: Span) -> None:
        self.problems.error(
            "E403",
            f"{block.name.value} needs a block for {slot.name.value}",
            use,
            "used here",
            related=[Label(slot.span, "asked for here")],
            help=f"add `{slot.name.value}: BLOCK`",
        )

    def _requirements_hold(self, bound: Bound, use: Span) -> bool:
        """Checks the block's own `require` lines that need nothing but its parameters."""
        holds = True
        for statement in bound.block.body:
            if isinstance(statement, ast.Require) and (
                set(ast.names_in(statement.condition)) <= set(bound.params)
            ):
                holds = self.require(statement, bound.params, use) and holds
        return holds

    def require(self, line: ast.Require, values: Mapping[str, Const], use: Span) -> bool:
        numbers = {n: c.value for n, c in values.items()}
        try:
            holds = evaluate(line.condition, numbers)
            if not isinstance(holds, bool):
                self.problems.error(
                    "E229",
                    f"a condition is true or false, this is {holds!r}",
                    line.condition.span,
                    f"is {holds!r}",
                    help="compare it, for example with `!= 0`",
                )
            if holds:
                return True
            message = fill_in(line.message, numbers)
            help = fill_in(line.help, numbers) if line.help else ""
        except DiagnosticError as error:
            self.problems.extend(error.diagnostics)
            return False
        # The caret goes to what a person wrote in the spec, the block's line explains it.
        written = [
            (name, values[name].span)
            for name in ast.names_in(line.condition)
            if name in values and values[name].span.source is not line.span.source
        ]
        place = written[0][1] if written else use
        related = [Label(span, f"{name} is {numbers[name]}") for name, span in written[1:]]
        related.append(Label(line.condition.span, "required here"))
        label = f"{written[0][0]} is {numbers[written[0][0]]}" if written else "in this block"
        self.problems.add(Diagnostic("E405", message, place, label, tuple(related), help))
        return False


def fill_in(text: ast.Text, numbers: Mapping[str, Number]) -> str:
    """`text` with every {expression} replaced by its value. Raises `DiagnosticError`."""
    source, begin = text.span.source, text.span.start + 1

    def one(match: re.Match[str]) -> str:
        node = parse_expression(source, begin + match.start(1), begin + match.end(1))
        return str(evaluate(node, numbers))

    return re.sub(r"\{([^{}]*)\}", one, text.value)


def related_settings(
    names: Sequence[str], params: Mapping[str, Const], here: Span
) -> Sequence[Label]:
    """Where those of `names` that are parameters were set, when that is another file."""
    words = dict.fromkeys(names)
    return [
        Label(params[w].span, f"{w} is set here")
        for w in words
        if w in params and params[w].span.source is not here.source
    ]
