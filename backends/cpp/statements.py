"""Operators to C++ statements: one function an operator."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from backends.cpp.emit import (
    Emit,
    Emitter,
    Member,
    Statement,
    Unsupported,
    kind,
    numbers,
    place,
    size,
)
from backends.cpp.words import identifier
from compiler.graph.core import Op
from compiler.graph.types import Type
from compiler.ops.base import dims_of

MOST_GROUPS = 1024
"""The most groups of experts that `op::gate` takes."""


def real(value: object) -> str:
    """A float32 literal."""
    text = repr(float(value))  # type: ignore[arg-type]
    return f"{text}f"


def _embedding(e: Emitter, op: Op) -> None:
    if op.operands[0] not in e.graph.args:
        raise Unsupported(f"embedding of anything but the tokens{place(op)}")
    e.put(f"embedding(s, {e.weight(op)}, {e.make(op.result)})", [], op.results)


def _linear(e: Emitter, op: Op) -> None:
    x, y = op.operands[0], op.result
    matrix = e.product(op, size(y.type.last))
    e.put(f"linear(s, {e.rows(op)}, {matrix}, {e.make(y)})", [x], [y], by="columns")


def _grouped_linear(e: Emitter, op: Op) -> None:
    x, offs = op.operands
    matrices = e.product(op, size(op.result.type.last))
    call = f"grouped_linear(s, {e.name(x)}, {e.name(offs)}, {matrices}, {e.make(op.result)})"
    e.put(call, [x, offs], op.results, by="columns")


def _head_linear(e: Emitter, op: Op) -> None:
    x, y = op.operands[0], op.result
    function = "head_linear_t" if op.attrs["transposed"] else "head_linear"
    given = [e.name(x), e.product(op), str(op.number("start")), e.make(y)]
    e.put(f"{function}(s, {', '.join(given)})", [x], [y], by="heads")


def _rms_norm(e: Emitter, op: Op) -> None:
    x = op.operands[0]
    given = [e.rows(op), e.weight(op), real(op.attrs["eps"]), e.make(op.result)]
    e.put(f"rms_norm(s, {', '.join(given)})", [x], op.results, by=_rows(x.type))


def _add_rms_norm(e: Emitter, op: Op) -> None:
    given = [e.rows(op), e.rows(op, 1), e.weight(op), real(op.attrs["eps"])]
    made = [e.make(v) for v in op.results]
    call = f"add_rms_norm(s, {', '.join([*given, *made])})"
    e.put(call, op.operands, op.results, by=_rows(op.operands[0].type))


def _rowwise(function: str) -> Emit:
    """An operator that takes and gives rows, and nothing else."""

    def emit(e: Emitter, op: Op) -> None:
        given = [*map(e.name, op.operands), e.make(op.result)]
        if {v.type.dims for v in op.operands} != {op.result.type.dims} or kind(
            op.result.type
        ) != "Rows":
            raise Unsupported(
                f"{op.kind} of {', '.join(str(v.type) for v in op.operands)}{place(op)}"
            )
        call = f"{function}(s, {', '.join(given)})"
        e.put(call, op.operands, op.results, by=_rows(op.result.type))

    return emit


def _rope_table(e: Emitter, op: Op) -> None:
    if op.operands[0] not in e.graph.args:
        raise Unsupported(f"rope_table of anything but the positions{place(op)}")
    e.angles(op)


def _rotate(e: Emitter, op: Op) -> None:
    given = [*map(e.name, op.operands), e.make(op.result)]
    e.put(f"rotate(s, {', '.join(given)})", op.operands, op.results)


def _cache_append(e: Emitter, op: Op) -> None:
    for entry, x, y in zip(op.texts("entries"), op.operands, op.results, strict=True):
        dims = tuple(size(d) for d in x.type.dims[2:])
        name = f"{identifier(entry)}_pool"
        e.cache(Member("op::Pool<Entry>", name, f"bound.pool<Entry>({prod(dims)})"), entry, dims)
        rows = e.joined_heads(x)
        e.call(y, f"this->{name}")
        e.put(f"cache_append(s, {rows}, this->{name})", [x], [y])


def _attention(e: Emitter, op: Op) -> None:
    if op.operands[-1].type.dims[1].name != "context":
        raise Unsupported(f"{op.kind} without a cache{place(op)}")
    window = str(op.attrs.get("window", 0))
    scores = [real(op.attrs["scale"]), window, real(op.attrs.get("softcap", 0))]
    how = f"{{{', '.join(scores)}}}"
    given = [*map(e.name, op.operands), how, e.make(op.result)]
    e.put(f"{op.kind}(s, {', '.join(given)})", op.operands, op.results, by="heads")


def _gate(e: Emitter, op: Op) -> None:
    index, weight = op.results
    experts, groups = size(op.operands[0].type.last), op.number("n_group")
    if groups > MOST_GROUPS:
        raise Unsupported(f"a gate of {groups} groups{place(op)}")
    bias = e.weight(op) if op.symbols else "op::Vector<float>{}"
    flags = [
        op.text("scoring") == "softmax",
        groups,
        op.number("topk_group"),
        op.text("group_score") == "top2_sum",
        bool(op.attrs["normalize"]),
        op.real("scale"),
    ]
    how = ", ".join(str(f).lower() if isinstance(f, bool) else repr(f) for f in flags)
    scratch = f"arena.rows(s.n, {3 * experts})"
    e.takes(3 * experts)
    made = [e.make(index), e.make(weight)]
    given = [e.name(op.operands[0]), bias, f"{{{how}}}", scratch, *made]
    e.put(f"gate(s, {', '.join(given)})", op.operands, op.results)


def _permute(e: Emitter, op: Op) -> None:
    x, index = op.operands
    rows, offs, order = op.results
    (experts,) = dims_of(op.attrs["count"])
    e.choices = k = size(index.type.last)
    token = identifier(f"{rows.name}_token")
    e.lines += [
        f"const Ints {e.name(offs)} = arena.ints(1, {size(experts)});",
        f"const Ints {token} = arena.ints(s.n, {k});",
        f"const Ints {e.name(order)} = arena.ints(s.n, {k});",
    ]
    e.takes(2 * k, size(experts) + 32)
    given = [e.name(index), "s.n", str(size(experts)), e.name(offs), token, e.name(order)]
    e.put(f"permute(s, {', '.join(given)})", [index], [offs, order], by="one thread")
    e.view(rows, x, f"op::permuted({e.name(x)}, {token}, s.n * {k})")


def _unpermute(e: Emitter, op: Op) -> None:
    given = [*map(e.name, op.operands), e.make(op.result)]
    e.put(f"unpermute(s, {', '.join(given)})", op.operands, op.results)


def _split(e: Emitter, op: Op) -> None:
    x, start = op.operands[0], 0
    for part in op.results:
        width = size(part.type.last)
        e.view(part, x, f"{e.name(x)}.columns({start}, {width})")
        e.apart.add(part)
        start += width


def _concat(e: Emitter, op: Op) -> None:
    y, start = op.result, 0
    if kind(y.type) != "Rows":
        raise Unsupported(f"concat of heads{place(op)}")
    name = e.make(y)
    for x in op.operands:
        width = size(x.type.last)
        e.put(f"copy(s, {e.name(x)}, {name}.columns({start}, {width}))", [x], [y], _rows(y.type))
        start += width


def _unflatten(e: Emitter, op: Op) -> None:
    x = op.operands[0]
    if kind(x.type) != "Rows" or kind(op.result.type) != "Heads":
        raise Unsupported(f"unflatten to {op.result.type}{place(op)}")
    heads = size(op.result.type.dims[-2])
    e.view(op.result, x, f"op::unflatten({e.name(x)}, {heads})")


def _flatten(e: Emitter, op: Op) -> None:
    x = op.operands[0]
    whole = e.made(x)
    if kind(x.type) != "Heads" or kind(op.result.type) != "Rows" or not whole:
        raise Unsupported(f"flatten of {x.type}{place(op)}")
    e.view(op.result, x, f"op::flatten({e.name(x)})")


def _cast(e: Emitter, op: Op) -> None:
    """Values are float32, also where the graph has another type."""
    x, y = op.operands[0], op.result
    if {x.type.dtype, y.type.dtype} - {"f32", "bf16"}:
        raise Unsupported(f"cast to {y.type.dtype}{place(op)}")
    e.view(y, x, e.name(x))
    if x in e.apart:
        e.apart.add(y)


def _last_entry(e: Emitter, op: Op) -> None:
    x = op.operands[0]
    e.put(f"keep_states(s, {e.name(x)})", [x])
    e.view(op.result, x, f"op::scored_rows(s, {e.name(x)})")


def _call(e: Emitter, op: Op) -> None:
    if any(v.type.dtype == "i64" and len(v.type.dims) == 2 for v in op.operands):
        raise Unsupported(f"a block that takes tokens or positions{place(op)}")
    callee = e.callees[op.text("callee")]
    scope = op.text("scope")
    if scope.endswith(".*"):
        module = "layer"
    elif scope:
        name = identifier(scope.replace(".", "_"))
        e.module(Member(callee.name, name, "bound"), callee, [scope])
        module = f"this->{name}"
    else:
        raise Unsupported(f"a call of a part of the same block{place(op)}")
    made = [e.make(v) for v in op.results]
    given = ", ".join([*map(e.name, op.operands), *made])
    e.wait()
    e.inside = e.inside.most(callee.memory)
    e.lines.append(f"{module}.run(s, arena, {given});")


def _repeat(e: Emitter, op: Op) -> None:
    """What a layer gives is what the next one takes: two values, in turn."""
    (region,) = op.regions
    calls = [inner for inner in region.ops if inner.kind == "call"]
    if len(calls) != 1 or len(region.ops) != 2 or region.yielded != calls[0].results:
        raise Unsupported(f"layers with equations between them{place(op)}")
    call, layers = calls[0], op.layers
    path = call.text("scope").removesuffix(".*")
    callee = e.callees[call.text("callee")]
    name = identifier(f"{path.replace('.', '_')}_{layers.start}")
    of = f"std::vector<{callee.name}>"
    made = f"bound.layers<{callee.name}>({len(layers)})"
    e.module(Member(of, name, made), callee, [f"{path}.{i}" for i in layers])
    nexts = []
    for given, arg, result in zip(op.operands, region.args, op.results, strict=True):
        carried, following = e.name(result), f"{e.name(result)}_next"
        for variable, value in ((carried, result), (following, arg)):
            count, times = e.count(value.type)
            width = numbers(value.type)
            if kind(value.type) != "Rows":
                raise Unsupported(f"layers that pass heads on{place(op)}")
            e.lines.append(f"Rows {variable} = arena.rows({count}, {width});")
            e.takes(times * width)
        e.put(f"copy(s, {e.name(given)}, {carried})", [given], [result])
        e.call(arg, carried)
        nexts.append((carried, following))
    e.wait()
    e.lines.append(f"for (const auto &layer : this->{name}) {{")
    taken = ", ".join([*map(e.name, call.operands), *(following for _, following in nexts)])
    e.inside = e.inside.most(callee.memory)
    e.lines.append(f"  layer.run(s, arena, {taken});")
    e.lines += [f"  std::swap({carried}, {following});" for carried, following in nexts]
    e.lines.append("}")


def _rows(type: Type) -> str:
    """How threads share rows: those of slots are others than those of tokens."""
    return "slots" if type.dims[0].name == "slot" else "rows"


_STATEMENTS: Mapping[str, tuple[Emit, str]] = {
    "embedding": (_embedding, ""),
    "linear": (_linear, ""),
    "grouped_linear": (_grouped_linear, ""),
    "head_linear": (_head_linear, "start rows transposed"),
    "rms_norm": (_rms_norm, "eps"),
    "add_rms_norm": (_add_rms_norm, "eps"),
    "add": (_rowwise("add"), ""),
    "swiglu": (_rowwise("swiglu"), ""),
    "rope_table": (
        _rope_table,
        "dim theta factor original_max_position_embeddings beta_fast beta_slow attention_factor",
    ),
    "rotate": (_rotate, ""),
    "cache_append": (_cache_append, "entries"),
    "attention": (_attention, "scale window softcap"),
    "latent_attention": (_attention, "scale window softcap"),
    "gate": (_gate, "scoring k n_group topk_group group_score normalize scale"),
    "permute": (_permute, "count"),
    "unpermute": (_unpermute, ""),
    "split": (_split, "into"),
    "concat": (_concat, "into"),
    "unflatten": (_unflatten, "dims"),
    "flatten": (_flatten, "dims"),
    "cast": (_cast, "dtype"),
    "last_entry": (_last_entry, ""),
    "call": (_call, "callee scope"),
    "repeat": (_repeat, "start count"),
}
STATEMENTS: Mapping[str, Statement] = {
    name: Statement(emit, frozenset(attrs.split())) for name, (emit, attrs) in _STATEMENTS.items()
}

MADE = frozenset(STATEMENTS) - {
    "permute", "split", "unflatten", "flatten", "cast", "last_entry", "cache_append", "repeat",
    "rope_table",
}  # fmt: skip
"""Operators whose results are memory of their own, which a caller can allocate."""
