"""What each kind of operator does, mostly by the function that generated code calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compiler.graph.core import Attr, Op
from compiler.graph.types import Type
from compiler.ops.base import dims_of
from compiler.ops.gradient import POINTWISE_GRADS, ones_of
from compiler.ops.mask import as_python
from compiler.ops.mask import parse as parse_mask
from compiler.ops.pointwise import POINTWISE
from runtime import e5m6, fp8
from runtime import functional as F
from runtime import gradients as G
from runtime.extern import Extern
from tests.interpret import user
from tests.interpret.comm import COMM, place_of

if TYPE_CHECKING:
    from tests.interpret.frame import Frame

Run = Callable[..., Tensor | Sequence[Tensor]]
"""(frame, op, *operands) -> the result, or all results."""


def _f(name: str, *attrs: str) -> Run:
    """`F.name(operands, weights, attr=..)`, as generated code has it."""

    def apply(f: Frame, op: Op, *x: Tensor) -> Any:
        weights = [f.weight(s) for s in op.symbols]
        return getattr(F, name)(*x, *weights, **{a: op.attrs[a] for a in attrs})

    return apply


def _g(name: str, *attrs: str) -> Run:
    """`G.name(operands, weights, attr=..)`: a derivative, as generated code has it."""

    def apply(f: Frame, op: Op, *x: Tensor) -> Any:
        weights = [f.weight(s) for s in op.symbols]
        return getattr(G, name)(*x, *weights, **{a: op.attrs[a] for a in attrs})

    return apply


def _attention(module: Any) -> Run:
    """Any kind of attention; a mask by its Python text, as generated code has it."""

    def apply(f: Frame, op: Op, *x: Tensor) -> Any:
        scores: dict[str, Any] = {name: v for name, v in op.attrs.items() if name != "also"}
        also = op.texts("also") if "also" in op.attrs else ()
        scores |= zip(also, x[len(x) - len(also) :], strict=True)
        x = x[: len(x) - len(also)]
        if "mask" in scores:
            scores["mask"] = eval(f"lambda q, k: {as_python(parse_mask(op.text('mask')))}")
        return getattr(module, op.kind)(*x, **scores)

    return apply


def _t(function: Callable[..., Tensor]) -> Run:
    """A function of the operands alone."""
    return lambda f, op, *x: function(*x)


def _dims(op: Op, name: str) -> list[int]:
    return [d.size or 0 for d in dims_of(op.attrs[name])]


def _axis(type: Type, dim: Attr) -> int:
    return [d.name for d in type.dims].index(str(dim))


# ---- products with weights -------------------------------------------------------------------


def _linear(f: Frame, op: Op, x: Tensor) -> Tensor:
    """Several weights are one product whose results stand side by side."""
    return F.linear(x, torch.cat([f.weight(s) for s in op.symbols]).to(x.dtype))


def _grouped_linear(f: Frame, op: Op, x: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_linear(x, ends, torch.cat([f.weight(s) for s in op.symbols], 1))


def _linear_input_grad(f: Frame, op: Op, dy: Tensor) -> Tensor:
    return G.linear_input_grad(dy, torch.cat([f.weight(s) for s in op.symbols]).to(dy.dtype))


def _grouped_linear_input_grad(f: Frame, op: Op, dy: Tensor, ends: Tensor) -> Tensor:
    weight = torch.cat([f.weight(s) for s in op.symbols], 1)
    return G.grouped_linear_input_grad(dy, ends, weight)


def _linear_cross_entropy(f: Frame, op: Op, x: Tensor, labels: Tensor) -> Sequence[Tensor]:
    loss, dx, dw = G.linear_cross_entropy(x, labels, f.weight(op.symbols[0]), gradients=True)
    assert dx is not None and dw is not None
    return loss, dx, dw


def _pad(f: Frame, op: Op, x: Tensor) -> Tensor:
    pad = G.pad_first if op.kind == "pad_first" else G.pad_last
    return pad(x, _axis(op.operands[0].type, op.attrs["dim"]), op.number("count"))


def _sum_over(f: Frame, op: Op, x: Tensor) -> Tensor:
    return x.sum(_axis(op.operands[0].type, dims_of(op.attrs["dim"])[0].name))


def _sum_to(f: Frame, op: Op, x: Tensor) -> Tensor:
    return x.sum_to_size(_sum_to_shape(op, x))


def _sum_to_shape(op: Op, x: Tensor) -> list[int]:
    shape = list(x.shape)
    for place in ones_of(op.attrs["ones"]):
        shape[place] = 1
    return shape[op.number("leading") :]


def _head_linear(f: Frame, op: Op, x: Tensor) -> Tensor:
    start, (count,) = op.number("start"), _dims(op, "rows")
    transposed = bool(op.attrs["transposed"])
    weight = f.weight(op.symbols[0])
    return F.head_linear(x, weight, (start, start + count), transposed=transposed)


# ---- experts ---------------------------------------------------------------------------------


def _gate(f: Frame, op: Op, x: Tensor) -> Any:
    """`topk_groups`, `gate`, and `gate_saving`."""
    bias = f.weight(op.symbols[0]) if op.symbols else None
    (k,) = _dims(op, "k")
    rest: dict[str, Any] = {name: value for name, value in op.attrs.items() if name != "k"}
    return getattr(F, op.kind)(x, bias, k=k, **rest)


def _experts(f: Frame, op: Op, x: Tensor, route: Tensor, weight: Tensor) -> Tensor:
    (region,) = op.regions
    y = x.new_zeros(*x.shape[:-1], region.yielded[0].type.last.size or 0)
    count = op.number("count")
    # -1: an expert of another rank; from `count` on they give back tokens.
    here = torch.where(route < 0, count, route)
    for expert, chosen in enumerate(F.dispatch(here, count)):
        inside = replace(f, expert=expert, values=dict(f.values), sizes=dict(f.sizes))
        (out,) = inside.region(region.args, region.ops, [F.gather_tokens(x, chosen)])
        F.add_tokens(y, chosen, out, weight)
    return y


# ---- functions of users ----------------------------------------------------------------------


def _user(op: Op) -> Extern:
    """The function of an extern, of `tests/interpret/user.py`."""
    names, items = op.text("function"), op.items("numbers")
    gradient = op.text("gradient").removeprefix("user.")
    return Extern(
        getattr(user, names.removeprefix("user.")),
        takes=op.texts("takes"),
        gives=op.texts("gives"),
        numbers=dict(zip(map(str, items[::2]), items[1::2], strict=True)),
        gradient=getattr(user, gradient) if gradient else None,
    )


# ---- FP8 -------------------------------------------------------------------------------------


def _fp8(name: str, *attrs: str) -> Run:
    """`fp8.name(operands, attr=..)`, as generated code has it."""

    def apply(f: Frame, op: Op, *x: Tensor) -> Any:
        told = {a: op.attrs[a] for a in attrs}
        if "dtype" in op.attrs:
            told["dtype"] = f.torch_dtype(op.text("dtype"))
        return getattr(fp8, name)(*x, *(f.weight(s) for s in op.symbols), **told)

    return apply


def _fp8_weight(f: Frame, op: Op) -> Sequence[Tensor]:
    """Each of several weights by itself."""
    scale = op.text("scale")
    parts = [fp8.quantize_weight(f.weight(s), scale) for s in op.symbols]
    return [torch.cat([q for q, _ in parts], -2), torch.cat([s for _, s in parts], -2)]


def _unpack_e5m6(f: Frame, op: Op, packed: Tensor, s: Tensor) -> Tensor:
    (size,) = _dims(op, "into")
    return e5m6.unpack(packed, s, size, dtype=f.torch_dtype(op.text("dtype")))


def _permute(f: Frame, op: Op, x: Tensor, route: Tensor) -> Sequence[Tensor]:
    """Without slots for experts of other ranks, -1, and for those that give back tokens."""
    flat, k, (count,) = route.flatten(), route.shape[-1], _dims(op, "count")
    (here,) = ((flat >= 0) & (flat < count)).nonzero(as_tuple=True)
    rows, ends, order = F.permute(x.flatten(0, -2)[here // k], flat[here, None], count)
    return rows, ends, here[order]


def _permute_quantized(f: Frame, op: Op, q: Tensor, s: Tensor, route: Tensor) -> Sequence[Tensor]:
    rows, ends, order = _permute(f, op, q, route)
    return rows, s.flatten(0, -2)[order // route.shape[-1]], ends, order


def _every(rows: Tensor, order: Tensor, choices: int) -> tuple[Tensor, Tensor]:
    """Rows of slots in the order of the choices, with zeros for those of other ranks."""
    every = rows.new_zeros(choices, rows.shape[-1]).index_copy(0, order, rows)
    return every, torch.arange(choices)


def _unpermute(f: Frame, op: Op, y: Tensor, order: Tensor, weight: Tensor) -> Tensor:
    return F.unpermute(*_every(y, order, weight.numel()), weight)


def _permute_grad(f: Frame, op: Op, d: Tensor, order: Tensor, route: Tensor) -> Tensor:
    return G.permute_grad(*_every(d, order, route.numel()), route)


def _unpermute_grad(
    f: Frame, op: Op, d: Tensor, y: Tensor, order: Tensor, weight: Tensor
) -> Sequence[Tensor]:
    dy, dweight = G.unpermute_grad(d, *_every(y, order, weight.numel()), weight)
    return dy[order], dweight


# ---- arithmetic and layout -------------------------------------------------------------------


def _cast(f: Frame, op: Op, x: Tensor) -> Tensor:
    return x.to(f.torch_dtype(op.text("dtype")))


def _constant(f: Frame, op: Op) -> Tensor:
    return torch.tensor(op.attrs["value"], dtype=f.torch_dtype("f32"))


def _split(f: Frame, op: Op, x: Tensor) -> Sequence[Tensor]:
    return x.split(_dims(op, "into"), -1)


def _broadcast(f: Frame, op: Op, x: Tensor) -> Tensor:
    return x.unsqueeze(-2).expand(*x.shape[:-1], *_dims(op, "dim"), -1)


def _drop(f: Frame, op: Op, x: Tensor) -> Tensor:
    at, count = _axis(op.operands[0].type, op.attrs["dim"]), op.number("count")
    start = count if op.kind == "drop_first" else 0
    return x.narrow(at, start, x.shape[at] - count)


def _last_entry(f: Frame, op: Op, x: Tensor) -> Tensor:
    return x.select(_axis(op.operands[0].type, "seq"), -1)


# ---- effects ---------------------------------------------------------------------------------


def _cache_append(f: Frame, op: Op, *x: Tensor) -> list[Tensor]:
    cache, names = f.state.cache, op.attrs["entries"]
    assert isinstance(names, tuple)
    keys = [f"{f.prefix}{f.graph.name}:{name}" for name in names]
    for key, new in zip(keys, x, strict=True):
        cache[key] = torch.cat([cache[key], new], 1) if key in cache else new
    return [cache[key] for key in keys]


def _save(f: Frame, op: Op, *x: Tensor) -> Sequence[Tensor]:
    f.state.saved[f"{f.prefix}{f.graph.name}"] = x
    return []


def _saved(f: Frame, op: Op) -> Sequence[Tensor]:
    saver = f.program.saver_of(f.graph.name)
    assert saver is not None
    return f.state.saved[f"{f.prefix}{saver.name}"] if op.results else []


def _accumulate_grad(f: Frame, op: Op, grad: Tensor) -> Sequence[Tensor]:
    """Gradients of several weights stand side by side, as their products do."""
    sizes = [f.graph.weights[s].type.dims[0].size or 0 for s in op.symbols]
    stacked = "*" in op.symbols[0]
    for symbol, part in zip(op.symbols, grad.split(sizes, int(stacked)), strict=True):
        for name, own in zip(f.names(symbol), part if stacked else [part], strict=True):
            grads = f.state.grads
            grads[name] = grads[name] + own if name in grads else own
    return []


LEARNING_RATE = 0.1


def _gradient(f: Frame, op: Op) -> Tensor:
    names = f.names(op.symbols[0])
    found = [f.state.grads.get(name, torch.zeros_like(f.parameters[name])) for name in names]
    return torch.stack(found) if op.attrs["experts"] else found[0]


def _update(f: Frame, op: Op, d: Tensor, factor: Tensor) -> Tensor:
    """Plain gradient descent."""
    d = d * factor
    whole = f.weight(op.symbols[0])
    if op.number("ranks") == 1:
        return whole - LEARNING_RATE * d
    filled = torch.nn.functional.pad(whole.flatten(), (0, len(d) * op.number("ranks")))
    return filled.split(len(d))[place_of(f, op)] - LEARNING_RATE * d


def _assign(f: Frame, op: Op, x: Tensor) -> Sequence[Tensor]:
    names = f.names(op.symbols[0])
    assert isinstance(f.parameters, dict), "a step changes weights"
    f.parameters.update(zip(names, x if op.attrs["experts"] else [x], strict=True))
    return []


# ---- control ---------------------------------------------------------------------------------


def _call(f: Frame, op: Op, *x: Tensor) -> list[Tensor]:
    callee = f.program.graphs[op.text("callee")]
    assert f.expert is None
    inside = replace(f, graph=callee, prefix=f.scope(op), layers=(), values={}, sizes={})
    return inside.run(x)


def _repeat(f: Frame, op: Op, *x: Tensor) -> list[Tensor]:
    (region,) = op.regions
    start, count, carried = op.number("start"), op.number("count"), list(x)
    stacks: list[list[Tensor]] = [[] for _ in op.results[len(x) :]]
    layers = range(start, start + count)
    for layer in layers:
        inside = replace(f, layers=(*f.layers, layer))  # it shares the values around it
        yielded = inside.region(region.args, region.ops, carried)
        carried = yielded[: len(x)]
        for stack, value in zip(stacks, yielded[len(x) :], strict=True):
            stack.append(value)
    return [*carried, *map(torch.stack, stacks)]


def _repeat_backward(f: Frame, op: Op, *x: Tensor) -> list[Tensor]:
    (region,) = op.regions
    start, count, n = op.number("start"), op.number("count"), op.number("carried")
    carried, sliced = list(x[:n]), x[n:]
    for i in reversed(range(count)):
        inside = replace(f, layers=(*f.layers, start + i))
        carried = inside.region(region.args, region.ops, [*carried, *(s[i] for s in sliced)])
    return carried


def _end(f: Frame, op: Op, *x: Tensor) -> Sequence[Tensor]:
    raise AssertionError(f"{op.kind} does not stand last")


RUN: dict[str, Run] = {
    "embedding": _f("embedding"),
    "parameter": lambda f, op: f.weight(op.symbols[0]),
    "linear": _linear,
    "head_linear": _head_linear,
    "rms_norm": _f("rms_norm", "eps"),
    "add_rms_norm": _f("add_rms_norm", "eps"),
    "layer_norm": _f("layer_norm", "eps"),
    "swiglu": _f("swiglu"),
    **{f.kind: _f(f.kind) for f in POINTWISE},
    "softmax": _f("softmax"),
    "rope_table": _f(
        "rope_table", "dim", "theta", "factor", "original_max_position_embeddings", "beta_fast",
        "beta_slow", "attention_factor",
    ),
    "rotate": _f("rotate"),
    "rotate_halves": _f("rotate_halves"),
    "lightning_indexer": lambda f, op, *x: F.lightning_indexer(*x, *_dims(op, "topk")),
    "indexer_loss": _f("indexer_loss", "scale"),
    "indexer_loss_grad": _g("indexer_loss_grad", "scale"),
    "detach": _t(torch.Tensor.detach),
    "rotate_last": _f("rotate_last"),
    "join_rotated": _f("join_rotated"),
    "join_rotated_grad": _g("join_rotated_grad"),
    "attention": _attention(F),
    "document_attention": _attention(F),
    "latent_attention": _attention(F),
    "cache_entry": lambda f, op, *x: x,
    "cache_append": _cache_append,
    "save": _save,
    "saved": _saved,
    "accumulate_grad": _accumulate_grad,
    "topk_groups": _gate,
    "gate": _gate,
    "gate_saving": _gate,
    "experts": _experts,
    "identity_weight": _f("identity_weight", "count"),
    "permute": _permute,
    "grouped_linear": _grouped_linear,
    "grouped_parameter": _f("grouped_parameter"),
    "quantize": _fp8("quantize", "scale", "parts"),
    "quantize_columns": _fp8("quantize_columns", "scale"),
    "quantize_both": _fp8("quantize_both", "scale"),
    "rms_norm_quantize": _fp8("rms_norm_quantize", "eps", "scale"),
    "swiglu_quantize": _fp8("swiglu_quantize", "scale"),
    "requantize": _fp8("requantize", "scale"),
    "dequantize": _fp8("dequantize"),
    "pack_e5m6": lambda f, op, x: e5m6.pack(x),
    "unpack_e5m6": _unpack_e5m6,
    "fp8_weight": _fp8_weight,
    "quantize_weight": lambda f, op: [],  # the copy follows from the weight here
    "permute_quantized": _permute_quantized,
    "fp8_linear": _fp8("linear", "parts"),
    "fp8_linear_input_grad": _fp8("linear_input_grad", "parts"),
    "fp8_linear_weight_grad": _fp8("linear_weight_grad"),
    "fp8_grouped_linear": _fp8("grouped_linear", "parts"),
    "fp8_grouped_linear_input_grad": _fp8("grouped_linear_input_grad", "parts"),
    "fp8_grouped_linear_weight_grad": _fp8("grouped_linear_weight_grad"),
    "unpermute": _unpermute,
    "sequence_balance_loss": _f("sequence_balance_loss", "k"),
    "expert_load": lambda f, op, route: F.expert_load(route, *_dims(op, "count")),
    "cross_entropy": _f("cross_entropy"),
    "count_labels": _f("count_labels"),
    "add": _t(torch.add),
    "sub": _t(torch.sub),
    "mul": _t(torch.mul),
    "div": _t(torch.div),
    "scale": lambda f, op, x: x * op.attrs["by"],
    "shift": lambda f, op, x: op.attrs["by"] + (-x if op.attrs["negated"] else x),
    "reciprocal": lambda f, op, x: op.attrs["by"] / x,
    "cast": _cast,
    "constant": _constant,
    "sum": _t(torch.sum),
    "split": _split,
    "concat": lambda f, op, *x: torch.cat(x, -1),
    "flatten": lambda f, op, x: x.flatten(-len(_dims(op, "dims"))),
    "unflatten": lambda f, op, x: x.unflatten(-1, _dims(op, "dims")),
    "broadcast": _broadcast,
    "drop_first": _drop,
    "drop_last": _drop,
    "last_entry": _last_entry,
    "call": _call,
    "repeat": _repeat,
    "repeat_backward": _repeat_backward,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_input_grad": _linear_input_grad,
    "linear_weight_grad": _g("linear_weight_grad"),
    "grouped_linear_input_grad": _grouped_linear_input_grad,
    "grouped_linear_weight_grad": _g("grouped_linear_weight_grad"),
    "grouped_parameter_grad": _g("grouped_parameter_grad"),
    "embedding_grad": lambda f, op, d, tokens: G.embedding_grad(d, tokens, *_dims(op, "rows")),
    "rms_norm_grad": _g("rms_norm_grad", "eps"),
    "add_rms_norm_grad": _g("add_rms_norm_grad", "eps"),
    "layer_norm_grad": _g("layer_norm_grad", "eps"),
    **{grad.kind: _g(grad.kind) for grad in POINTWISE_GRADS},
    "swiglu_grad": _g("swiglu_grad"),
    "swiglu_grad_joined": _g("swiglu_grad_joined"),
    "swiglu_grad_quantize": _fp8("swiglu_grad_quantize", "scale"),
    "softmax_grad": _g("softmax_grad"),
    "attention_saving": _attention(G),
    "attention_grad": _attention(G),
    "document_attention_saving": _attention(G),
    "document_attention_grad": _attention(G),
    "identity_weight_grad": _g("identity_weight_grad", "count"),
    "topk_groups_grad": _g("topk_groups_grad", "normalize", "scale"),
    "gate_grad": _g("gate_grad", "scoring", "normalize", "scale"),
    "permute_grad": _permute_grad,
    "unpermute_grad": _unpermute_grad,
    "sequence_balance_loss_grad": _g("sequence_balance_loss_grad", "k"),
    "cross_entropy_grad": _g("cross_entropy_grad"),
    "sum_over": _sum_over,
    "sum_to": _sum_to,
    "expand_like": lambda f, op, d, x: d.expand_as(x),
    "zeros_like": _t(torch.zeros_like),
    "pad_first": _pad,
    "pad_last": _pad,
    "rename": lambda f, op, x: x,
    "extern": lambda f, op, *x: _user(op)(*x),
    "sequence_extern": lambda f, op, *x: _user(op)(*x),
    "extern_grad": lambda f, op, *x: _user(op).grad(*x),
    "gradient": _gradient,
    "sum_squares": lambda f, op, d: d.square().sum(),
    "update": _update,
    "assign": _assign,
    **COMM,
    "yield": _end,
    "return": _end,
}  # fmt: skip
