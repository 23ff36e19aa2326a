"""FP8 casts join what makes their numbers, which then are never written in more bits.

- A norm or SwiGLU that is read in FP8 alone gives E4M3 at once.
- What is cast for both gradients, in runs of a row and of tokens, is read once: `quantize_both`;
  where it is the gradient of gate and up it is made there, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from compiler.graph.core import Attr, Program, Value, list_of
from compiler.ops.quantize import RUN
from compiler.passes.base import Pass
from compiler.passes.simplify import dead_code_elimination
from compiler.rewrite import Miss, Rewriter, rewrite
from dsl.load import Description


def _run(program: Program, description: Description) -> Sequence[Miss]:
    misses = [*rewrite(program, "quantize", _made_and_cast), *rewrite(program, "quantize", _both)]
    misses += rewrite(program, "quantize_both", _gradients_cast)
    dead_code_elimination(program)
    return misses


FUSE_CASTS = Pass(
    "fuse_casts",
    "norm or SwiGLU with the FP8 cast of it, both casts of a gradient in one",
    _run,
    requires="FP8 casts placed and shared",
    ensures="no cast of a norm or SwiGLU that nothing else reads, nothing is read for two casts",
)


def _made_and_cast(at: Rewriter) -> Sequence[Value] | Miss:
    (x,) = at.op.operands
    made = at.producer(x, "rms_norm") or at.producer(x, "swiglu")
    if made is None:
        return Miss("what is cast is no norm and no SwiGLU", at.op)
    if len(at.uses[x]) > 1:
        return Miss("what is cast is read besides", at.op)
    if at.op.attrs["parts"]:
        return Miss("runs restart in each part", at.op)
    attrs: dict[str, Attr] = {**made.attrs, "scale": at.op.attrs["scale"]}
    names = [v.name for v in at.op.results]
    return at.add(f"{made.kind}_quantize", made.operands, made.symbols, names=names, **attrs)


def _both(at: Rewriter) -> Sequence[Value] | Miss:
    (x,) = at.op.operands
    ops = list_of(at.builder.graph, at.op)
    later = ops[ops.index(at.op) + 1 :]
    columns = next((o for o in at.uses[x] if o.kind == "quantize_columns" and o in later), None)
    if columns is None:
        return Miss("what is cast is not cast in runs of tokens next", at.op)
    if columns.attrs["scale"] != at.op.attrs["scale"]:
        return Miss("its scales in runs of tokens are of another kind", columns)
    if at.op.attrs["parts"]:
        return Miss("runs restart in each part", at.op)
    at.builder.names -= {v.name for v in columns.results}
    names = [v.name for v in (*at.op.results, *columns.results)]
    at.matched.append(columns)
    scale = at.op.attrs["scale"]
    q, s, *tiles = at.add("quantize_both", columns.operands, names=names, scale=scale)
    at.erase(columns, tiles)
    return [q, s]


def _gradients_cast(at: Rewriter) -> Sequence[Value] | Miss:
    x, *offs = at.op.operands
    made = at.producer(x, "swiglu_grad_joined")
    if made is None:
        return Miss("what is cast is no gradient of gate and up", at.op)
    if len(at.uses[x]) > 1:
        return Miss("what is cast is read besides", at.op)
    if (made.operands[1].type.last.size or 0) % RUN:
        return Miss("a run is of gate and of up", at.op)
    names = [v.name for v in at.op.results]
    operands, attrs = [*made.operands, *offs], {**made.attrs, "scale": at.op.attrs["scale"]}
    return at.add("swiglu_grad_quantize", operands, names=names, **attrs)
