"""The records that fill `model.py.jinja`: one class a block, one method a program that differs."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from backends.render import render
from backends.torch.classes import Class, class_names, joined
from backends.torch.declare import Declarations, joined_names, stored_name
from backends.torch.emit import Callee, Context, Emitter, Segment, TrainingEmitter, constants
from backends.torch.layout import WIDTH, Call, lay_out
from backends.torch.names import identifier
from backends.torch.prefix import common_prefix
from backends.torch.sizes import PARAMS, Sizes
from backends.torch.statements import STATEMENTS
from compiler.graph.core import Graph, Op, Program
from compiler.graph.equal import equal_graphs
from compiler.graph.types import Type
from compiler.pipeline import Compiled

# Programs and their methods, in the order in which a class lists them; a graph that equals that of
# an earlier program is served by its method.
METHODS = {"forward": "forward", "train": "loss", "prefill": "prefill", "decode": "decode"}
PROGRAMS = tuple(METHODS)
# What methods take behind their tensors.
TRAILING = {
    "cache": "cache: Cache",
    "saved": "saved: Saved",
    "grads": "grads: Grads",
    "optional": "saved: Saved | None = None",
}
MANY_CONSTANTS = 5
"""An operator with as many attributes is bound once for the module if it occurs again."""


@dataclass(frozen=True)
class Method:
    """A method of a generated class: one graph of one program."""

    name: str
    arguments: list[str]
    returns: str
    lines: list[str]

    @property
    def head(self) -> list[str]:
        """The line of `def`, or one line for each argument where that is too long."""
        begin, end = f"def {self.name}(", f") -> {self.returns}:"
        line = f"{begin}{', '.join(self.arguments)}{end}"
        if len(line) <= WIDTH + len("    "):
            return [line]
        inside = f"    {', '.join(self.arguments)}"
        if len(inside) <= WIDTH + len("    "):
            return [begin, inside, end]
        return [begin, *(f"    {argument}," for argument in self.arguments), end]


@dataclass(frozen=True)
class Block:
    """A generated class; `parameters` are the arguments of its constructor."""

    name: str
    about: str
    base: str
    signature: str
    gradients: str
    parameters: Sequence[str]
    declarations: list[str]
    methods: list[Method]


@dataclass(frozen=True)
class Root:
    """The parts of class Model that differ from model to model."""

    about: str
    aliases: list[str]
    declarations: list[str]
    forward: list[str]
    loss: list[str]
    prefill: list[str]
    decode: list[str]
    parts: list[Method]


def model_py(
    compiled: Compiled,
    *,
    about: str,
    spec: str,
    version: str,
    dtype: str,
    params: Mapping[str, object],
    kernels: bool = False,
) -> str:
    """Text of `model.py`; with `kernels` its functions come from that folder of the build.

    `params` are the parameters of the spec, by which numbers are called.
    """
    emit = _Emission(compiled, dtype, params)
    blocks = [emit.block(one) for one in emit.classes]
    root = emit.root()
    made = "\n".join([*root.declarations, *(line for b in blocks for line in b.declarations)])
    helpers = ["Joined", "Stack", "Tensors", "normal", "ones", "zeros"]
    imports = [*(["Block"] if any(b.base == "Block" for b in blocks) else [])]
    imports += [name for name in helpers if f"{name}(" in made]
    facts = {"blocks": blocks, "root": root, "constants": emit.constants()}
    return render(
        "torch/model.py.jinja",
        about=docstring(about or "A language model."),
        spec=docstring(spec),
        version=version,
        imports=imports,
        units=emit.units,
        uses_fp8=_uses_fp8(compiled),
        uses_params=bool(re.search(rf"\b{PARAMS}\.", repr(facts))),
        kernels=kernels,
        lists="nn.ModuleList(" in made,
        **facts,
    )


def _uses_fp8(compiled: Compiled) -> bool:
    graphs = (g for program in compiled.programs.values() for g in program.graphs.values())
    return any("fp8" in op.kind for graph in graphs for op in graph.walk())


class _Emission:
    """The classes of a model and the methods of each.

    A block with a derived backward pass has one method for scores and for training; other
    programs have methods of their own where their graphs differ from that of `forward`.
    """

    def __init__(self, compiled: Compiled, dtype: str, params: Mapping[str, object]) -> None:
        self.compiled = compiled
        self.dtype = dtype
        self.sizes = Sizes(params)
        self.train = compiled.programs["train"]
        self.blocks = {
            name: graph
            for name, graph in compiled.lowered.graphs.items()
            if name != compiled.lowered.root
        }
        called = list(self.train.main.calls())
        # Blocks that autograd sees as one function each: what the outermost block calls.
        self.units = [n for n in called if self.train.backward and n in self.blocks]
        # What stands between them: parts of the outermost block.
        self.segments = [n for n in called if n not in self.blocks]
        # joined[graph]: where its weights lie that are stored with others.
        self.joined = {
            name: joined_names(graph, self._versions(name))
            for name, graph in compiled.lowered.graphs.items()
        }
        self.bound = self._bound()
        self.callees: dict[str, dict[str, Callee]] = {p: {} for p in PROGRAMS}
        for name in self.blocks:
            self._choose_methods(name)
        self._choose_derived()
        self.classes: list[Class] = []
        # Callees stand before callers, whose code names the classes of what they hold.
        for graph in self.blocks.values():
            self.classes = joined(self.classes, graph, self.blocks, self._code)
        self.names = class_names(self.classes)

    # ---- which method serves which graph -----------------------------------------------------

    def _versions(self, block: str) -> Iterator[Graph]:
        """The graph of a block in each program, and its parts and their gradients."""
        for program in self.compiled.programs.values():
            yield from (g for g in program.graphs.values() if self._owner(program, g.name) == block)

    def _owner(self, program: Program, graph: str) -> str:
        """The block whose weights a graph uses: what is no block is a part of the outermost one."""
        block = program.forward_of(graph)
        return block if block in self.blocks else self.compiled.lowered.root

    def _derived(self, name: str) -> bool:
        return name in self.blocks and name in self.train.derivatives

    def _choose_methods(self, name: str) -> None:
        """The methods of a block by program; what equals an earlier one is served by it."""
        seen: list[tuple[str, Graph]] = []
        for program in PROGRAMS:
            graph = self.compiled.programs[program].graphs.get(name)
            if graph is None or (program == "train" and self._derived(name)):
                continue
            same = next((p for p, g in seen if self._same(p, g, program, graph)), None)
            self.callees[program][name] = self._callee(name, same or program, program)
            if same is None:
                seen.append((program, graph))

    def _callee(self, name: str, served_by: str, program: str) -> Callee:
        method = METHODS[served_by]
        trailing = ("cache",) if name in _cached(self.compiled.programs[program]) else ()
        if method != "forward":
            return Callee(method, trailing)
        return Callee("", trailing, self._taken(name, program))

    def _taken(self, name: str, program: str) -> tuple[bool, ...]:
        """Which results of the method that training shares a program's graph has."""
        if not self._derived(name):
            return ()
        left = list(self.compiled.programs[program].graphs[name].result_names)
        taken = []
        for result in self.train.graphs[name].result_names:
            taken.append(bool(left) and left[0] == result)
            left = left[taken[-1] :]
        return () if all(taken) else tuple(taken)

    def _same(self, program_a: str, a: Graph, program_b: str, b: Graph) -> bool:
        """Equal, and calling equal methods."""
        return equal_graphs(a, b) and all(
            self.callees[program_a][c].method == self.callees[program_b][c].method
            for c in a.calls()
        )

    def _choose_derived(self) -> None:
        """Methods in training, where a backward pass was derived."""
        for name, derivative in self.train.derivatives.items():
            block = name in self.blocks
            method, backward = ("", "backward") if block else self._segment_methods(name)
            self.callees["train"][name] = Callee(method, ("saved",))
            self.callees["train"][derivative.backward] = Callee(backward, ("saved", "grads"))
        for name in self.segments:
            method, _ = self._segment_methods(name)
            self.callees["train"].setdefault(name, Callee(method))

    def _segment_methods(self, graph: str) -> tuple[str, str]:
        """The methods of the outermost block that compute a part of it, and its gradients."""
        name = graph.removeprefix(f"{self.train.root}_")
        return name, f"{name}_backward"

    # ---- methods -----------------------------------------------------------------------------

    def _context(self, program: str, graph: str, sizes: Sizes | None = None) -> Context:
        source = self.compiled.programs[program]
        segments = None
        if program == "train" and self.train.backward and graph == self.train.root:
            segments = {name: self._segment(name) for name in self.segments}
        return Context(
            STATEMENTS,
            self.callees[program],
            self.joined[self._owner(source, graph)],
            sizes or self.sizes,
            self.bound,
            segments,
        )

    def _segment(self, name: str) -> Segment:
        joined = self.joined[self.compiled.lowered.root]
        weights = dict.fromkeys(stored_name(w, joined) for w in self.train.graphs[name].weights)
        return Segment(tuple(weights), self._gradients(name))

    def _gradients(self, name: str) -> str:
        """The text of the `Gradients` of a graph."""
        derivative = self.train.derivatives[name]
        return f"Gradients({_numbers(derivative.results)}, {_numbers(derivative.arguments)})"

    def block(self, one: Class) -> Block:
        return self._block(self.names[one.graph], one.graph, one.parameters)

    def _code(self, name: str, parameters: Iterable[str]) -> Block:
        return self._block("", name, tuple(parameters))

    def _block(self, name: str, graph: str, parameters: Sequence[str]) -> Block:
        """The class of a graph, which takes the sizes of some dimensions as arguments."""
        unit, lowered = graph in self.units, self.blocks[graph]
        programs = self.compiled.programs.values()
        shown = next((p.graphs[graph] for p in programs if graph in p.graphs), lowered)
        return Block(
            name=name,
            base="Unit" if unit else "Block",
            gradients=self._gradients(graph) if unit else "",
            about=docstring(lowered.about or graph),
            signature=_signature(shown, parameters),
            parameters=parameters,
            declarations=[
                *(f"self.{dim} = {dim}" for dim in parameters),
                *self._declarations(lowered, self.sizes.within({d: d for d in parameters})),
            ],
            methods=list(
                self._methods(graph, self.sizes.within({d: f"self.{d}" for d in parameters}))
            ),
        )

    def _methods(self, name: str, sizes: Sizes) -> Iterator[Method]:
        """The methods of a block; what all of them begin with is a method of its own."""
        programs = [p for p in PROGRAMS if self._has_method(name, p)]
        graphs = [self.compiled.programs[p].graphs[name] for p in programs]
        members = {weight.split(".")[0] for weight in self.blocks[name].weights}
        prefix = common_prefix(_free("project", members), graphs) if len(graphs) > 1 else None
        if prefix is not None:
            context = self._context(programs[0], name, sizes)
            yield _written(prefix.graph.name, Emitter(prefix.graph, context))
        for i, (program, graph) in enumerate(zip(programs, graphs, strict=True)):
            context = self._context(program, name, sizes)
            if prefix is not None:
                graph = prefix.rest[i]
                callees = {**context.callees, prefix.graph.name: prefix.callees[i]}
                context = replace(context, callees=callees)
            if program == "train" and self._derived(name):
                yield from self._training_methods(name, graph, context)
            else:
                callee = self.callees[program][name]
                yield _written(callee.method or "forward", Emitter(graph, context), callee.trailing)

    def _has_method(self, name: str, program: str) -> bool:
        """Whether a program's graph of a block is served by a method written from it."""
        callee = self.callees[program].get(name)
        if callee is None:
            return False
        if self._derived(name):
            return program == "train" or callee.method == METHODS[program]
        return (callee.method or "forward") == METHODS[program]

    def _training_methods(self, name: str, graph: Graph, context: Context) -> Iterator[Method]:
        """The method of a block that serves scores and training, and that of its gradients."""
        scored = name in self.compiled.programs["forward"].graphs
        taken = self._taken(name, "forward") if scored else ()
        numbers = [i for i in range(len(graph.results)) if not taken or taken[i]]
        emitter = TrainingEmitter(graph, context, numbers)
        method = "compute" if name in self.units else "forward"
        yield _written(method, emitter, ["optional"], numbers if taken else None)
        backward = self.train.graphs[self.train.derivatives[name].backward]
        context = replace(context, callees=self.callees["train"])
        saved = [emitter.names[v] for v in graph.saved]
        gradients = Emitter(backward, context, saves=True, saved=saved)
        yield _written("backward", gradients, ("saved", "grads"))

    def _declarations(self, graph: Graph, sizes: Sizes) -> list[str]:
        made = {name: self._constructed(name) for name in self.blocks}
        return Declarations(graph, self.joined[graph.name], made, sizes, self.dtype).lines()

    def _constructed(self, name: str) -> str:
        """The expression that makes the module of a graph."""
        names = class_names(self.classes)
        own = next((one.arguments[name] for one in self.classes if name in one.arguments), {})
        given = (f"{d}={self.sizes.number(d, n)}" for d, n in own.items())
        return f"{names.get(name, name)}({', '.join(given)})"

    def _segment_method(self, graph: Graph) -> Method:
        callee = self.callees["train"][graph.name]
        context = self._context("train", graph.name)
        emitter = Emitter(graph, context, saves="saved" in callee.trailing)
        return _written(callee.method, emitter, callee.trailing)

    # ---- the outermost block -----------------------------------------------------------------

    def _bound(self) -> dict[str, str]:
        """Operators with many constants that the outermost block has more than once."""
        found = Counter(map(constants, self._constant_operators()))
        names: dict[str, str] = {}
        for op in self._constant_operators():
            key = constants(op)
            if found[key] > 1 and key not in names:
                before = sum(name.startswith(op.kind) for name in names.values())
                names[key] = f"{op.kind}_{before + 1}" if before else op.kind
        return names

    def _constant_operators(self) -> Iterator[Op]:
        for graph in self._versions(self.compiled.lowered.root):
            for op in graph.walk():
                if len(op.attrs) >= MANY_CONSTANTS and not op.symbols and not op.regions:
                    yield op

    def constants(self) -> list[str]:
        """The lines that bind operators to their constants."""
        lines: list[str] = []
        done: set[str] = set()
        for op in self._constant_operators():
            name = self.bound.get(constants(op))
            if name and name not in done:
                done.add(name)
                given = ((f"{a}=", self.sizes.number(a, v)) for a, v in op.attrs.items())
                call = Call("partial(", (("", f"F.{op.kind}"), *given))
                lines += lay_out(f"{name} = ", call)
        return lines

    def root(self) -> Root:
        lowered = self.compiled.lowered
        aliases = tuple(
            (f"{c!r}: ".replace("'", '"'), f'"{o}"') for c, o in lowered.aliases.items()
        )
        return Root(
            about=docstring(lowered.main.about),
            aliases=lay_out("", Call("{", aliases, "}")),
            declarations=self._declarations(lowered.main, self.sizes),
            forward=self._forward(),
            loss=self._loss(),
            prefill=self._logits("prefill"),
            decode=self._logits("decode"),
            parts=[self._segment_method(g) for g in self._segment_graphs()],
        )

    def _segment_graphs(self) -> Iterator[Graph]:
        """The parts of the outermost block, each with its gradients behind it."""
        for name in self.segments:
            yield self.train.graphs[name]
            backward = self.train.backward_of(name)
            if backward is not None:
                yield backward

    def _body(self, program: str) -> tuple[Graph, list[str], dict[str, list[str]]]:
        """Graph, lines, and the Python names of each output."""
        graph = self.compiled.programs[program].main
        emitter = Emitter(graph, self._context(program, graph.name))
        lines = emitter.body()
        names: dict[str, list[str]] = {}
        for name, result in zip(graph.result_names, emitter.results(), strict=True):
            names.setdefault(name, []).append(result)
        return graph, [*_defaults(graph, program), *lines], names

    def _forward(self) -> list[str]:
        _, lines, names = self._body("forward")
        mtp = _tuple(names.get("mtp_logits", []))
        return [*lines, f"return Output(logits={names['logits'][0]}, mtp_logits={mtp})"]

    def _loss(self) -> list[str]:
        _, lines, names = self._body("train")
        fields = (
            ("total=", names["total"][0]),
            ("main=", names["main"][0]),
            ("mtp=", _tuple(names.get("mtp", []))),
            ("balance=", names["balance"][0]),
            ("load=", _tuple(names.get("load", []))),
        )
        return [*lines, *lay_out("return ", Call("Loss(", fields))]

    def _logits(self, program: str) -> list[str]:
        _, lines, names = self._body(program)
        return [*lines, f"return {names['logits'][0]}"]


def _free(name: str, taken: Iterable[str]) -> str:
    """A name that is not taken: with one more `_` where it is."""
    return f"{name}_" if name in taken else name


def _written(
    name: str,
    emitter: Emitter,
    trailing: Sequence[str] = (),
    optional: Sequence[int] | None = None,
) -> Method:
    """The method of a graph. Results that are not in `optional` may be None, where it is given."""
    graph = emitter.graph
    arguments = ["self", *(f"{emitter.names[v]}: Tensor" for v in graph.args)]
    arguments += [TRAILING[one] for one in trailing]
    lines = emitter.body()
    results = emitter.results()
    types = [
        "Tensor" if optional is None or i in optional else "Tensor | None"
        for i in range(len(results))
    ]
    returns = types[0] if len(types) == 1 else f"tuple[{', '.join(types)}]"
    if results:
        lines = [*lines, f"return {', '.join(results)}"]
    lines = lines or ["pass  # nothing here depends on a weight"]
    return Method(name, arguments, returns if results else "None", lines)


def _defaults(graph: Graph, program: str) -> list[str]:
    """Arguments of the outermost block that the caller of a method may leave out or never gives."""
    lines = []
    for value in graph.args:
        if value.name == "position" and program in ("forward", "train"):
            lines.append("position = F.positions(tokens) if position is None else position")
        elif value.name in ("mtp_weight", "balance_alpha"):
            lines.append(f"{value.name} = {WEIGHTS[value.name]}")
    return lines


WEIGHTS = {
    "mtp_weight": "config.train.loss.mtp_weight.value_at(tokens_seen)",
    "balance_alpha": "config.train.loss.balance_alpha",
}


def _numbers(value: Sequence[int]) -> str:
    return f"({', '.join(map(str, value))}{',' if len(value) == 1 else ''})"


def _tuple(names: list[str]) -> str:
    return "()" if not names else f"({', '.join(names)}{',' if len(names) == 1 else ''})"


def _cached(program: Program) -> list[str]:
    """Graphs that keep something, or call one that does; callees stand before callers."""
    found: list[str] = []
    for graph in program.graphs.values():
        if any(op.kind == "cache_append" for op in graph.walk()) or any(
            callee in found for callee in graph.calls()
        ):
            found.append(graph.name)
    return found


def docstring(text: str) -> str:
    """Text that may stand between three quotes: nothing in it can end them or escape."""
    text = "".join(c if c == "\n" or c.isprintable() else " " for c in text)
    text = "\n".join(textwrap.fill(line, 92) for line in text.split("\n")).strip()
    # Lines first, so that none is cut between the two characters of an escape.
    text = text.replace("\\", "\\\\").replace('"""', "'''")
    return f"{text[:-1]}'" if text.endswith('"') else text


def _signature(graph: Graph, parameters: Sequence[str] = ()) -> str:
    """`x [batch, seq, 64], cos [batch, seq, 4] -> [batch, seq, 64]`, broken between arguments.

    Sizes are numbers, but for `parameters` of the class.
    """

    def shape(type: Type) -> str:
        sizes = (d.name if d.size is None or d.name in parameters else str(d.size)
                 for d in type.dims)  # fmt: skip
        return f"[{', '.join(sizes)}]"

    arguments = [f"{identifier(v.name)} {shape(v.type)}" for v in graph.args]
    text = ", ".join(a.replace(" ", "\0") for a in arguments)
    result = shape(graph.results[0].type).replace(" ", "\0")
    return textwrap.fill(f"{text} ->\0{result}", 92).replace("\0", " ")
