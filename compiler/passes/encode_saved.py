"""Saved activations in the formats of the spec: encoded where they are saved, decoded where read.

`train.saved_formats` says which (DeepSeek-V3 report, sections 3.2.3 and 3.3.3): results of
attention in E5M6, inputs of the experts' activation in FP8. The forward pass goes on with what it
computed; its gradients are those at the numbers that were saved.
"""

from __future__ import annotations

from collections.abc import Sequence

from compiler.graph.build import Builder
from compiler.graph.core import Graph, Op, Program, Value, walk
from compiler.graph.types import FLOATS
from compiler.ops import OPS
from compiler.ops.attention import Attention
from compiler.ops.base import dims_attr
from compiler.passes.base import Pass
from compiler.passes.differentiate import save
from compiler.rewrite import Miss
from dsl.load import Description
from dsl.schema import SavedFormats

GROUPED = ("grouped_linear", "fp8_grouped_linear")


def _run(program: Program, description: Description) -> Sequence[Miss]:
    formats = description.spec.train.saved_formats
    scale = "ue8m0" if description.spec.precision.scale_format == "ue8m0" else "fp32"
    for forward in list(program.graphs.values()):
        backward = program.backward_of(forward.name)
        if backward is not None and forward.name != program.root:
            _encode(forward, backward, formats, scale)
    return ()


ENCODE_SAVED = Pass(
    "encode_saved",
    "saved activations in the formats of the spec",
    _run,
    requires="recompute and place_fp8, which decide what is saved",
    ensures="no result of attention and no input of the experts' activation is saved in more bits",
)


def _encode(forward: Graph, backward: Graph, formats: SavedFormats, scale: str) -> None:
    producers = {v: op for op in forward.walk() for v in op.results}
    before, after = Builder(forward, {}), Builder(backward, {})
    before.ops, head = [], backward.ops[0]
    saved: list[Value] = []
    read: list[Value] = []
    for value, local in zip(forward.saved, head.results, strict=True):
        made_by = producers.get(value)
        format = _format(value, made_by, forward, formats) if made_by else None
        if not made_by or not format:
            saved.append(value)
            read.append(local)
            continue
        name, spans = value.name, made_by.spans
        if format == "e5m6":
            names = (f"{name}_packed", f"{name}_scale")
            encoded = before.add("pack_e5m6", [value], names=names, spans=spans)
            decode = Op("unpack_e5m6", attrs={"into": dims_attr(value.type.last)})
        else:
            names = (f"{name}_q", f"{name}_s")
            encoded = before.add(
                "quantize", [value], names=names, spans=spans, scale=scale, parts=()
            )
            decode = Op("dequantize")
        saved += encoded
        decode.operands = [after.value(v.name, v.type) for v in encoded]
        read += decode.operands
        decode.attrs["dtype"] = value.type.dtype
        decode.results, decode.spans = [local], spans
        first = next(i for i, op in enumerate(backward.ops) if _reads(op, local))
        backward.ops.insert(first, decode)
    if before.ops:
        head.results = read
        forward.ops[-2:-2] = before.ops
        save(forward, saved)


def _format(value: Value, made_by: Op, graph: Graph, formats: SavedFormats) -> str | None:
    """The format in which a saved value shall be."""
    if value.type.dtype not in FLOATS:
        return None
    if issubclass(OPS[made_by.kind], Attention) and value is made_by.results[0]:
        return formats.attention
    readers = {op.kind for op in graph.walk() if value in op.operands}
    if made_by.kind in GROUPED and "unpermute" not in readers:
        return formats.experts
    return None


def _reads(op: Op, value: Value) -> bool:
    return any(value in inner.operands for inner in walk([op]))
