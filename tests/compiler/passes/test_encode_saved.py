"""Saved activations in the formats of the spec: which, where, and what gradients become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compiler.graph.core import Op, Program
from compiler.graph.parse import parse_program
from compiler.graph.text import print_graph, print_program
from compiler.graph.verify import spans_missing, verify
from compiler.passes.encode_saved import ENCODE_SAVED
from compiler.pipeline import after
from dsl.diagnostic import DiagnosticError
from dsl.load import Description, load
from dsl.source import Source
from runtime import e5m6, fp8
from tests.interpret import RUN, State, random_inputs, random_weights, run
from tests.interpret.frame import Frame
from tests.support.models import description, model, published, results
from tests.support.places import TINY
from tests.support.ranks import gradients

FORMATS = "train.saved_formats={attention: e5m6, experts: fp8}"
ONE_MTP = "architecture.mtp.depth=1"


def tiny(*sets: str) -> Description:
    return load(TINY, sets=[ONE_MTP, *sets])


def saved(program: Program, graph: str) -> dict[str, str]:
    """Element types by name; the backward graph reads the same."""
    forward, backward = program.graphs[graph], program.graphs[f"{graph}_backward"]
    read = [(v.name, v.type) for v in backward.ops[0].results]
    assert [type for _, type in read] == [v.type for v in forward.saved]
    return {v.name: v.type.dtype for v in forward.saved}


@pytest.mark.parametrize("policy", ["fp32", "fp8_blockwise"])
def test_results_of_attention_and_inputs_of_swiglu_are_saved_in_fewer_bits(policy: str) -> None:
    program = after(tiny(f"precision.policy={policy}", FORMATS), "train", "encode_saved")
    verify(program)
    assert not list(spans_missing(program))
    text = print_program(program)
    assert print_program(parse_program(Source("saved.graph", text))) == text
    mla, moe = saved(program, "MLA"), saved(program, "DeepSeekMoE")
    assert (mla["o_packed"], mla["o_scale"]) == ("u8", "f32") and "o" not in mla
    assert (moe["gate_proj_up_q"], moe["gate_proj_up_s"]) == ("f8e4m3", "f32")
    # 16 numbers of a head in 24 bytes and a scale; gate and up of 32 experts in one run.
    sizes = {"batch": 1, "seq": 1, "slot": 1}
    graphs = program.graphs
    by_name = {v.name: v.type.bytes(sizes) for g in ("MLA", "DeepSeekMoE") for v in graphs[g].saved}
    assert by_name["o_packed"] == 4 * 24 and by_name["o_scale"] == 4 * 4
    assert by_name["gate_proj_up_q"] == 64 and by_name["gate_proj_up_s"] == 4
    # The shared expert saves what it computed.
    wide = "f32" if policy == "fp32" else "bf16"
    assert saved(program, "SwiGLU_32")["gate_proj_up"] == wide


def test_without_a_format_nothing_changes() -> None:
    spec = tiny("train.saved_formats={experts: fp8}")
    before, done = (after(spec, "train", name) for name in ("fuse_casts", "encode_saved"))
    assert print_graph(before.graphs["MLA"]) == print_graph(done.graphs["MLA"])
    moes = [print_graph(program.graphs["DeepSeekMoE"]) for program in (before, done)]
    assert moes[0] != moes[1]
    spec = tiny("train.saved_formats={attention: null}")
    assert not ENCODE_SAVED.run(before, spec)
    assert moes[0] == print_graph(before.graphs["DeepSeekMoE"])


def test_another_format_is_refused() -> None:
    with pytest.raises(DiagnosticError) as caught:
        tiny("train.saved_formats={attention: fp8, experts: e5m6}")
    assert [d.message for d in caught.value.diagnostics] == [
        "`fp8` is none of e5m6", "`e5m6` is none of fp8",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "least", "most"), [("fp32", 0.02, 0.03), ("fp8_blockwise", 0.02, 0.1)]
)
def test_gradients_are_those_at_the_saved_numbers(
    policy: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit those of a program whose `save` rounds what it is given; results stay.

    And how far all gradients together are from those of numbers saved as they were, in their norm:
    E4M3 has an error of 2.6 %, and other roundings of FP8 products follow from it.
    """
    spec = tiny(f"precision.policy={policy}", FORMATS)
    before, done = (after(spec, "train", name) for name in ("fuse_casts", "encode_saved"))
    plain, found = results(before), results(done)
    save: Any = RUN["save"]

    def rounded(f: Frame, op: Op, *x: Tensor) -> Any:
        left = {v.name for v in done.graphs[f.graph.name].saved}
        return save(f, op, *(
            t if v.name in left else at_format(t) for v, t in zip(op.operands, x, strict=True)
        ))  # fmt: skip

    def at_format(x: Tensor) -> Tensor:
        if x.dim() == 4:
            return e5m6.unpack(*e5m6.pack(x), x.shape[-1], dtype=x.dtype)
        return fp8.dequantize(*fp8.quantize(x), dtype=x.dtype)

    monkeypatch.setitem(RUN, "save", rounded)
    expected = results(before)
    assert len(found) == len(expected) > 50
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    first = len(before.main.results)
    assert all(map(torch.equal, found[:first], plain[:first]))
    one, other = (torch.cat([g.flatten().float() for g in r[first:]]) for r in (found, plain))
    assert least < (one - other).norm() / other.norm() < most


def test_generated_code_has_the_gradients_of_the_graph(tmp_path: Path) -> None:
    small = "architecture={layers: [{repeat: 1, attention: MLA, feed_forward: DeepSeekMoE}]}"
    program = after(description(small, FORMATS), "train", "encode_saved")
    weights, state = random_weights(program, dtype=torch.float64), State()
    inputs = random_inputs(program)
    given = {"balance_alpha": torch.tensor(0.0), "position": torch.arange(7).expand(2, -1)}
    run(program, inputs | given, weights, state=state, dtype=torch.float64)
    expected = gradients(program, weights, state)
    built = model(tmp_path, small, FORMATS)
    built.load_state_dict(weights)
    dtypes: set[torch.dtype] = set()

    def seen(tensor: Tensor) -> Tensor:
        dtypes.add(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, seen):
        loss = built.loss(inputs["tokens"], inputs["labels"])
    assert {torch.uint8, torch.float8_e4m3fn} <= dtypes
    loss.main.backward()
    found = {part.name: part.grad for part in published(built) if part.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        # Tables of angles are in float32.
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name
