"""The records that fill `model.py.jinja`: one class a block, one method a program that differs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from backends.render import render
from backends.torch.declare import declarations, joined_names, stored_name
from backends.torch.emit import Emitter, Part
from backends.torch.layout import WIDTH, Call, lay_out
from backends.torch.names import class_name, identifier
from backends.torch.statements import STATEMENTS
from compiler.graph.core import Graph, Program
from compiler.graph.equal import equal_graphs
from compiler.graph.types import Type
from compiler.pipeline import Compiled

# Programs and their methods, in the order in which a class lists them; a graph that equals that of
# an earlier program is served by its method.
METHODS = {"forward": "forward", "train": "loss", "prefill": "prefill", "decode": "decode"}
PROGRAMS = tuple(METHODS)


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
        if len(line) + len("    ") <= WIDTH:
            return [line]
        return [begin, *(f"    {argument}," for argument in self.arguments), end]


@dataclass(frozen=True)
class Block:
    """A generated class."""

    name: str
    about: str
    base: str
    signature: str
    gradients: str
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
    compiled: Compiled, *, about: str, spec: str, version: str, dtype: str, kernels: bool = False
) -> str:
    """Text of `model.py`; with `kernels` its functions come from that folder of the build."""
    emit = _Emission(compiled, dtype)
    blocks = [
        emit.block(g) for g in compiled.lowered.graphs.values() if g is not compiled.lowered.main
    ]
    root = emit.root()
    made = "\n".join([*root.declarations, *(line for b in blocks for line in b.declarations)])
    helpers = ["Joined", "Stack", "Tensors", "normal", "ones", "zeros"]
    imports = [*(["Block"] if any(b.base == "Block" for b in blocks) else [])]
    imports += [name for name in helpers if f"{name}(" in made]
    return render(
        "torch/model.py.jinja",
        about=docstring(about or "A language model."),
        spec=docstring(spec),
        version=version,
        imports=imports,
        units=emit.units,
        uses_fp8=_uses_fp8(compiled),
        kernels=kernels,
        lists="nn.ModuleList(" in made,
        blocks=blocks,
        root=root,
    )


def _uses_fp8(compiled: Compiled) -> bool:
    graphs = (g for program in compiled.programs.values() for g in program.graphs.values())
    return any("fp8" in op.kind for graph in graphs for op in graph.walk())


class _Emission:
    def __init__(self, compiled: Compiled, dtype: str) -> None:
        self.compiled = compiled
        self.dtype = dtype
        # methods[program][graph]: the method that computes this graph of this program.
        self.methods: dict[str, dict[str, str]] = {p: {} for p in PROGRAMS}
        # trailing[program][graph]: what its methods pass on behind their tensors.
        self.trailing: dict[str, dict[str, list[str]]] = {
            p: {name: ["cache"] for name in _cached(compiled.programs[p])} for p in PROGRAMS
        }
        self.train = compiled.programs["train"]
        # Blocks that autograd sees as one function each: what the outermost block calls.
        self.units = [n for n in self._called() if self.train.backward and n in self._blocks()]
        for name in compiled.lowered.graphs:
            self._choose_methods(name)
        if self.train.backward:
            self._choose_derived()
        for name in self._called():
            self.methods["train"].setdefault(name, self._part_name(name))
        # joined[graph]: where its weights lie that are stored with others.
        self.joined = {
            name: joined_names(graph, self._versions(name))
            for name, graph in compiled.lowered.graphs.items()
        }

    def _versions(self, block: str) -> Iterator[Graph]:
        """The graph of a block in each program, and its parts and their gradients."""
        for program in self.compiled.programs.values():
            yield from (g for g in program.graphs.values() if self._owner(program, g.name) == block)

    def _owner(self, program: Program, graph: str) -> str:
        """The block whose weights a graph uses: what is no block is a part of the outermost one."""
        block = program.forward_of(graph)
        return block if block in self._blocks() else self.compiled.lowered.root

    def _called(self) -> list[str]:
        return list(self.train.main.calls())

    def _blocks(self) -> dict[str, Graph]:
        """Graphs that a class is made of; the parts of the outermost block are methods of it."""
        return self.compiled.lowered.graphs

    def _choose_derived(self) -> None:
        """Methods in training, where a backward pass was derived: what is kept is passed along."""
        for name in self.train.graphs:
            forward = self.train.forward_of(name)
            backward = forward != name
            self.trailing["train"][name] = ["kept", "grads"] if backward else ["kept"]
            if forward in self._blocks():
                self.methods["train"][name] = "backward" if backward else "loss"
            else:
                self.methods["train"][name] = self._part_name(name)

    def _part_name(self, graph: str) -> str:
        """The method of the outermost block that computes a part of it."""
        return graph.removeprefix(f"{self.train.root}_")

    def _choose_methods(self, name: str) -> None:
        seen: list[tuple[str, Graph]] = []
        for program in PROGRAMS:
            graph = self.compiled.programs[program].graphs.get(name)
            if graph is None:
                continue
            same = next((m for m, g in seen if self._same(m, g, program, graph)), None)
            self.methods[program][name] = METHODS[same or program]
            if same is None:
                seen.append((program, graph))

    def _same(self, program_a: str, a: Graph, program_b: str, b: Graph) -> bool:
        """Equal, and calling equal methods."""
        callees = list(a.calls())
        return equal_graphs(a, b) and all(
            self.methods[program_a][c] == self.methods[program_b][c] for c in callees
        )

    def _emitter(self, program: str, graph: Graph) -> Emitter:
        units = None
        if program == "train" and self.train.backward and graph is self.train.main:
            units = {n: self._part(n) for n in self._called() if n not in self._blocks()}
        joined = self.joined[self._owner(self.compiled.programs[program], graph.name)]
        return Emitter(
            graph, STATEMENTS, self.methods[program], self.trailing[program], joined, units
        )

    def _part(self, name: str) -> Part:
        joined = self.joined[self._owner(self.train, name)]
        weights = dict.fromkeys(stored_name(w, joined) for w in self.train.graphs[name].weights)
        return Part(tuple(weights), self._gradients(name))

    def _gradients(self, name: str) -> str:
        """The text of the `Gradients` of a graph."""
        derivative = self.train.derivatives[name]
        return f"Gradients({_numbers(derivative.results)}, {_numbers(derivative.arguments)})"

    def block(self, graph: Graph) -> Block:
        methods, versions = [], []
        for program in PROGRAMS:
            version = self.compiled.programs[program].graphs.get(graph.name)
            if version is not None and (self.methods[program][graph.name] == METHODS[program]):
                methods.append(self._method(program, version))
                versions.append(version)
            if program == "train" and (backward := self.train.backward_of(graph.name)):
                methods.append(self._method(program, backward))
        unit = graph.name in self.units
        if unit:  # `forward` is the unit's own
            methods = [replace(m, name="evaluate") if m.name == "forward" else m for m in methods]
        return Block(
            name=class_name(graph.name),
            base="Unit" if unit else "Block",
            gradients=self._gradients(graph.name) if unit else "",
            about=docstring(graph.about or graph.name),
            signature=_signature(versions[0] if versions else graph),
            declarations=declarations(graph, self.joined[graph.name], self.dtype),
            methods=methods,
        )

    def _method(self, program: str, graph: Graph) -> Method:
        emitter = self._emitter(program, graph)
        arguments = ["self", *(f"{emitter.names[v]}: Tensor" for v in graph.args)]
        trailing = self.trailing[program].get(graph.name, ())
        arguments += [f"{name}: {name.capitalize()}" for name in trailing]
        lines = emitter.body()
        results = emitter.results()
        returns = (
            "Tensor" if len(results) == 1 else f"tuple[{', '.join(['Tensor'] * len(results))}]"
        )
        if results:
            lines = [*lines, f"return {', '.join(results)}"]
        lines = lines or ["pass  # nothing here depends on a weight"]
        name = self.methods[program][graph.name]
        return Method(name, arguments, returns if results else "None", lines)

    def root(self) -> Root:
        lowered = self.compiled.lowered
        aliases = tuple(
            (f"{c!r}: ".replace("'", '"'), f'"{o}"') for c, o in lowered.aliases.items()
        )
        return Root(
            about=docstring(lowered.main.about),
            aliases=lay_out("", Call("{", aliases, "}")),
            declarations=declarations(lowered.main, self.joined[lowered.root], self.dtype),
            forward=self._forward(),
            loss=self._loss(),
            prefill=self._logits("prefill"),
            decode=self._logits("decode"),
            parts=[self._method("train", g) for g in self._parts()],
        )

    def _parts(self) -> Iterator[Graph]:
        """The parts of the outermost block, each with its gradients behind it."""
        for name in self._called():
            if name not in self._blocks():
                yield self.train.graphs[name]
                backward = self.train.backward_of(name)
                if backward is not None:
                    yield backward

    def _body(self, program: str) -> tuple[Graph, list[str], dict[str, list[str]]]:
        """Graph, lines, and the Python names of each output."""
        graph = self.compiled.programs[program].main
        emitter = self._emitter(program, graph)
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


def _signature(graph: Graph) -> str:
    """`x [batch, seq, 64], cos [batch, seq, 4] -> [batch, seq, 64]`, broken between arguments."""
    arguments = [f"{identifier(v.name)} {_shape(v.type)}" for v in graph.args]
    text = ", ".join(a.replace(" ", "\0") for a in arguments)
    result = _shape(graph.results[0].type).replace(" ", "\0")
    return textwrap.fill(f"{text} ->\0{result}", 92).replace("\0", " ")


def _shape(type: Type) -> str:
    return "[" + ", ".join(str(d.size) if d.size is not None else str(d) for d in type.dims) + "]"
