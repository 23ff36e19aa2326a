"""In which precision products with weights are computed: the policy, and the overrides of a spec.

What is decided here is marked on weights (`Weight.fp8`) or written as casts; the pass `place_fp8`
makes the FP8 operators of it. See docs/precision.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from compiler.analysis.work import Shares, Work
from compiler.graph.core import Graph, Op, Program, Value
from compiler.graph.names import NamePart, Range, parts_of
from compiler.rewrite import Miss, Rewriter, rewrite
from dsl import yaml
from dsl.diagnostic import Diagnostic
from dsl.load import Description
from dsl.suggest import did_you_mean

# Report, section 3.3.1: embedding, head, gate, norms and the core of attention stay as they are,
# and so does the projection of the MTP modules, which the released weights keep in bf16.
FP8_WORK = (
    Work.ATTENTION_PROJECTIONS,
    Work.DENSE,
    Work.ROUTED_EXPERTS,
    Work.SHARED_EXPERTS,
)

Weight = tuple[str, str]  # a graph and the name of a weight in it
# In how many ways a weight fits: it may be used in several places, and stand for several layers.
Fits = dict[Weight, set[bool]]


def set_precision(description: Description, program: Program) -> Iterator[Diagnostic]:
    """Marks the weights of a lowered program; yields overrides that cannot be followed."""
    precision = description.spec.precision
    uses = _Uses(program)
    products: dict[Weight, str] = {}
    if precision.policy == "fp8_blockwise":
        products = dict.fromkeys(uses.in_fp8(), "fp8")
    for key, product in precision.overrides.items():
        fits = uses.fits(key)
        problem = _problem(key, product, precision.policy, fits, uses)
        if problem is not None:
            message, label, help, code = problem
            span = yaml.key_span(description.composed.root, ("precision", "overrides", key))
            yield Diagnostic(code, message, span, label, help=help)
        products |= {w: product for w, found in fits.items() if True in found}
    _mark(program, products, precision.scale_format)


def published_in_fp8(program: Program) -> tuple[set[Weight], set[Weight]]:
    """The weights that an FP8 checkpoint holds as E4M3, and those that it keeps besides.

    A model with FP8 products has the weights of these in FP8, another one those that DeepSeek-V3
    publishes so. Kept are those of the latter that are not among the former.
    """
    usual = _Uses(program).in_fp8()
    graphs = program.graphs.values()
    marked = {(graph.name, name) for graph in graphs for name, w in graph.weights.items() if w.fp8}
    return marked or usual, usual - marked if marked else set()


def _problem(
    key: str, product: str, policy: str, fits: Fits, uses: _Uses
) -> tuple[str, str, str, str] | None:
    """Message, label, help and code of what is wrong with an override."""
    if not any(True in found for found in fits.values()):
        known = sorted({*uses.classes(), *uses.words})
        help = did_you_mean(key, known) or f"kinds of products are {', '.join(uses.classes())}"
        return f"no product of this model is called `{key}`", "fits nothing", help, "E413"
    for (graph, symbol), found in fits.items():
        if len(found) > 1:
            message = f"`{key}` fits @{symbol} of {graph} in some places only"
            help = "a block has one precision in all layers it is used in; name it without layers"
            return message, "splits a block", help, "E414"
    if product == "bf16" and policy == "fp32":
        help = "set the policy to bf16, and those that shall stay to fp32"
        return "a model of fp32 weights has no bf16 products", "not in this model", help, "E415"
    return None


def _mark(program: Program, products: Mapping[Weight, str], scale_format: str) -> None:
    for graph in program.graphs.values():
        for symbol, weight in graph.weights.items():
            if products.get((graph.name, symbol)) == "fp8":
                graph.weights[symbol] = replace(weight, fp8=scale_format)
    if "fp32" in products.values():
        rewrite(program, "linear", _widened(products))


def _widened(products: Mapping[Weight, str]) -> Callable[[Rewriter], Sequence[Value] | Miss]:
    def rule(at: Rewriter) -> Sequence[Value] | Miss:
        (x,), (symbol,) = at.op.operands, at.op.symbols
        wanted = products.get((at.builder.graph.name, symbol)) == "fp32"
        if not wanted or x.type.dtype == "f32":
            return Miss("its precision is that of its operand", at.op)
        (wide,) = at.add("cast", [x], names=[f"{x.name}_f32"], dtype="f32")
        (y,) = at.add("linear", [wide], [symbol], names=[f"{at.op.result.name}_f32"])
        return at.add("cast", [y], names=[at.op.result.name], dtype=x.type.dtype)

    return rule


@dataclass(frozen=True)
class _Pattern:
    """A name as an override gives it: parts between dots, in each of which `*` matches anything.

    It fits all names that hold these parts in a row: `o_proj` is the weight of that module, and
    `layers.61` all in that layer. `at` are the parts that the name read so far may have reached.
    """

    parts: tuple[str, ...]
    at: frozenset[int] = frozenset([0])

    @property
    def fits(self) -> bool:
        return len(self.parts) in self.at

    def then(self, part: NamePart) -> list[_Pattern]:
        """After one more part of a name; two where only some layers or experts of a range fit."""
        reached = sorted(i for i in self.at if i < len(self.parts))
        outcomes: dict[frozenset[int], None] = {}
        numbers = range(part[0], part[1] + 1) if not isinstance(part, str) else (part,)
        if not isinstance(part, str) and not any(self.parts[i].strip("*") for i in reached):
            numbers = numbers[:1]  # layers are looked at one by one only where it may matter
        for text in numbers:
            met = {i + 1 for i in reached if fnmatchcase(str(text), self.parts[i])}
            stay = {len(self.parts)} if self.fits else set()
            outcomes[frozenset({0} | met | stay)] = None
        return [replace(self, at=at) for at in outcomes]

    def after(self, name: str, stars: Sequence[Range]) -> list[_Pattern]:
        """After a dotted name, whose `*` stand for `stars`."""
        found = [self]
        for part in parts_of(name, tuple(stars)):
            found = list(dict.fromkeys(n for one in found for n in one.then(part)))
        return found


class _Uses:
    """The products with weights of a lowered program: under which names, for which kind of work."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._shares = Shares(program)
        self.works: dict[Weight, set[Work]] = {}
        self.words: set[str] = set()  # parts of the names
        self._visit_works(program.main, None, set())

    def classes(self) -> list[str]:
        """Kinds of work that are products with weights, as specs name them."""
        found = set().union(*self.works.values())
        return [work.value for work in Work if work in found]

    def in_fp8(self) -> set[Weight]:
        """The weights of which all products are of kinds that DeepSeek-V3 computes in FP8."""
        return {weight for weight, works in self.works.items() if works <= set(FP8_WORK)}

    def fits(self, key: str) -> Fits:
        """Which weights an override with this key is for."""
        if key in self.classes():
            return {w: {work.value == key for work in works} for w, works in self.works.items()}
        fits: Fits = {}
        self._visit_names(self._program.main, _Pattern(tuple(key.split("."))), fits, set())
        return fits

    def _visit_works(self, graph: Graph, around: Work | None, seen: set[object]) -> None:
        if (graph.name, around) in seen:
            return
        seen.add((graph.name, around))
        for op, inside in _with_experts(graph.ops):
            if op.callee:
                self.words |= set(op.text("scope").split("."))
                callee = self._program.graphs[op.callee]
                self._visit_works(callee, self._shares.around_callees(graph, around), seen)
            elif op.kind == "linear":
                (symbol,) = op.symbols
                self.words |= set(symbol.split("."))
                work = self._shares.of(op, graph, Work.ROUTED_EXPERTS if inside else around)
                self.works.setdefault((graph.name, symbol), set()).add(work)

    def _visit_names(self, graph: Graph, pattern: _Pattern, fits: Fits, seen: set[object]) -> None:
        if (graph.name, pattern) in seen:
            return
        seen.add((graph.name, pattern))
        for op, stars in _with_layers(graph.ops):
            if op.callee:
                callee = self._program.graphs[op.callee]
                for after in pattern.after(op.text("scope"), stars):
                    self._visit_names(callee, after, fits, seen)
            elif op.kind == "linear":
                (symbol,) = op.symbols
                experts = (0, graph.weights[symbol].stack - 1)
                found = fits.setdefault((graph.name, symbol), set())
                found.update(after.fits for after in pattern.after(symbol, [experts]))


def _with_experts(ops: Sequence[Op], inside: bool = False) -> Iterator[tuple[Op, bool]]:
    """Every operator, and whether it is inside an expert."""
    for op in ops:
        yield op, inside
        for region in op.regions:
            yield from _with_experts(region.ops, inside or op.kind == "experts")


def _with_layers(
    ops: Sequence[Op], layers: tuple[Range, ...] = ()
) -> Iterator[tuple[Op, tuple[Range, ...]]]:
    """Every operator, and the layers of the repeats around it."""
    for op in ops:
        yield op, layers
        around = layers
        if op.kind == "repeat":
            around = (*layers, (op.layers[0], op.layers[-1]))
        for region in op.regions:
            yield from _with_layers(region.ops, around)
