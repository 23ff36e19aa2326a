"""The records that fill `model.py.jinja`: one class a block, one method a program that differs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from backends.render import render
from backends.torch.classes import Class, class_names, joined
from backends.torch.declare import Declarations, joined_names, stored_name
from backends.torch.emit import Context, Emitter, Subgraph, TrainingEmitter, constants
from backends.torch.layout import CallText, lay_out
from backends.torch.methods import Methods
from backends.torch.prefix import common_prefix
from backends.torch.records import (
    ClassRecord,
    Method,
    Root,
    docstring,
    numbers_text,
    signature_text,
    tuple_text,
    written,
)
from backends.torch.sizes import PARAMS, Sizes
from backends.torch.statements import STATEMENTS
from compiler.graph.core import Graph, Op
from compiler.passes.draft import modules
from compiler.pipeline import Compiled

MANY_CONSTANTS = 5
"""An operator with as many attributes is bound once for the module if it occurs again."""


def model_py(
    compiled: Compiled,
    *,
    about: str,
    spec: str,
    version: str,
    dtype: str,
    params: Mapping[str, object],
    kernels: bool = False,
    cpu: bool = False,
) -> str:
    """Text of `model.py`; with `kernels` its functions come from that folder of the build, and with
    `cpu` it names the compiled step there.

    `params` are the parameters of the spec, by which numbers are called.
    """
    emit = Emission(compiled, dtype, params)
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
        uses_e5m6=_uses(compiled, "e5m6"),
        uses_fp8=_uses(compiled, "fp8", "quantize"),
        fp8_weights=_uses(compiled, "fp8_weight"),
        uses_extern=_uses_extern(compiled),
        uses_params=bool(re.search(rf"\b{PARAMS}\.", repr(facts))),
        kernels=kernels,
        cpu=cpu,
        lists="nn.ModuleList(" in made,
        **facts,
    )


def _uses(compiled: Compiled, *kinds: str) -> bool:
    """Whether any operator's name has one of these in it."""
    graphs = (g for program in compiled.programs.values() for g in program.graphs.values())
    found = {op.kind for graph in graphs for op in graph.walk()}
    return any(kind in one for kind in kinds for one in found)


def _uses_extern(compiled: Compiled) -> bool:
    return any("function" in op.attrs for g in compiled.lowered.graphs.values() for op in g.walk())


class Emission:
    """The classes of a model and the text of each method."""

    def __init__(self, compiled: Compiled, dtype: str, params: Mapping[str, object]) -> None:
        self.compiled = compiled
        self.dtype = dtype
        self.sizes = Sizes(params)
        self.train = compiled.programs["train"]
        self.served = Methods(compiled)
        self.blocks, self.units = self.served.blocks, self.served.units
        # joined[graph]: where its weights lie that are stored with others.
        self.joined = {
            name: joined_names(graph, self.served.versions(name))
            for name, graph in compiled.lowered.graphs.items()
        }
        self.bound = self._bound()
        self.classes: list[Class] = []
        # Callees stand before callers, whose code names the classes of what they hold.
        for graph in self.blocks.values():
            self.classes = joined(self.classes, graph, self.blocks, self._code)
        self.names = class_names(self.classes)

    # ---- which method serves which graph -----------------------------------------------------

    # ---- methods -----------------------------------------------------------------------------

    def context(self, program: str, graph: str, sizes: Sizes | None = None) -> Context:
        source = self.compiled.programs[program]
        segments = None
        if program == "train" and self.train.backward and graph == self.train.root:
            segments = {name: self._segment(name) for name in self.served.segments}
        return Context(
            STATEMENTS,
            self.served.callees[program],
            self.joined[self.served.owner(source, graph)],
            sizes or self.sizes,
            self.bound,
            segments,
        )

    def _segment(self, name: str) -> Subgraph:
        joined = self.joined[self.compiled.lowered.root]
        weights = dict.fromkeys(stored_name(w, joined) for w in self.train.graphs[name].weights)
        return Subgraph(tuple(weights), self._gradients(name))

    def _gradients(self, name: str) -> str:
        """The text of the `Gradients` of a graph."""
        derivative = self.train.derivatives[name]
        results, arguments = derivative.results, derivative.arguments
        return f"Gradients({numbers_text(results)}, {numbers_text(arguments)})"

    def block(self, one: Class) -> ClassRecord:
        return self._block(self.names[one.graph], one.graph, one.parameters)

    def _code(self, name: str, parameters: Iterable[str]) -> ClassRecord:
        return self._block("", name, tuple(parameters))

    def _block(self, name: str, graph: str, parameters: Sequence[str]) -> ClassRecord:
        """The class of a graph, which takes the sizes of some dimensions as arguments."""
        unit, lowered = graph in self.units, self.blocks[graph]
        programs = self.compiled.programs.values()
        shown = next((p.graphs[graph] for p in programs if graph in p.graphs), lowered)
        return ClassRecord(
            name=name,
            base="Unit" if unit else "Block",
            gradients=self._gradients(graph) if unit else "",
            about=docstring(lowered.about or graph),
            signature=signature_text(shown, parameters),
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
        programs = [p for p in self.compiled.programs if self.served.has_own(name, p)]
        graphs = [self.compiled.programs[p].graphs[name] for p in programs]
        members = {weight.split(".")[0] for weight in self.blocks[name].weights}
        prefix = common_prefix(_free("project", members), graphs) if len(graphs) > 1 else None
        if prefix is not None:
            context = self.context(programs[0], name, sizes)
            yield written(prefix.graph.name, Emitter(prefix.graph, context))
        for i, (program, graph) in enumerate(zip(programs, graphs, strict=True)):
            context = self.context(program, name, sizes)
            if prefix is not None:
                graph = prefix.rest[i]
                callees = {**context.callees, prefix.graph.name: prefix.callees[i]}
                context = replace(context, callees=callees)
            if program == "train" and self.served.derived(name):
                yield from self.training_methods(name, graph, context)
            else:
                callee = self.served.callees[program][name]
                yield written(callee.method or "forward", Emitter(graph, context), callee.trailing)

    def training_methods(self, name: str, graph: Graph, context: Context) -> Iterator[Method]:
        """The method of a block that serves scores and training, and that of its gradients."""
        scored = name in self.compiled.programs["forward"].graphs
        taken = self.served.taken(name, "forward") if scored else ()
        numbers = [i for i in range(len(graph.results)) if not taken or taken[i]]
        emitter = TrainingEmitter(graph, context, numbers)
        method = "compute" if name in self.units else "forward"
        yield written(method, emitter, ["optional"], numbers if taken else None)
        backward = self.train.graphs[self.train.derivatives[name].backward]
        context = replace(context, callees=self.served.callees["train"])
        saved = [emitter.names[v] for v in graph.saved]
        gradients = Emitter(backward, context, saves=True, saved=saved)
        yield written("backward", gradients, ("saved", "grads"))

    def _declarations(self, graph: Graph, sizes: Sizes) -> list[str]:
        made = {name: self._constructed(name) for name in self.blocks}
        return Declarations(graph, self.joined[graph.name], made, sizes, self.dtype).lines()

    def _constructed(self, name: str) -> str:
        """The expression that makes the module of a graph."""
        names = class_names(self.classes)
        own = next((one.arguments[name] for one in self.classes if name in one.arguments), {})
        given = (f"{d}={self.sizes.number(d, n)}" for d, n in own.items())
        return f"{names.get(name, name)}({', '.join(given)})"

    def segment_method(self, graph: Graph) -> Method:
        callee = self.served.callees["train"][graph.name]
        context = self.context("train", graph.name)
        emitter = Emitter(graph, context, saves="saved" in callee.trailing)
        return written(callee.method, emitter, callee.trailing)

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
        for graph in self.served.versions(self.compiled.lowered.root):
            for op in graph.walk():
                many = len(op.attrs) >= MANY_CONSTANTS
                many = many and not op.attrs.keys() & {"function", "also"}
                if many and not op.symbols and not op.regions:
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
                call = CallText("partial(", (("", f"F.{op.kind}"), *given))
                lines += lay_out(f"{name} = ", call)
        return lines

    def root(self) -> Root:
        lowered = self.compiled.lowered
        aliases = tuple(
            (f"{c!r}: ".replace("'", '"'), f'"{o}"') for c, o in lowered.aliases.items()
        )
        return Root(
            about=docstring(lowered.main.about),
            aliases=lay_out("", CallText("{", aliases, "}")),
            declarations=self._declarations(lowered.main, self.sizes),
            forward=self._forward(),
            loss=self._loss(),
            prefill=self._logits("prefill"),
            decode=self._logits("decode"),
            latent=any(
                op.kind == "latent_attention" and op.attrs.keys() == {"scale"}
                for graph in self.compiled.programs["decode"].graphs.values()
                for op in graph.walk()
            ),
            draft_offsets=numbers_text([module.offset for module in modules(lowered)]),
            drafts=[(name, self._logits(name)) for name in self.compiled.drafts],
            parts=[self.segment_method(g) for g in self.segment_graphs()],
        )

    def segment_graphs(self) -> Iterator[Graph]:
        """The parts of the outermost block, each followed by its gradients."""
        for name in self.served.segments:
            yield self.train.graphs[name]
            backward = self.train.backward_of(name)
            if backward is not None:
                yield backward

    def _body(self, program: str) -> tuple[Graph, list[str], dict[str, list[str]]]:
        """Graph, lines, and the Python names of each output."""
        graph = self.compiled.programs[program].main
        emitter = Emitter(graph, self.context(program, graph.name))
        lines = emitter.body()
        names: dict[str, list[str]] = {}
        for name, result in zip(graph.result_names, emitter.results(), strict=True):
            names.setdefault(name, []).append(result)
        return graph, [*defaults(graph, program), *lines], names

    def _forward(self) -> list[str]:
        _, lines, names = self._body("forward")
        mtp = tuple_text(names.get("mtp_logits", []))
        return [*lines, f"return Output(logits={names['logits'][0]}, mtp_logits={mtp})"]

    def _loss(self) -> list[str]:
        _, lines, names = self._body("train")
        fields = (
            ("total=", names["total"][0]),
            ("main=", names["main"][0]),
            ("mtp=", tuple_text(names.get("mtp", []))),
            ("balance=", names["balance"][0]),
            ("load=", tuple_text(names.get("load", []))),
        )
        return [*lines, *lay_out("return ", CallText("Loss(", fields))]

    def _logits(self, program: str) -> list[str]:
        _, lines, names = self._body(program)
        return [*lines, f"return {names['logits'][0]}"]


def _free(name: str, taken: Iterable[str]) -> str:
    """A name that is not taken: with one more `_` where it is."""
    return f"{name}_" if name in taken else name


def defaults(graph: Graph, program: str) -> list[str]:
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
