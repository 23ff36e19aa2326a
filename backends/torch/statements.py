"""Operators to Python statements: one function an operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from backends.torch.declare import attribute, stored_name
from backends.torch.emit import Callee, Emit, Emitter, Subgraph, call_f, call_fp8, index_of
from backends.torch.names import identifier
from backends.torch.records import numbers_text
from backends.torch.sizes import literal
from backends.torch.statements_grad import GRADIENTS, scores
from compiler.graph.core import Op
from compiler.graph.types import Dim
from compiler.ops.base import dims_of
from compiler.ops.pointwise import POINTWISE


def _infix(operator: str) -> Emit:
    def emit(e: Emitter, op: Op) -> None:
        e.assign(op, f"{e.operand(op, 0)} {operator} {e.operand(op, 1)}")

    return emit


def _parameter(e: Emitter, op: Op) -> None:
    """No statement: whoever reads it reads the weight."""
    e.names.share(op.result, e.weight(op.symbols[0]))


def _linear(e: Emitter, op: Op) -> None:
    weight = e.weight(op.symbols[0])
    # A gate is computed in float32 regardless of the element type of its weight.
    if op.operands[0].type.dtype != e.graph.weights[op.symbols[0]].type.dtype:
        weight = f"{weight}.float()"
    e.assign(op, f"F.linear({e.operand(op, 0)}, {weight})")


def _gate(e: Emitter, op: Op) -> None:
    """`topk_groups`, `gate`, and `gate_saving`."""
    bias = e.weight(op.symbols[0]) if op.symbols else "None"
    (k,) = dims_of(op.attrs["k"])
    numbers = e.named(op, "n_group", "topk_group")
    rest = e.named(op, "group_score", "normalize", "scale")
    scoring = e.named(op, "scoring") if "scoring" in op.attrs else []
    arguments = [e.operand(op, 0), bias, *scoring, *numbers, f"k={e.size(k)}", *rest]
    e.assign(op, f"F.{op.kind}({', '.join(arguments)})")


def _experts(e: Emitter, op: Op) -> None:
    x, topk_indices, weight = (e.names[v] for v in op.operands)
    (region,) = op.regions
    symbols = (s for o in region.ops for s in o.symbols)
    for name in dict.fromkeys(stored_name(s, e.context.joined) for s in symbols):
        path, inside = name.split(".*.", 1)
        e.parts[name] = e.names.keep(f"{inside.replace('.', '_')}s")
        e.line(f"{e.parts[name]} = self.{path}.{inside}.unbind()")
    y = e.names.give(op.result, op, beside_operands=True)
    e.remark(op)
    e.line(f"{y} = torch.zeros_like({x})")
    e.line(f"for expert, chosen in enumerate(F.dispatch({topk_indices}, {op.attrs['count']})):")
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
    e.assign(op, f"F.permute{_local(op)}({e.operands(op)}, {e.size(count)})")


def _local(op: Op) -> str:
    """Whether not all choices have rows: some experts are on other ranks, or compute nothing."""
    arrived = op.operands[0].type.dims[0].name == "arrived"
    return "_local" if arrived or "identity" in op.attrs else ""


def _exchange(e: Emitter, op: Op) -> None:
    """By the module's exchange; a handle knows the way, so that nothing else says where to."""
    given = op.operands[:-1] if op.kind == "combine" else op.operands
    e.assign(op, f"self.exchange.{op.kind}({', '.join(e.names[v] for v in given)})")


def _grouped(e: Emitter, op: Op) -> None:
    """By the stored tensor of the weights of all experts."""
    e.assign(op, f"F.{op.kind}({e.operands(op)}, {e.stored(op)})")


def _fp8_weight(e: Emitter, op: Op) -> None:
    """Numbers and scales are one state of the module, which products take."""
    q, s = op.results
    e.names.share(q, f"*{e.stored(op).removesuffix('.weight')}.fp8")
    e.names.share(s, "")


def _permute_quantized(e: Emitter, op: Op) -> None:
    (count,) = dims_of(op.attrs["count"])
    e.assign(op, f"fp8.permute_quantized{_local(op)}({e.operands(op)}, {e.size(count)})")


def _head_linear(e: Emitter, op: Op) -> None:
    (rows,) = dims_of(op.attrs["rows"])
    start = op.number("start")
    weight = e.weight(op.symbols[0])
    if e.graph.weights[op.symbols[0]].fp8:  # which may be held in FP8 only
        weight = f"{weight.removesuffix('.weight')}.dense({e.operand(op, 0)}.dtype)"
    given = f"{e.operand(op, 0)}, {weight}, ({start}, {start + (rows.size or 0)})"
    e.assign(op, f"F.head_linear({given}, transposed={op.attrs['transposed']})")


def _expert_load(e: Emitter, op: Op) -> None:
    (count,) = dims_of(op.attrs["count"])
    e.assign(op, f"F.expert_load({e.operand(op, 0)}, {e.size(count)})")


def _split(e: Emitter, op: Op) -> None:
    sizes = ", ".join(e.size(d) for d in dims_of(op.attrs["into"]))
    e.assign(op, f"{e.operand(op, 0)}.split([{sizes}], dim=-1)")


def _concat(e: Emitter, op: Op) -> None:
    e.assign(op, f"torch.cat([{e.operands(op)}], dim=-1)")


def _flatten(e: Emitter, op: Op) -> None:
    e.assign(op, f"{e.operand(op, 0)}.flatten(-{len(dims_of(op.attrs['dims']))})")


def _unflatten(e: Emitter, op: Op) -> None:
    sizes = [e.size(d) for d in dims_of(op.attrs["dims"])]
    shape = f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
    e.assign(op, f"{e.operand(op, 0)}.unflatten(-1, {shape})")


def _broadcast(e: Emitter, op: Op) -> None:
    (dim,) = dims_of(op.attrs["dim"])
    x, rank = e.operand(op, 0), len(op.result.type.dims)
    sizes = ", ".join(["-1"] * (rank - 2) + [e.size(dim), "-1"])
    e.assign(op, f"{x}.unsqueeze(-2).expand({sizes})")


def _drop_first(e: Emitter, op: Op) -> None:
    at = index_of(op.operands[0].type, op.attrs["dim"])
    e.assign(op, f"{e.operand(op, 0)}[{':, ' * at}{op.attrs['count']}:]")


def _drop_last(e: Emitter, op: Op) -> None:
    at = index_of(op.operands[0].type, op.attrs["dim"])
    e.assign(op, f"{e.operand(op, 0)}[{':, ' * at}:-{op.attrs['count']}]")


def _last_entry(e: Emitter, op: Op) -> None:
    """Which positions are scored, the cache says: with pages, rows of several sequences."""
    e.assign(op, f"cache.last({e.operand(op, 0)})")


def _attention(e: Emitter, op: Op) -> None:
    """Of a decoder by the cache, which knows where the keys of each sequence are."""
    arguments = ", ".join(scores(e, op))
    if op.operands[2].type.dims[1] == Dim("context"):
        e.assign(op, f"cache.attend(F.{op.kind}, {arguments})")
    else:
        e.assign(op, f"F.{op.kind}({arguments})")


def _lightning_indexer(e: Emitter, op: Op) -> None:
    """Likewise."""
    (topk,) = dims_of(op.attrs["topk"])
    arguments = f"{e.operands(op)}, topk={e.size(topk)}"
    if op.operands[1].type.dims[1] == Dim("context"):
        e.assign(op, f"cache.attend(F.{op.kind}, {arguments})")
    else:
        e.assign(op, f"F.{op.kind}({arguments})")


def _extern(e: Emitter, op: Op) -> None:
    e.assign(op, f"E.{op.text('name')}({e.operands(op)})")


def _sequence_extern(e: Emitter, op: Op) -> None:
    """Of a decoder by the cache, which knows where the tokens of each sequence are."""
    remembered = [i for i, v in enumerate(op.operands) if Dim("context") in v.type.dims]
    if not remembered:
        _extern(e, op)
        return
    function, numbers = f"E.{op.text('name')}", numbers_text(remembered)
    e.assign(op, f"cache.each({function}, {numbers}, {e.operands(op)})")


def _cast(e: Emitter, op: Op) -> None:
    e.assign(op, f"{e.operand(op, 0)}.to({e.dtype(op.attrs['dtype'])})")


def _scale(e: Emitter, op: Op) -> None:
    x, by = e.operand(op, 0), op.real("by")
    e.assign(op, f"-{x}" if by == -1 else f"{x} * {literal(by)}")


def _shift(e: Emitter, op: Op) -> None:
    x, by = e.operand(op, 0), op.real("by")
    if op.attrs["negated"]:
        e.assign(op, f"{literal(by)} - {x}")
    else:
        e.assign(op, f"{x} {'-' if by < 0 else '+'} {literal(abs(by))}")


def _reciprocal(e: Emitter, op: Op) -> None:
    e.assign(op, f"{literal(op.attrs['by'])} / {e.operand(op, 0)}")


def _constant(e: Emitter, op: Op) -> None:
    e.assign(op, f"torch.tensor({literal(op.attrs['value'])})")


def _sum(e: Emitter, op: Op) -> None:
    e.assign(op, f"{e.operand(op, 0)}.sum()")


def _cache_append(e: Emitter, op: Op) -> None:
    entries = [
        f"{identifier(name)}={e.names[value]}"
        for name, value in zip(op.texts("entries"), op.operands, strict=True)
    ]
    targets = [e.names.give(v, op) for v in op.results]
    left = ", ".join(targets) + ("," if len(targets) == 1 else "")
    e.line(f"{left} = cache.append(self, {', '.join(entries)})")


def _call_graph(e: Emitter, op: Op, module: str) -> None:
    name = op.callee
    arguments = [e.names[v] for v in op.operands]
    segments = e.context.segments
    if segments is not None and name in segments:
        _call_segment(e, op, segments[name], arguments)
        return
    if segments is not None:
        e.assign(op, f"{module}({', '.join([*arguments, 'train=True'])})")
        return
    callee = e.context.callees[name]
    function = f"{module}.{callee.method}" if callee.method else module
    call = f"{function}({', '.join([*arguments, *callee.trailing])})"
    e.line(f"{_targets(e, op, callee)}{call}")


def _targets(e: Emitter, op: Op, callee: Callee) -> str:
    """`y, _ = `: names for the results of a graph among those of the method that serves it."""
    names = iter([e.names.give(v, op) for v in op.results])
    places = callee.results or (True,) * len(op.results)
    targets = ", ".join(next(names) if taken else "_" for taken in places)
    return f"{targets} = " if targets else ""


def _call_segment(e: Emitter, op: Op, segment: Subgraph, arguments: Sequence[str]) -> None:
    name = e.context.callees[op.callee].method
    methods = [f"self.{name}", f"self.{name}_backward"]
    weights = f"[{', '.join(f'self.{attribute(w)}' for w in segment.weights)}]"
    given = [*methods, segment.gradients, weights, *arguments]
    e.assign(op, f"differentiable({', '.join(given)})")


def _call(e: Emitter, op: Op) -> None:
    if not op.attrs["scope"]:
        _call_graph(e, op, "self")
        return
    scope = op.text("scope")
    _call_graph(e, op, "layer" if scope.endswith("*") else f"self.{attribute(scope)}")


def _repeat(e: Emitter, op: Op) -> None:
    (region,) = op.regions
    carried = len(op.operands)
    names = [e.names.give(v, op) for v in op.results[:carried]]
    for init, arg, name in zip(op.operands, region.args, names, strict=True):
        if e.names[init] != name:
            e.line(f"{name} = {e.names[init]}")
        e.names.share(arg, name)
    lists = [e.names.keep(f"{v.name}s") for v in region.yielded[carried:]]
    for name in lists:
        e.line(f"{name} = []")
    scope = next(o.text("scope") for o in region.ops if o.kind == "call")
    path = scope.removesuffix(".*")
    first, n = e.context.first_layer, op.layers
    layers = f"{first} : {first} + {len(n)}" if first else f"{n.start}:{n.stop}"
    e.line(f"for layer in self.{path}[{layers}]:")
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


STATEMENTS: Mapping[str, Emit] = {
    "embedding": call_f("embedding"),
    "parameter": _parameter,
    "linear": _linear,
    "rms_norm": call_f("rms_norm", "eps"),
    "add_rms_norm": call_f("add_rms_norm", "eps"),
    "layer_norm": call_f("layer_norm", "eps"),
    "swiglu": call_f("swiglu"),
    **{f.kind: call_f(f.kind) for f in POINTWISE},
    "softmax": call_f("softmax"),
    "rope_table": call_f(
        "rope_table", "dim", "theta", "factor", "original_max_position_embeddings", "beta_fast",
        "beta_slow", "attention_factor",
    ),
    "rotate": call_f("rotate"),
    "rotate_halves": call_f("rotate_halves"),
    "rotate_last": call_f("rotate_last"),
    "join_rotated": call_f("join_rotated"),
    "attention": _attention,
    "document_attention": _attention,
    "cache_append": _cache_append,
    "topk_groups": _gate,
    "gate": _gate,
    "gate_saving": _gate,
    "latent_attention": _attention,
    "lightning_indexer": _lightning_indexer,
    "indexer_loss": call_f("indexer_loss", "scale"),
    "detach": lambda e, op: e.assign(op, f"{e.operand(op, 0)}.detach()"),
    "head_linear": _head_linear,
    "experts": _experts,
    "permute": _permute,
    "dispatch": _exchange,
    "dispatch_again": _exchange,
    "combine": _exchange,
    "grouped_linear": _grouped,
    "grouped_parameter": _grouped,
    "identity_weight": call_f("identity_weight", "count"),
    "unpermute": call_f("unpermute"),
    "quantize": call_fp8("quantize", "scale"),
    "rms_norm_quantize": call_f("rms_norm_quantize", "eps", "scale", module="fp8"),
    "swiglu_quantize": call_fp8("swiglu_quantize", "scale"),
    "quantize_columns": call_fp8("quantize_columns", "scale"),
    "requantize": call_fp8("requantize", "scale"),
    "fp8_weight": _fp8_weight,
    "permute_quantized": _permute_quantized,
    "fp8_linear": call_fp8("linear"),
    "fp8_grouped_linear": call_fp8("grouped_linear"),
    "sequence_balance_loss": call_f("sequence_balance_loss", "k"),
    "expert_load": _expert_load,
    "cross_entropy": call_f("cross_entropy"),
    "count_labels": call_f("count_labels"),
    "extern": _extern,
    "sequence_extern": _sequence_extern,
    "add": _infix("+"),
    "sub": _infix("-"),
    "mul": _infix("*"),
    "div": _infix("/"),
    "scale": _scale,
    "shift": _shift,
    "reciprocal": _reciprocal,
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
    **GRADIENTS,
}  # fmt: skip
