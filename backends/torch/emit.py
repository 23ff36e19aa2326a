"""Operators to Python statements: one statement each, with its equation in the margin."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from backends.torch.declare import TORCH_DTYPES, stored_name
from backends.torch.layout import WIDTH, lay_out, parse_call
from backends.torch.names import Names, identifier
from compiler.graph.core import Attr, Graph, Op
from compiler.graph.types import Type
from compiler.ops.base import dims_of
from compiler.ops.quantize import parts_attr

MARGIN = 62  # column of the remarks, where there is room


@dataclass(frozen=True)
class Part:
    """What autograd is told of a part of the outermost block: its weights and `Gradients`."""

    weights: tuple[str, ...]
    gradients: str


class Emitter:
    """Statements of one graph.

    `methods` says by which method each called graph is to be reached, `trailing` what those of a
    program pass on: the cache, what is kept; `joined` is what `joined_names` gives. Given `units`,
    calls are made in the way of autograd (`runtime/unit.py`): each graph with its weights and its
    derivative's `Gradients`.
    """

    def __init__(
        self,
        graph: Graph,
        methods: Mapping[str, str],
        trailing: Mapping[str, Sequence[str]],
        joined: Mapping[str, str],
        units: Mapping[str, Part] | None = None,
    ) -> None:
        self.graph = graph
        self.methods = methods
        self.trailing = trailing
        self.joined = joined
        self.units = units
        self.names = Names(graph)
        self.parts: dict[str, str] = {}  # weight of all experts: the name of its parts
        self.lines: list[str] = []
        self.indent = 0
        self._comment = ""

    def body(self) -> list[str]:
        """Lines of the method without its `return`."""
        for op in self.graph.ops[:-1]:
            self.statement(op)
        return self.lines

    def results(self) -> list[str]:
        return [self.names[v] for v in self.graph.results]

    # ---- lines ----------------------------------------------------------------------------

    def line(self, text: str) -> None:
        """Adds a line; the comment of the block's line stands beside it where there is room."""
        text = "    " * self.indent + text
        comment, self._comment = self._comment, ""
        lines = wrap(text)
        if comment and len(lines) == 1 and len(text) + len(comment) + 4 <= WIDTH:
            lines = [f"{text:<{MARGIN}}  # {comment}"]
            if len(lines[0]) > WIDTH:
                lines = [f"{text}  # {comment}"]
        elif comment:
            lines.insert(0, f"{'    ' * self.indent}# {comment}")
        self.lines += lines

    def assign(self, op: Op, expression: str) -> None:
        if not op.results:
            self.line(expression)
            return
        targets = ", ".join([self.names.give(v, op) for v in op.results])
        self.line(f"{targets} = {expression}")

    def statement(self, op: Op) -> None:
        self.remark(op)
        EMIT[op.kind](self, op)

    def remark(self, op: Op) -> None:
        """Puts the place of `op` in the block beside the next line, where it stands for one."""
        self._comment = "" if op.kind in ("keep", "kept", "accumulate_grad") else margin(op)

    # ---- pieces of expressions ---------------------------------------------------------------

    def operand(self, op: Op, index: int) -> str:
        return self.names[op.operands[index]]

    def operands(self, op: Op) -> str:
        return ", ".join(self.names[v] for v in op.operands)

    def dtype(self, name: Attr) -> str:
        """An element type as torch calls it; the model's own is that of the model at hand."""
        return TORCH_DTYPES.get(str(name)) or self._model_dtype()

    def _model_dtype(self) -> str:
        """The element type of the model at hand, which may be another one than the spec's."""
        like = [self.names[v] for v in self.graph.args if v.type.dtype == "bf16"]
        like += [
            self.weight(name)
            for name, weight in self.graph.weights.items()
            if weight.type.dtype == "bf16" and "*" not in name
        ]
        return f"{like[0]}.dtype" if like else "torch.bfloat16"

    def stored(self, op: Op) -> str:
        """The stored tensor of an operator's weights; of all experts where it is for all."""
        return f"self.{stored_name(op.symbols[0], self.joined).replace('.*.', '.')}"

    def weight(self, symbol: str) -> str:
        """The stored tensor, or the part of it that belongs to the expert at hand."""
        name = stored_name(symbol, self.joined)
        if name in self.parts:
            return f"{self.parts[name]}[expert]"
        return f"self.{name}"


def margin(op: Op) -> str:
    """What stands beside a statement: the remark of the block's line, and the line itself."""
    if not op.spans:
        return ""
    span = op.spans[0]
    last_line = span.source.position(max(span.start, span.end - 1))[0]
    _, _, remark = span.source.line(last_line).partition("#")
    place = f"{span.source.name.rsplit('/', 1)[-1]}:{span.line}"
    text = f"{place}  {remark.strip()}" if remark.strip() else place
    return re.sub(r"[^\x20-\x7e]", "?", text)


def wrap(text: str) -> list[str]:
    """A line that is too long, broken at the arguments of its call."""
    if len(text) <= WIDTH:
        return [text]
    body = text.lstrip()
    target, equals, expression = body.rpartition(" = ")
    return lay_out(f"{target}{equals}", parse_call(expression), len(text) - len(body))


def literal(value: Attr) -> str:
    """A number, flag or word as Python text."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


# ---- one function an operator ---------------------------------------------------------------

Emit = Callable[[Emitter, Op], None]


def _call_g(name: str, *attrs: str) -> Emit:
    """`G.name(operands, weights, attr=..)`: derivatives."""
    return _call_f(name, *attrs, module="G")


def _call_f(name: str, *attrs: str, module: str = "F") -> Emit:
    """`F.name(operands, weights, attr=..)`."""

    def emit(e: Emitter, op: Op) -> None:
        parts = [e.names[v] for v in op.operands] + [e.weight(s) for s in op.symbols]
        parts += [f"{a}={literal(op.attrs[a])}" for a in attrs]
        e.assign(op, f"{module}.{name}({', '.join(parts)})")

    return emit


def _infix(operator: str) -> Emit:
    def emit(e: Emitter, op: Op) -> None:
        e.assign(op, f"{e.operand(op, 0)} {operator} {e.operand(op, 1)}")

    return emit


def _linear(e: Emitter, op: Op) -> None:
    weight = e.weight(op.symbols[0])
    # A gate is computed in float32 whatever the element type of its weight.
    if op.operands[0].type.dtype != e.graph.weights[op.symbols[0]].type.dtype:
        weight = f"{weight}.float()"
    e.assign(op, f"F.linear({e.operand(op, 0)}, {weight})")


def _topk_groups(e: Emitter, op: Op) -> None:
    bias = e.weight(op.symbols[0]) if op.symbols else "None"
    (k,) = dims_of(op.attrs["k"])
    numbers = [f"{a}={literal(op.attrs[a])}" for a in ("n_group", "topk_group")]
    rest = [f"{a}={literal(op.attrs[a])}" for a in ("group_score", "normalize", "scale")]
    arguments = [e.operand(op, 0), bias, *numbers, f"k={k.size}", *rest]
    e.assign(op, f"F.topk_groups({', '.join(arguments)})")


def _experts(e: Emitter, op: Op) -> None:
    x, route, weight = (e.names[v] for v in op.operands)
    (region,) = op.regions
    symbols = (s for o in region.ops for s in o.symbols)
    for name in dict.fromkeys(stored_name(s, e.joined) for s in symbols):
        path, inside = name.split(".*.", 1)
        e.parts[name] = e.names.keep(f"{inside.replace('.', '_')}s")
        e.line(f"{e.parts[name]} = self.{path}.{inside}.unbind()")
    y = e.names.give(op.result, op, beside_operands=True)
    e.remark(op)
    e.line(f"{y} = torch.zeros_like({x})")
    e.line(f"for expert, chosen in enumerate(F.dispatch({route}, {op.attrs['count']})):")
    e.indent += 1
    z = e.names.share(region.args[0], identifier(region.args[0].name))
    e.line(f"{z} = F.gather_tokens({x}, chosen)")
    for inner in region.ops[:-1]:
        e.statement(inner)
    out = e.names[region.yielded[0]]
    e.line(f"F.add_tokens({y}, chosen, {out}, {weight})")
    e.indent -= 1


def _permute(e: Emitter, op: Op) -> None:
    (count,) = dims_of(op.attrs["count"])
    e.assign(op, f"F.permute({e.operands(op)}, {count.size})")


def _grouped_linear(e: Emitter, op: Op) -> None:
    e.assign(op, f"F.grouped_linear({e.operands(op)}, {e.stored(op)})")


def _call_fp8(name: str, *attrs: str) -> Emit:
    """`fp8.name(operands, attr=..)`; products say in which element type they give their result."""

    def emit(e: Emitter, op: Op) -> None:
        parts = [e.names[v] for v in op.operands]
        parts += [f"{a}={literal(op.attrs[a])}" for a in attrs]
        if op.attrs.get("parts"):
            parts.append(f"parts={op.attrs['parts']}")
        if "dtype" in op.attrs:
            parts.append(f"dtype={e.dtype(op.attrs['dtype'])}")
        e.assign(op, f"fp8.{name}({', '.join(parts)})")

    return emit


def _quantize_weight(e: Emitter, op: Op) -> None:
    arguments = [e.stored(op) if op.attrs["experts"] else e.weight(op.symbols[0])]
    arguments.append(f"scale={literal(op.attrs['scale'])}")
    parts = parts_attr([e.graph.weights[s].type.dims[0].size or 0 for s in op.symbols])
    if parts:
        arguments.append(f"parts={parts}")
    e.assign(op, f"fp8.quantize_weight({', '.join(arguments)})")


def _permute_quantized(e: Emitter, op: Op) -> None:
    (count,) = dims_of(op.attrs["count"])
    e.assign(op, f"fp8.permute({e.operands(op)}, {count.size})")


def _head_linear(e: Emitter, op: Op) -> None:
    (rows,) = dims_of(op.attrs["rows"])
    start = op.attrs["start"]
    assert isinstance(start, int)
    arguments = [
        e.operand(op, 0),
        e.weight(op.symbols[0]),
        f"({start}, {start + (rows.size or 0)})",
    ]
    arguments.append(f"transposed={op.attrs['transposed']}")
    e.assign(op, f"F.head_linear({', '.join(arguments)})")


def _expert_load(e: Emitter, op: Op) -> None:
    (count,) = dims_of(op.attrs["count"])
    e.assign(op, f"F.expert_load({e.operand(op, 0)}, {count.size})")


def _split(e: Emitter, op: Op) -> None:
    sizes = [d.size for d in dims_of(op.attrs["into"])]
    e.assign(op, f"{e.operand(op, 0)}.split({sizes}, dim=-1)")


def _concat(e: Emitter, op: Op) -> None:
    e.assign(op, f"torch.cat([{e.operands(op)}], dim=-1)")


def _flatten(e: Emitter, op: Op) -> None:
    e.assign(op, f"{e.operand(op, 0)}.flatten(-{len(dims_of(op.attrs['dims']))})")


def _unflatten(e: Emitter, op: Op) -> None:
    sizes = tuple(d.size for d in dims_of(op.attrs["dims"]))
    e.assign(op, f"{e.operand(op, 0)}.unflatten(-1, {sizes})")


def _broadcast(e: Emitter, op: Op) -> None:
    (dim,) = dims_of(op.attrs["dim"])
    x, rank = e.operand(op, 0), len(op.result.type.dims)
    sizes = ", ".join(["-1"] * (rank - 2) + [str(dim.size), "-1"])
    e.assign(op, f"{x}.unsqueeze(-2).expand({sizes})")


def _index_of(type: Type, dim: Attr) -> int:
    return [d.name for d in type.dims].index(str(dim))


def _drop_first(e: Emitter, op: Op) -> None:
    at = _index_of(op.operands[0].type, op.attrs["dim"])
    e.assign(op, f"{e.operand(op, 0)}[{':, ' * at}{op.attrs['count']}:]")


def _drop_last(e: Emitter, op: Op) -> None:
    at = _index_of(op.operands[0].type, op.attrs["dim"])
    e.assign(op, f"{e.operand(op, 0)}[{':, ' * at}:-{op.attrs['count']}]")


def _last_entry(e: Emitter, op: Op) -> None:
    at = _index_of(op.operands[0].type, "seq")
    e.assign(op, f"{e.operand(op, 0)}[{':, ' * at}-1]")


def _cast(e: Emitter, op: Op) -> None:
    e.assign(op, f"{e.operand(op, 0)}.to({e.dtype(op.attrs['dtype'])})")


def _scale(e: Emitter, op: Op) -> None:
    e.assign(op, f"{e.operand(op, 0)} * {literal(op.attrs['by'])}")


def _constant(e: Emitter, op: Op) -> None:
    e.assign(op, f"torch.tensor({literal(op.attrs['value'])})")


def _sum(e: Emitter, op: Op) -> None:
    e.assign(op, f"{e.operand(op, 0)}.sum()")


def _cache_append(e: Emitter, op: Op) -> None:
    names = op.attrs["entries"]
    assert isinstance(names, tuple)
    entries = [
        f"{identifier(str(n))}={e.names[v]}" for n, v in zip(names, op.operands, strict=True)
    ]
    targets = [e.names.give(v, op) for v in op.results]
    left = ", ".join(targets) + ("," if len(targets) == 1 else "")
    e.line(f"{left} = cache.append(self, {', '.join(entries)})")


def _call_graph(e: Emitter, op: Op, module: str) -> None:
    callee = str(op.attrs["callee"])
    arguments = [e.names[v] for v in op.operands]
    if e.units is not None and callee in e.units:
        _call_part(e, op, e.units[callee], arguments)
        return
    if e.units is not None:
        e.assign(op, f"{module}({', '.join([*arguments, 'train=True'])})")
        return
    method = e.methods[callee]
    arguments += e.trailing.get(callee, ())
    function = module if method == "forward" else f"{module}.{method}"
    e.assign(op, f"{function}({', '.join(arguments)})")


def _call_part(e: Emitter, op: Op, part: Part, arguments: Sequence[str]) -> None:
    name = e.methods[str(op.attrs["callee"])]
    methods = [f"self.{name}", f"self.{name}_backward"]
    weights = f"[{', '.join(f'self.{w}' for w in part.weights)}]"
    e.assign(op, f"differentiable({', '.join([*methods, part.gradients, weights, *arguments])})")


def _call(e: Emitter, op: Op) -> None:
    if not op.attrs["scope"]:
        _call_graph(e, op, "self")
        return
    scope = str(op.attrs["scope"]).split(".")
    if scope[-1] == "*":
        _call_graph(e, op, "layer")
        return
    module = "self"
    for part in scope:
        module += f"[{part}]" if part.isdigit() else f".{part}"
    _call_graph(e, op, module)


def _keep(e: Emitter, op: Op) -> None:
    if e.units is not None:  # autograd takes care of what is between the units
        return
    e.line(f"kept.keep(self, {e.operands(op)})")


def _kept(e: Emitter, op: Op) -> None:
    if not op.results:
        return
    targets = [e.names.give(v, op) for v in op.results]
    left = f"({targets[0]},)" if len(targets) == 1 else ", ".join(targets)
    e.line(f"{left} = kept.take(self)")


def _accumulate_grad(e: Emitter, op: Op) -> None:
    e.line(f"grads.add({e.stored(op)}, {e.operand(op, 0)})")


def _linear_input_grad(e: Emitter, op: Op) -> None:
    weight = e.stored(op)
    if op.operands[0].type.dtype != e.graph.weights[op.symbols[0]].type.dtype:
        weight = f"{weight}.float()"
    e.assign(op, f"G.{op.kind}({', '.join([e.operands(op), weight])})")


def _linear_cross_entropy(e: Emitter, op: Op) -> None:
    if "kept" not in e.trailing.get(e.graph.name, ()):  # autograd has to find its way
        x, labels = (e.names[v] for v in op.operands)
        loss = e.names.give(op.results[0], op)
        e.line(f"{loss} = F.cross_entropy(F.linear({x}, {e.stored(op)}), {labels})")
        return
    arguments = [e.operands(op), e.stored(op), "gradients=kept.wanted"]
    e.assign(op, f"G.linear_cross_entropy({', '.join(arguments)})")


def _embedding_grad(e: Emitter, op: Op) -> None:
    (rows,) = dims_of(op.attrs["rows"])
    e.assign(op, f"G.embedding_grad({e.operands(op)}, {rows.size})")


def _sum_over(e: Emitter, op: Op) -> None:
    (dim,) = dims_of(op.attrs["dim"])
    type = op.operands[0].type
    e.assign(op, f"{e.operand(op, 0)}.sum({_index_of(type, dim.name) - len(type.dims)})")


def _pad(e: Emitter, op: Op) -> None:
    at = _index_of(op.operands[0].type, op.attrs["dim"])
    e.assign(op, f"G.{op.kind}({e.operand(op, 0)}, {at}, {op.attrs['count']})")


def _rename(e: Emitter, op: Op) -> None:
    e.names.share(op.result, e.operand(op, 0))


def _repeat(e: Emitter, op: Op) -> None:
    (region,) = op.regions
    start, count = op.attrs["start"], op.attrs["count"]
    assert isinstance(start, int) and isinstance(count, int)
    carried = len(op.operands)
    names = [e.names.give(v, op) for v in op.results[:carried]]
    for init, arg, name in zip(op.operands, region.args, names, strict=True):
        if e.names[init] != name:
            e.line(f"{name} = {e.names[init]}")
        e.names.share(arg, name)
    lists = [e.names.keep(f"{v.name}s") for v in region.yielded[carried:]]
    for name in lists:
        e.line(f"{name} = []")
    scope = next(str(o.attrs["scope"]) for o in region.ops if o.kind == "call")
    path = scope.removesuffix(".*")
    e.line(f"for layer in self.{path}[{start}:{start + count}]:")
    e.indent += 1
    for inner in region.ops[:-1]:
        e.statement(inner)
    yielded = [e.names[v] for v in region.yielded]
    moved = [(n, v) for n, v in zip(names, yielded, strict=False) if n != v]
    if moved:  # at once, for one may be the other's old value
        e.line(f"{', '.join(n for n, _ in moved)} = {', '.join(v for _, v in moved)}")
    for name, value in zip(lists, yielded[carried:], strict=True):
        e.line(f"{name}.append({value})")
    e.indent -= 1
    for result, name in zip(op.results, names, strict=False):
        e.names.share(result, name)
    for result, name in zip(op.results[carried:], lists, strict=True):
        e.line(f"{e.names.give(result, op)} = torch.stack({name})")


EMIT: dict[str, Emit] = {
    "embedding": _call_f("embedding"),
    "linear": _linear,
    "rms_norm": _call_f("rms_norm", "eps"),
    "add_rms_norm": _call_f("add_rms_norm", "eps"),
    "swiglu": _call_f("swiglu"),
    "silu": _call_f("silu"),
    "sigmoid": _call_f("sigmoid"),
    "softmax": _call_f("softmax"),
    "rope_table": _call_f(
        "rope_table", "dim", "theta", "factor", "original_max_position_embeddings", "beta_fast",
        "beta_slow", "attention_factor",
    ),
    "rotate": _call_f("rotate"),
    "attention": _call_f("attention", "scale"),
    "cache_append": _cache_append,
    "topk_groups": _topk_groups,
    "latent_attention": _call_f("latent_attention", "scale"),
    "head_linear": _head_linear,
    "experts": _experts,
    "permute": _permute,
    "grouped_linear": _grouped_linear,
    "unpermute": _call_f("unpermute"),
    "quantize": _call_fp8("quantize", "scale"),
    "quantize_columns": _call_fp8("quantize_columns", "scale"),
    "requantize": _call_fp8("requantize", "scale"),
    "quantize_weight": _quantize_weight,
    "permute_quantized": _permute_quantized,
    "fp8_linear": _call_fp8("linear"),
    "fp8_linear_input_grad": _call_fp8("linear_input_grad"),
    "fp8_linear_weight_grad": _call_fp8("linear_weight_grad"),
    "fp8_grouped_linear": _call_fp8("grouped_linear"),
    "fp8_grouped_linear_input_grad": _call_fp8("grouped_linear_input_grad"),
    "fp8_grouped_linear_weight_grad": _call_fp8("grouped_linear_weight_grad"),
    "sequence_balance_loss": _call_f("sequence_balance_loss", "k"),
    "expert_load": _expert_load,
    "cross_entropy": _call_f("cross_entropy"),
    "count_labels": _call_f("count_labels"),
    "add": _infix("+"),
    "sub": _infix("-"),
    "mul": _infix("*"),
    "div": _infix("/"),
    "scale": _scale,
    "cast": _cast,
    "constant": _constant,
    "sum": _sum,
    "split": _split,
    "concat": _concat,
    "flatten": _flatten,
    "unflatten": _unflatten,
    "broadcast": _broadcast,
    "drop_first": _drop_first,
    "drop_last": _drop_last,
    "last_entry": _last_entry,
    "call": _call,
    "repeat": _repeat,
    "keep": _keep,
    "kept": _kept,
    "accumulate_grad": _accumulate_grad,
    "linear_input_grad": _linear_input_grad,
    "linear_weight_grad": _call_g("linear_weight_grad"),
    "grouped_linear_input_grad": _linear_input_grad,
    "grouped_linear_weight_grad": _call_g("grouped_linear_weight_grad"),
    "embedding_grad": _embedding_grad,
    "rms_norm_grad": _call_g("rms_norm_grad", "eps"),
    "silu_grad": _call_g("silu_grad"),
    "swiglu_grad": _call_g("swiglu_grad"),
    "sigmoid_grad": _call_g("sigmoid_grad"),
    "softmax_grad": _call_g("softmax_grad"),
    "attention_saving": _call_g("attention_saving", "scale"),
    "attention_grad": _call_g("attention_grad", "scale"),
    "topk_groups_grad": _call_g("topk_groups_grad", "normalize", "scale"),
    "permute_grad": _call_g("permute_grad"),
    "unpermute_grad": _call_g("unpermute_grad"),
    "sequence_balance_loss_grad": _call_g("sequence_balance_loss_grad", "k"),
    "cross_entropy_grad": _call_g("cross_entropy_grad"),
    "linear_cross_entropy": _linear_cross_entropy,
    "sum_over": _sum_over,
    "expand_like": lambda e, op: e.assign(op, f"{e.operand(op, 0)}.expand_as({e.operand(op, 1)})"),
    "zeros_like": lambda e, op: e.assign(op, f"torch.zeros_like({e.operand(op, 0)})"),
    "pad_first": _pad,
    "pad_last": _pad,
    "rename": _rename,
}  # fmt: skip
