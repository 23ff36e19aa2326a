"""Programs in FP8 compute what the definition says, to the bit, however casts were placed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compiler.graph.core import Op, Program
from compiler.passes.place_fp8 import PLACE_FP8
from compiler.pipeline import PIPELINES, run
from runtime import fp8
from tests.interpret import RUN
from tests.interpret.frame import Frame
from tests.interpret.operators import Run
from tests.support.cases import Case
from tests.support.random_specs import accepted, few, fitted, specs


@pytest.mark.parametrize("name", [n for n, passes in PIPELINES.items() if PLACE_FP8 in passes])
@few(20)
@given(spec=specs().map(fitted), wider=st.integers(1, 5), scale=st.sampled_from(["fp32", "ue8m0"]))
def test_placed_casts_are_those_of_the_definition(
    name: str, spec: dict[str, Any], wider: int, scale: str
) -> None:
    """By itself each product quantizes its own operands; the pass shares casts and moves them."""
    numbers = spec["params"]
    numbers["hidden_size"] *= wider  # several runs of 128, the last one ragged
    numbers["moe_intermediate_size"] *= 7 * wider
    spec = {**spec, "policy": f"fp8_blockwise, scale_format: {scale}"}
    with tempfile.TemporaryDirectory() as folder:
        case = accepted(spec, Path(folder), "random_spec", lambda d: Case(d, dtype=None))
    assert case, "refused"
    passes = PIPELINES[name]
    before = passes[: passes.index(PLACE_FP8)]
    (*_, step), (*_, last) = (
        run(name, case.lowered, some, case.description) for some in (before, (*before, PLACE_FP8))
    )
    plain, placed = step.program, last.program
    assert any(
        op.kind.startswith("fp8_") for graph in placed.graphs.values() for op in graph.walk()
    )
    seen = observed(case, placed)
    with patch.dict(RUN, definition(scale)):
        expected = observed(case, plain)
    assert seen.keys() == expected.keys()
    for what, value in seen.items():
        assert torch.equal(value, expected[what]), what


def observed(case: Case, program: Program) -> dict[str, Tensor]:
    return case.observe(program) | (case.gradients(program) if program.backward else {})


def definition(scale: str) -> dict[str, Run]:
    """Products with weights marked as FP8, each of its own quantized operands."""

    def forward(f: Frame, op: Op, x: Tensor, *ends: Tensor) -> Tensor:
        if not in_fp8(f, op.symbols):
            return PLAIN[op.kind](f, op, x, *ends)
        return product(f, op, fp8.quantize(x, scale), ends)

    def input_grad(f: Frame, op: Op, dy: Tensor, *ends: Tensor) -> Tensor:
        if not in_fp8(f, op.symbols):
            return PLAIN[op.kind](f, op, dy, *ends)
        return product(f, op, fp8.quantize(dy, scale, sizes(f, op)), ends)

    def product(f: Frame, op: Op, x: fp8.Quantized, ends: Sequence[Tensor]) -> Tensor:
        weights = [fp8.quantize_weight(f.weight(symbol), scale) for symbol in op.symbols]
        wq, ws = (torch.cat(parts, -2) for parts in zip(*weights, strict=True))
        dtype = f.torch_dtype(op.result.type.dtype)
        function = getattr(fp8, op.kind)
        return function(*x, *ends, wq, ws, dtype=dtype, parts=sizes(f, op))

    def weight_grad(f: Frame, op: Op, dy: Tensor, x: Tensor, *ends: Tensor) -> Tensor:
        """x is what the forward product quantized; so is a gradient that came to the experts."""
        (reader,) = (o for o in f.graph.ops if op.result in o.operands)
        if not in_fp8(f, reader.symbols):
            return PLAIN[op.kind](f, op, dy, x, *ends)
        if any(o.kind == "unpermute_grad" and op.operands[0] in o.results for o in f.graph.ops):
            dy_columns = fp8.requantize(*fp8.quantize(dy, scale), *ends, scale=scale)
        else:
            dy_columns = fp8.quantize_columns(dy, *ends, scale=scale)
        x_columns = fp8.requantize(*fp8.quantize(x, scale), *ends, scale=scale)
        dtype = f.torch_dtype(op.result.type.dtype)
        return getattr(fp8, op.kind)(*dy_columns, *x_columns, *ends, dtype=dtype)

    kinds = {"": forward, "_input_grad": input_grad, "_weight_grad": weight_grad}
    return {f"{g}linear{end}": meaning for g in ("", "grouped_") for end, meaning in kinds.items()}


PLAIN: dict[str, Run] = dict(RUN)


def in_fp8(f: Frame, symbols: Sequence[str]) -> bool:
    return bool(f.graph.weights[symbols[0]].fp8)


def sizes(f: Frame, op: Op) -> list[int]:
    """Rows of each weight: runs begin anew with each."""
    return [f.graph.weights[symbol].type.dims[0].size or 0 for symbol in op.symbols]
