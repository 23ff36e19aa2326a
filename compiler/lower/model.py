"""The front door: a description to a program of graphs, one for each distinct block."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from compiler.graph.build import Builder
from compiler.graph.core import Graph, Op, Program, Value, bind_dims, substitute
from compiler.graph.types import RUNTIME_DIMS, Dim, Type
from compiler.lower.bind import (
    Binder,
    BlockRef,
    Bound,
    Const,
    Group,
    SlotValue,
    related_settings,
)
from compiler.lower.calls import leading_dims
from compiler.lower.contract import ARGUMENTS, argument_problems, output_problems
from compiler.lower.extern import Externs
from compiler.lower.frame import Frame
from compiler.lower.graph_names import graph_names
from compiler.lower.names import name_problems
from compiler.lower.precision import set_precision
from compiler.lower.scope import Stop, TooLarge
from compiler.lower.settings import silent_losses, unknown_mask, unused_blocks, unused_params
from compiler.ops import TypeMismatch
from dsl import ast
from dsl.diagnostic import Diagnostics
from dsl.load import Description
from dsl.schema import BlockUse
from dsl.source import Span
from dsl.suggest import nearest

MAX_DEPTH = 40  # blocks inside blocks
# DeepSeek-V3 has some 120 operators. What is written out again and again grows without bound.
MAX_OPERATORS = 20_000

# Element types of a model by precision policy: weights and activations.
DTYPES = {"bf16": "bf16", "fp32": "f32", "fp8_blockwise": "bf16"}

Key = tuple[object, ...]


def lower(description: Description) -> Program:
    """The program that holds everything the model can compute; programs to run are cut from it.

    Raises `DiagnosticError` with every problem: parameters that are missing or unused, requirements
    of blocks, dimensions that do not meet.
    """
    return Lowering(description).run()


class Lowering:
    """State of one lowering: graphs made so far, problems found."""

    def __init__(self, description: Description) -> None:
        self.description = description
        self.problems = Diagnostics()
        params = {n: Const(v.value, v.span) for n, v in description.params.items()}
        self.binder = Binder(params, description.blocks, self.problems)
        self.dtype = DTYPES[description.spec.precision.policy]
        self.initializer_range = description.spec.train.initializer_range
        self.program = Program(description.spec.model, "")
        self._graphs: dict[Key, Graph | None] = {}
        self._bounds: dict[str, Bound] = {}
        self._unknown: set[str] = set()  # dimensions
        self.externs = Externs(self)
        self._open: set[Key] = set()  # being made at the moment
        self._depth = 0
        self._operators = 0

    def run(self) -> Program:
        with suppress(TooLarge):
            self._lower()
        self.problems.raise_if_any()
        self._rename()
        self.problems.extend(set_precision(self.description, self.program))
        self.problems.raise_if_any()
        return self.program

    def _lower(self) -> None:
        bound = self._root()
        if bound is not None:
            graph = self._root_graph(bound)
            self.program.graphs[graph.name] = graph
            self.problems.extend(silent_losses(self.description, self.program))
        # Something may be unused because of another mistake.
        if not self.problems:
            self.problems.extend(unused_blocks(self.description))
            self.problems.extend(unknown_mask(self.description))
        if not self.problems:
            self.problems.extend(unused_params(self.description, self.binder.used))

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

    def is_root(self, graph: Graph) -> bool:
        return graph.name == self.program.root

    def alias(self, copy: str, original: str, graph: Graph, statement: ast.Alias) -> None:
        """Records that checkpoints hold `original` a second time as `copy`."""
        if not self.is_root(graph) or original not in graph.weights:
            if self.problems and self.is_root(graph):
                return  # the weight may only be missing because its equation could not be made
            self.problems.error(
                "E232",
                f"{original} is no weight of the outermost block",
                statement.original.span,
                "not found",
                help="alias weights of the outermost block, after their first use",
            )
            return
        if copy in graph.weights or self.program.aliases.setdefault(copy, original) != original:
            self.problems.error(
                "E232",
                f"{copy} is a tensor of its own already, and cannot be a copy of {original}",
                statement.copy.span,
                "taken",
                help="give the copy another name",
            )

    # ---- the outermost block ----------------------------------------------------------------

    def _root(self) -> Bound | None:
        architecture = self.description.spec.architecture
        at = self.description.span
        layers = tuple(
            Group(self._use(g.block, g.slots, at("architecture", "layers", i)), g.repeat)
            for i, g in enumerate(architecture.layers)
        )
        slots: dict[str, SlotValue] = {"layers": layers}
        mtp = architecture.mtp
        if mtp.depth:
            slots["mtp"] = (
                Group(self._use(mtp.block, mtp.slots, at("architecture", "mtp")), mtp.depth),
            )
        else:
            slots["mtp"] = ()
        ref = self._use(architecture.block, {}, at("architecture", "block"))
        mask = Const(self.description.spec.train.document_mask, at("train", "document_mask"))
        asked = any(p.name.value == "document_mask" for p in ref.block.params)
        return self.binder.bind(ref, {"document_mask": mask} if asked else {}, slots)

    def _use(self, use: BlockUse, slots: Mapping[str, BlockUse], span: Span) -> BlockRef:
        arguments = {n: Const(v.value, _written(use, n, v.span)) for n, v in use.arguments.items()}
        inner = {name: self._use(s, {}, s.span or span) for name, s in slots.items()}
        return BlockRef(self.description.blocks[use.name], use.span or span, arguments, inner)

    def _root_graph(self, bound: Bound) -> Graph:
        name = bound.block.name.value
        self.program.root = name
        self._bounds[name] = bound
        types = [self._type(a.type, bound, None) for a in bound.block.arguments]
        self.problems.extend(argument_problems(bound.block, types))
        arguments = [a.name.value for a in bound.block.arguments]
        types = [ARGUMENTS.get(a, t) for a, t in zip(arguments, types, strict=True)]
        graph, frame = self._start(name, bound, types)
        frame.run(bound.block.body)
        outputs = frame.outputs
        if frame.returns is not None:
            self.problems.error(
                "E238",
                "the outermost block of a model has outputs and returns nothing",
                frame.returns.span,
                "nobody takes this",
                help="write `output logits = ..`",
            )
        if not self.problems:
            self.problems.extend(output_problems(bound.block, graph.ops, outputs))
        names = [name.value for name, _ in outputs]
        self._finish(graph, [v for _, v in outputs], names, bound.block.span)
        return graph

    # ---- other blocks -----------------------------------------------------------------------

    def graph(self, bound: Bound, operands: Sequence[Value], use: Span) -> Graph | None:
        """The graph of a block with these numbers; made once. None if it has problems."""
        leading = leading_dims(bound.block, operands)
        key = (_key(bound), leading)
        if key in self._graphs:
            if key in self._open:
                self._endless(use)
            return self._graphs[key]
        self._graphs[key] = None  # unless it is made without a problem
        found = len(self.problems)
        types = [self._type(a.type, bound, leading) for a in bound.block.arguments]
        graph, frame = self._start(f"{bound.block.name.value}#{len(self._bounds)}", bound, types)
        with self.nested(use):
            self._open.add(key)
            frame.run(bound.block.body)
            self._open.discard(key)
        if frame.returned is None:
            if frame.returns is None:
                self.returns_nothing(bound)
            return None
        assert frame.returns is not None
        self.check_results(bound, frame.returns, frame.returned, leading, {})
        names = [
            r.name.value if isinstance(r, ast.Value) else bound.block.name.value.lower()
            for r in bound.block.results
        ]
        results = [*frame.returned, *(v for _, v in frame.collected)]
        self._finish(graph, results, [*names, *(n for n, _ in frame.collected)], bound.block.span)
        if len(self.problems) > found:
            return None
        self._bounds[graph.name] = bound
        self._graphs[key] = graph
        self.program.graphs[graph.name] = graph
        return graph

    def returns_nothing(self, bound: Bound) -> None:
        self.problems.error(
            "E235",
            f"{bound.block.name.value} returns nothing",
            bound.block.name.span,
            "no `return` is reached",
            help="end the block with `return ..`",
        )

    @contextmanager
    def nested(self, use: Span) -> Iterator[None]:
        """Around the equations of a block inside another. Raises `Stop` where they never end."""
        if self._depth >= MAX_DEPTH:
            self._endless(use)
            raise Stop
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def _endless(self, use: Span) -> None:
        self.problems.error(
            "E234",
            "blocks hold one another without end",
            use,
            "once more here",
            help="let one of them do without the other",
        )

    def _start(self, name: str, bound: Bound, types: Sequence[Type]) -> tuple[Graph, Frame]:
        args = [Value(a.name.value, t) for a, t in zip(bound.block.arguments, types, strict=True)]
        graph = Graph(name, args, about=bound.block.about, span=bound.block.span)
        frame = Frame(self, bound, Builder(graph, self.program.graphs), env=dict(bound.params))
        frame.env.update((v.name, v) for v in args)
        return graph, frame

    def _finish(
        self, graph: Graph, results: Sequence[Value], names: Sequence[str], span: Span
    ) -> None:
        graph.result_names = tuple(names)
        if not self.problems:  # what is missing for another reason is not missed twice
            self.problems.extend(name_problems(graph))
        graph.ops.append(Op("return", list(results), spans=(span,)))

    def check_results(
        self,
        bound: Bound,
        returns: ast.Return,
        values: Sequence[Value],
        leading: tuple[Dim, ...],
        dims: Mapping[str, Dim],
    ) -> None:
        """Reports results that are not what a block declares.

        `leading` is what `..` stands for here, `dims` what its run-time dimensions do.
        """
        block = bound.block
        if len(values) != len(block.results):
            self.problems.error(
                "E236",
                f"{block.name.value} declares {len(block.results)} results, not {len(values)}",
                returns.span,
                "here",
                help="let the two agree",
            )
            return
        for declared, value, node in zip(block.results, values, returns.values, strict=True):
            annotation = declared.type if isinstance(declared, ast.Value) else declared
            type = substitute(self._type(annotation, bound, leading), dims)
            if type != value.type and not {d.name for d in type.dims} & self._unknown:
                self.problems.error(
                    "E411",
                    f"{block.name.value} declares {type}, and returns {value.type}",
                    node.span,
                    f"is {value.type}",
                )

    def match_arguments(self, bound: Bound, operands: Sequence[Value]) -> dict[str, Dim]:
        """What each run-time dimension of a block stands for with these operands.

        Raises `TypeMismatch` where a tensor does not fit what the block declares.
        """
        dims: dict[str, Dim] = {}
        for i, (argument, value) in enumerate(zip(bound.block.arguments, operands, strict=True)):
            formal = self._type(argument.type, bound, value.type.dims[:-1])
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

    def _type(self, node: ast.TensorType, bound: Bound, leading: tuple[Dim, ...] | None) -> Type:
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
                self._unknown.add(name.value)
                dims.append(Dim(name.value, 1))
        return Type(node.dtype or self.dtype, tuple(dims))

    def size(self, name: ast.Name, const: Const) -> Dim:
        size = const.value
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
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
        self.problems.error(
            "E406",
            f"{what} is {size!r}, but a dimension is a whole number of at least 1",
            place,
            f"is {size!r}",
            [label for label in related_settings(names, params, place) if label.span != place],
            "give it a number, without quotes"
            if isinstance(size, str)
            else "give it a size of 1 or more",
        )

    # ---- afterwards -------------------------------------------------------------------------

    def _rename(self) -> None:
        """Graphs are called by their block; the differing number or slot is added where it must."""
        final = graph_names(self._bounds)
        graphs = {}
        # Callees stand before callers, the root last.
        for old, graph in self.program.graphs.items():
            graph.name = final[old]
            graphs[graph.name] = graph
            for op in graph.walk():
                if op.kind == "call":
                    op.attrs["callee"] = final[op.text("callee")]
        self.program.graphs = graphs


def _written(use: BlockUse, name: str, value: Span) -> Span:
    """The place of `name=value` in the use of a block."""
    if use.span is not None and use.span.source is value.source:
        before = value.source.text[use.span.start : value.start]
        if found := re.search(rf"\b{name}\s*=\s*$", before):
            return value.source.span(use.span.start + found.start(), value.end)
    return value


def _key(bound: Bound) -> Key:
    """Equal for blocks that lower to the same graph."""
    params = tuple(sorted((n, type(c.value).__name__, c.value) for n, c in bound.params.items()))
    slots = tuple((n, _slot_key(s)) for n, s in sorted(bound.slots.items()))
    return (bound.block.name.value, params, slots)


def _slot_key(slot: SlotValue) -> Key:
    if isinstance(slot, BlockRef):
        arguments = tuple(sorted((n, c.value) for n, c in slot.arguments.items()))
        inner = tuple((n, _slot_key(s)) for n, s in sorted(slot.slots.items()))
        return (slot.block.name.value, arguments, inner)
    return tuple((_slot_key(g.ref), g.count) for g in slot)
