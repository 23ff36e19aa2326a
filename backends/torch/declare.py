"""Statements that make a module's weights and submodules, named as in the published checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from backends.torch.layout import Call, lay_out
from backends.torch.names import class_name
from compiler.graph.core import Graph, Op, Weight, walk
from compiler.ops.control import Call as CallOp

TORCH_DTYPES = {"f32": "torch.float32", "i32": "torch.int32", "i64": "torch.int64"}


@dataclass
class Node:
    """A name in the tree of modules: a weight, a block, a list of blocks, or a group of names."""

    weight: Weight | None = None
    block: str = ""
    layers: list[tuple[str, int]] = field(default_factory=list)
    stack: int = 0
    children: dict[str, Node] = field(default_factory=dict)

    def at(self, *path: str) -> Node:
        node = self
        for part in path:
            node = node.children.setdefault(part, Node())
        return node


def tree(graph: Graph) -> Node:
    """What a module of `graph` holds, by name, in the order in which the equations need it."""
    root = Node()
    for op in walk(graph.ops):
        for symbol in op.symbols:
            path = symbol.split(".")
            weight = graph.weights[symbol]
            if "*" in path:
                star = path.index("*")
                stack = root.at(*path[:star])
                stack.stack = weight.stack
                stack.at(*path[star + 1 :]).weight = weight
            else:
                root.at(*path).weight = weight
        if op.kind == "repeat":
            _layers(root, op)
        elif op.kind == CallOp.kind:
            path = str(op.attrs["scope"]).split(".")
            if "*" in path:
                continue
            callee = str(op.attrs["callee"])
            if path[-1].isdigit():
                _place(root.at(*path[:-1]), int(path[-1]), callee)
            else:
                root.at(*path).block = callee
    return root


def _layers(root: Node, repeat: Op) -> None:
    start, count = repeat.attrs["start"], repeat.attrs["count"]
    assert isinstance(start, int) and isinstance(count, int)
    for op in repeat.regions[0].ops:
        if op.kind == "call":
            path = str(op.attrs["scope"]).split(".")
            _place(root.at(*path[:-1]), start, str(op.attrs["callee"]), count)


def _place(node: Node, index: int, callee: str, count: int = 1) -> None:
    """Appends layers; they come in ascending order, which the verifier has checked."""
    assert index == sum(n for _, n in node.layers), "layers of a list follow one another"
    node.layers.append((callee, count))


def declarations(graph: Graph, dtype: str) -> list[str]:
    """Lines of the constructor. `dtype` is the model's own element type."""
    lines: list[str] = []
    for name, node in tree(graph).children.items():
        lines += lay_out(f"self.{name} = ", _expression(node, dtype))
    return lines


def _expression(node: Node, dtype: str, stack: int = 0) -> Call | str:
    if node.weight is not None:
        return _weight(node.weight, dtype)
    if node.block:
        return f"{class_name(node.block)}()"
    if node.layers:
        return _list(node)
    items = [(f"{name}=", _expression(child, dtype)) for name, child in node.children.items()]
    if node.stack:
        return Call("Stack(", (("", str(node.stack)), *items))
    return Call("Tensors(", tuple(items))


def _list(node: Node) -> Call | str:
    items = [
        ("", f"{block}()" if count == 1 else f"*({block}() for _ in range({count}))")
        for block, count in ((class_name(b), n) for b, n in node.layers)
    ]
    return Call("nn.ModuleList([", tuple(items), "])")


def _weight(weight: Weight, dtype: str) -> str:
    sizes = [str(d.size) for d in weight.type.dims]
    if weight.stack > 1:
        sizes.insert(0, str(weight.stack))
    if weight.init == "normal":
        sizes.append(f"std={weight.std!r}")
    if weight.type.dtype != dtype:
        sizes.append(f"dtype={TORCH_DTYPES[weight.type.dtype]}")
    if not weight.trainable:
        sizes.append("buffer=True")
    return f"{weight.init}({', '.join(sizes)})"
