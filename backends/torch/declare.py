"""Statements that make a module's weights and submodules, named as in the published checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from backends.torch.layout import CallText, lay_out
from backends.torch.sizes import Sizes
from compiler.graph.core import Graph, Op, Weight, walk
from compiler.lower.names import TAKEN
from compiler.ops import OPS
from compiler.ops.control import Call

TORCH_DTYPES = {"f32": "torch.float32", "i32": "torch.int32", "i64": "torch.int64"}


@dataclass
class Node:
    """A name in the tree of modules: a weight, a block, a list of blocks, or a group of names.

    Of a `joined` node, the children are weights that it stores as one.
    """

    weight: Weight | None = None
    block: str = ""
    layers: list[tuple[str, int]] = field(default_factory=list)
    stack: int = 0
    joined: bool = False
    children: dict[str, Node] = field(default_factory=dict)

    def at(self, *path: str) -> Node:
        node = self
        for part in path:
            node = node.children.setdefault(part, Node())
        return node


def joined_names(graph: Graph, versions: Iterable[Graph]) -> dict[str, str]:
    """For each weight that is stored with others: the name of what stores them.

    `versions` are the graph in each program; those that use several weights in one product agree
    on which (`compiler/passes/fuse_projections.py`).
    """
    groups = {
        op.symbols: None
        for v in versions
        for op in v.walk()
        if len(op.symbols) > 1 and OPS[op.kind].symbols[0].endswith("*")
    }
    names: dict[str, str] = {}
    for symbols in groups:
        assert not names.keys() & set(symbols), "programs disagree on what is stored together"
        around = symbols[0].rsplit(".", 2)[0] if symbols[0].count(".") > 1 else ""
        within = f"{around}." if around else ""
        leaves = [symbol.removeprefix(within).removesuffix(".weight") for symbol in symbols]
        taken = TAKEN | _names_in(graph, within) | {n.removeprefix(within) for n in names.values()}
        name = base = folded(leaves)
        for n in range(2, len(taken) + 2):
            if name not in taken:
                break
            name = f"{base}_{n}"
        names.update(dict.fromkeys(symbols, within + name))
    return names


def stored_name(symbol: str, joined: Mapping[str, str]) -> str:
    """The name of the tensor that holds a weight, alone or with others; a `*` is the expert."""
    return f"{joined[symbol]}.weight" if symbol in joined else symbol


def attribute(name: str) -> str:
    """How code reaches what has this name: numbers are places in lists, `norm.0.weight`."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", name)


def folded(names: Sequence[str]) -> str:
    """One name for several; words that all begin or end with are said once: `gate_up_proj`."""
    words = [name.split("_") for name in names]
    before = _same(words)
    after = _same([w[before:][::-1] for w in words])
    middle = [word for w in words for word in w[before : len(w) - after]]
    first = words[0]
    return "_".join([*first[:before], *middle, *first[len(first) - after :]])


def _same(words: Sequence[Sequence[str]]) -> int:
    """How many words all begin with, while each keeps one of its own."""
    n = 0
    while min(map(len, words)) > n + 1 and len({w[n] for w in words}) == 1:
        n += 1
    return n


def _names_in(graph: Graph, within: str) -> set[str]:
    """What the group of names `within` holds: weights and blocks, or groups of them."""
    scopes = [op.text("scope") for op in graph.walk() if op.kind == Call.kind]
    inside = (n.removeprefix(within) for n in [*graph.weights, *scopes] if n.startswith(within))
    return {name.split(".")[0] for name in inside}


def tree(graph: Graph, joined: Mapping[str, str]) -> Node:
    """What a module of `graph` holds, by name, in the order in which the equations need it.

    `joined` is what `joined_names` gives.
    """
    root = Node()
    for op in walk(graph.ops):
        for symbol in op.symbols:
            _place_weight(root, graph.weights[symbol], symbol, joined.get(symbol))
        if op.kind == "repeat":
            _layers(root, op)
        elif op.kind == Call.kind:
            path = op.text("scope").split(".")
            if "*" in path:
                continue
            callee = op.callee
            if path[-1].isdigit():
                _place(root.at(*path[:-1]), int(path[-1]), callee)
            else:
                root.at(*path).block = callee
    return root


def _place_weight(root: Node, weight: Weight, symbol: str, joined: str | None) -> None:
    path = (joined or symbol).split(".")
    if "*" in path:
        star = path.index("*")
        stack = root.at(*path[:star])
        stack.stack = weight.stack
        node = stack.at(*path[star + 1 :])
    else:
        node = root.at(*path)
    if joined:
        node.joined = True
        node = node.at(symbol.split(".")[-2])
    node.weight = weight


def _layers(root: Node, repeat: Op) -> None:
    start, count = repeat.number("start"), repeat.number("count")
    for op in repeat.regions[0].ops:
        if op.kind == "call":
            path = op.text("scope").split(".")
            _place(root.at(*path[:-1]), start, op.callee, count)


def _place(node: Node, index: int, callee: str, count: int = 1) -> None:
    """Appends layers; they come in ascending order, which the verifier has checked."""
    assert index == sum(n for _, n in node.layers), "layers of a list follow one another"
    node.layers.append((callee, count))


@dataclass(frozen=True)
class Declarations:
    """The constructor of the module of one graph.

    `joined` is what `joined_names` gives; `made` how the module of a called graph is constructed;
    `dtype` the model's own element type.
    """

    graph: Graph
    joined: Mapping[str, str]
    made: Mapping[str, str]
    sizes: Sizes
    dtype: str

    def lines(self) -> list[str]:
        lines: list[str] = []
        for name, node in tree(self.graph, self.joined).children.items():
            lines += lay_out(f"self.{name} = ", self._expression(node))
        return lines

    def _expression(self, node: Node) -> CallText | str:
        if node.weight is not None:
            return self._weight(node.weight)
        if node.block:
            return self.made[node.block]
        if node.layers:
            return self._list(node)
        if "0" in node.children:
            items = [("", self._expression(child)) for child in node.children.values()]
            return CallText("nn.ModuleList([", tuple(items), "])")
        items = [(f"{name}=", self._expression(child)) for name, child in node.children.items()]
        if node.stack:
            return CallText("Stack(", (("", self._stack(node)), *items))
        return CallText("Joined(" if node.joined else "Tensors(", tuple(items))

    def _list(self, node: Node) -> CallText | str:
        items = [
            ("", made if count == 1 else f"*({made} for _ in range({count}))")
            for made, count in ((self.made[block], n) for block, n in node.layers)
        ]
        return CallText("nn.ModuleList([", tuple(items), "])")

    def _stack(self, node: Node) -> str:
        """How many experts there are, by the name that the dimension has in the equations."""
        named = (
            self.sizes.of(dim)
            for op in walk(self.graph.ops)
            for value in op.results
            for dim in value.type.dims
            if dim.size == node.stack
        )
        return next((text for text in named if not text.isdigit()), str(node.stack))

    def _weight(self, weight: Weight) -> str:
        arguments = [self.sizes.of(d) for d in weight.type.dims]
        if weight.stack > 1:
            arguments.insert(0, self._stack(Node(stack=weight.stack)))
        if weight.init == "normal":
            arguments.append(f"std={weight.std!r}")
            if weight.value:
                arguments.append(f"mean={weight.value!r}")
        if weight.type.dtype != self.dtype:
            arguments.append(f"dtype={TORCH_DTYPES[weight.type.dtype]}")
        if not weight.trainable:
            arguments.append("buffer=True")
        if weight.fp8:
            arguments.append(f'fp8="{weight.fp8_scale}"')
        if not weight.decay and len(weight.type.dims) > 1:  # vectors never do
            arguments.append("decay=False")
        return f"{weight.init}({', '.join(arguments)})"
