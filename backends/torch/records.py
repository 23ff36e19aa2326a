"""What fills `model.py.jinja`: classes and methods as text, and how single parts are written."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from backends.torch.emit import Emitter
from backends.torch.layout import WIDTH
from backends.torch.names import identifier
from compiler.graph.core import Graph
from compiler.graph.types import Type

# Arguments of methods after their tensors.
TRAILING = {
    "cache": "cache: Cache",
    "saved": "saved: Saved",
    "grads": "grads: Grads",
    "optional": "saved: Saved | None = None",
}


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
class ClassRecord:
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
    latent: bool
    """Whether it decodes in a latent space, by attention that the kernel for pages knows."""
    draft_offsets: str
    """From the position of a state to that which each MTP module counts from."""
    drafts: list[tuple[str, list[str]]]
    """Of each MTP module its method, and the lines of that."""
    parts: list[Method]


def written(
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


def numbers_text(value: Sequence[int]) -> str:
    return f"({', '.join(map(str, value))}{',' if len(value) == 1 else ''})"


def tuple_text(names: list[str]) -> str:
    return "()" if not names else f"({', '.join(names)}{',' if len(names) == 1 else ''})"


def docstring(text: str) -> str:
    """Text that may stand between three quotes: nothing in it can end them or escape."""
    text = "".join(c if c == "\n" or c.isprintable() else " " for c in text)
    text = "\n".join(textwrap.fill(line, 92) for line in text.split("\n")).strip()
    # Lines first, so that none is cut between the two characters of an escape.
    text = text.replace("\\", "\\\\").replace('"""', "'''")
    return f"{text[:-1]}'" if text.endswith('"') else text


def signature_text(graph: Graph, parameters: Sequence[str] = ()) -> str:
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
