"""Statements of the backward pass: derivatives, saved activations, gradients of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from backends.torch.emit import Emit, Emitter, call_f, call_fp8, index_of
from compiler.graph.core import Op
from compiler.ops.attention import also_of
from compiler.ops.base import dims_of
from compiler.ops.gradient import POINTWISE_GRADS, ones_of
from compiler.ops.mask import KEY, QUERY, as_python
from compiler.ops.mask import parse as parse_mask


def _call_g(name: str, *attrs: str) -> Emit:
    """`G.name(operands, weights, attr=..)`: derivatives."""
    return call_f(name, *attrs, module="G")


def scores(e: Emitter, op: Op) -> list[str]:
    """The arguments of an attention: `q, k, v, scale=.., mask=lambda q, k: .., sinks=..`."""
    also = also_of(op)
    arguments = [e.names[v] for v in op.operands[: len(op.operands) - len(also)]]
    arguments += e.named(op, *(name for name in op.attrs if name not in ("mask", "also")))
    if "mask" in op.attrs:
        condition = as_python(parse_mask(op.text("mask")))
        arguments.append(f"mask=lambda {QUERY}, {KEY}: {condition}")
    return arguments + [f"{name}={e.names[v]}" for name, v in also.items()]


def _attention(e: Emitter, op: Op) -> None:
    e.assign(op, f"G.{op.kind}({', '.join(scores(e, op))})")


def _save(e: Emitter, op: Op) -> None:
    if e.context.segments is None:  # else autograd takes care of what is between the units
        e.line(f"saved.save(self, {e.operands(op)})")


def _saved(e: Emitter, op: Op) -> None:
    if not op.results:
        return
    arguments = {e.names[v] for v in e.graph.args}
    wanted = e.saved or [""] * len(op.results)
    targets = [
        e.names.share(v, name) if name and name not in arguments else e.names.give(v, op)
        for v, name in zip(op.results, wanted, strict=True)
    ]
    left = f"({targets[0]},)" if len(targets) == 1 else ", ".join(targets)
    e.line(f"{left} = saved.pop(self)")


def _accumulate_grad(e: Emitter, op: Op) -> None:
    if op not in e.products.values():  # else where the product is, whose operands have names there
        e.line(f"grads.add({e.stored(op)}, {e.operand(op, 0)})")


def _linear_input_grad(e: Emitter, op: Op) -> None:
    weight = e.stored(op)
    if op.operands[0].type.dtype != e.graph.weights[op.symbols[0]].type.dtype:
        weight = f"{weight}.float()"
    e.assign(op, f"G.{op.kind}({', '.join([e.operands(op), weight])})")


def _linear_cross_entropy(e: Emitter, op: Op) -> None:
    if not e.saves:  # autograd has to find its way
        x, labels = (e.names[v] for v in op.operands)
        loss = e.names.give(op.results[0], op)
        e.line(f"{loss} = F.cross_entropy(F.linear({x}, {e.stored(op)}), {labels})")
        return
    arguments = [e.operands(op), e.stored(op), "gradients=saved.wanted"]
    e.assign(op, f"G.linear_cross_entropy({', '.join(arguments)})")


def _embedding_grad(e: Emitter, op: Op) -> None:
    (rows,) = dims_of(op.attrs["rows"])
    e.assign(op, f"G.embedding_grad({e.operands(op)}, {e.size(rows)})")


def _sum_over(e: Emitter, op: Op) -> None:
    (dim,) = dims_of(op.attrs["dim"])
    type = op.operands[0].type
    e.assign(op, f"{e.operand(op, 0)}.sum({index_of(type, dim.name) - len(type.dims)})")


def _sum_to(e: Emitter, op: Op) -> None:
    leading, ones = op.number("leading"), list(ones_of(op.attrs["ones"]))
    text = e.operand(op, 0)
    if leading:
        text += f".sum({_axes(range(leading))})"
    if ones:
        text += f".sum({_axes(ones)}, keepdim=True)"
    e.assign(op, text)


def _axes(places: Sequence[int]) -> str:
    return str(places[0]) if len(places) == 1 else f"({', '.join(map(str, places))})"


def _pad(e: Emitter, op: Op) -> None:
    at = index_of(op.operands[0].type, op.attrs["dim"])
    e.assign(op, f"G.{op.kind}({e.operand(op, 0)}, {at}, {op.attrs['count']})")


def _rename(e: Emitter, op: Op) -> None:
    e.names.share(op.result, e.operand(op, 0))


def _dequantize(e: Emitter, op: Op) -> None:
    e.assign(op, f"fp8.dequantize({e.operands(op)}, dtype={_dtype(e, op)})")


def _unpack_e5m6(e: Emitter, op: Op) -> None:
    (into,) = dims_of(op.attrs["into"])
    e.assign(op, f"e5m6.unpack({e.operands(op)}, {e.size(into)}, dtype={_dtype(e, op)})")


def _dtype(e: Emitter, op: Op) -> str:
    """That of an argument, which a model in another element type than the spec's has, too."""
    like = (e.names[v] for v in e.graph.args if v.type.dtype == op.attrs["dtype"])
    return next((f"{name}.dtype" for name in like), e.dtype(op.attrs["dtype"]))


def _extern_grad(e: Emitter, op: Op) -> None:
    e.assign(op, f"E.{op.text('name')}.grad({e.operands(op)})")


GRADIENTS: Mapping[str, Emit] = {
    "fp8_linear_input_grad": call_fp8("linear_input_grad"),
    "fp8_linear_weight_grad": call_fp8("linear_weight_grad"),
    "fp8_grouped_linear_input_grad": call_fp8("grouped_linear_input_grad"),
    "fp8_grouped_linear_weight_grad": call_fp8("grouped_linear_weight_grad"),
    "dequantize": _dequantize,
    "pack_e5m6": call_f("pack", module="e5m6"),
    "unpack_e5m6": _unpack_e5m6,
    "save": _save,
    "saved": _saved,
    "accumulate_grad": _accumulate_grad,
    "linear_input_grad": _linear_input_grad,
    "linear_weight_grad": _call_g("linear_weight_grad"),
    "grouped_linear_input_grad": _linear_input_grad,
    "grouped_linear_weight_grad": _call_g("grouped_linear_weight_grad"),
    "grouped_parameter_grad": _call_g("grouped_parameter_grad"),
    "embedding_grad": _embedding_grad,
    "rms_norm_grad": _call_g("rms_norm_grad", "eps"),
    "add_rms_norm_grad": _call_g("add_rms_norm_grad", "eps"),
    "layer_norm_grad": _call_g("layer_norm_grad", "eps"),
    "swiglu_grad_joined": _call_g("swiglu_grad_joined"),
    "swiglu_grad_quantize": call_fp8("swiglu_grad_quantize", "scale"),
    "quantize_both": call_fp8("quantize_both", "scale"),
    "join_rotated_grad": _call_g("join_rotated_grad"),
    **{grad.kind: _call_g(grad.kind) for grad in POINTWISE_GRADS},
    "swiglu_grad": _call_g("swiglu_grad"),
    "softmax_grad": _call_g("softmax_grad"),
    "attention_saving": _attention,
    "attention_grad": _attention,
    "document_attention_saving": _attention,
    "document_attention_grad": _attention,
    "indexer_loss_grad": _call_g("indexer_loss_grad", "scale"),
    "identity_weight_grad": _call_g("identity_weight_grad", "count"),
    "topk_groups_grad": _call_g("topk_groups_grad", "normalize", "scale"),
    "gate_grad": _call_g("gate_grad", "scoring", "normalize", "scale"),
    "permute_grad": _call_g("permute_grad"),
    "unpermute_grad": _call_g("unpermute_grad"),
    "sequence_balance_loss_grad": _call_g("sequence_balance_loss_grad", "k"),
    "cross_entropy_grad": _call_g("cross_entropy_grad"),
    "linear_cross_entropy": _linear_cross_entropy,
    "sum_over": _sum_over,
    "sum_to": _sum_to,
    "expand_like": lambda e, op: e.assign(op, f"{e.operand(op, 0)}.expand_as({e.operand(op, 1)})"),
    "zeros_like": lambda e, op: e.assign(op, f"torch.zeros_like({e.operand(op, 0)})"),
    "extern_grad": _extern_grad,
    "pad_first": _pad,
    "pad_last": _pad,
    "rename": _rename,
}  # fmt: skip
