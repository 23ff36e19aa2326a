"""The published numbers of DeepSeek-V3 and its relatives follow from their graphs.

Expected values are those of the V3 report, of the published checkpoint's headers, and of table 1
of arXiv 2505.09343; what these do not print is computed by the formulas beside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compiler.analysis import Module, Submodule, Summary, Work, modules, summary, total
from compiler.graph.build import site_of
from compiler.graph.core import Graph, Op, Program
from compiler.lower import lower
from compiler.ops import Site
from compiler.pipeline import compile
from dsl.diagnostic import DiagnosticError
from dsl.load import load
from tests.support.places import SPECS


@cache
def numbers(spec: str, *sets: str, seq: int = 4096, context: int = 4096) -> Summary:
    compiled = compile(load(SPECS / f"{spec}.yaml", sets=sets))
    decode = compiled.programs["decode"]
    return summary(compiled.lowered, decode, sequence_length=seq, context_length=context)


V3 = "deepseek_v3"
V2 = "deepseek_v2_236b"
LITE = "deepseek_v2_lite"


def inside(module: Module) -> Iterator[Submodule]:
    for part in module.parts:
        yield part
        yield from inside(part.module)


def block(spec: str, name: str) -> Module:
    """The module of the first use of a block whose name begins so."""
    parts = inside(numbers(spec).model)
    return next(p.module for p in parts if p.module.block.startswith(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "parameters", "activated", "without_embedding", "in_layers"),
    [
        (V3, 671_026_419_200, 37_552_297_472, 36_625_618_432, 35_698_939_392),
        (V2, 235_741_434_880, 21_375_800_320, 20_851_512_320, 20_327_224_320),
        (LITE, 15_706_484_224, 2_661_150_208, 2_451_435_008, 2_241_719_808),
    ],
)
def test_parameters_of_the_model(
    spec: str, parameters: int, activated: int, without_embedding: int, in_layers: int
) -> None:
    facts = numbers(spec)
    assert facts.parameters == parameters
    assert facts.activated == activated
    assert facts.activated_without_embedding == without_embedding
    assert facts.activated_in_layers == in_layers


@pytest.mark.parametrize(
    ("spec", "attention", "dense", "dense_layer", "moe_layer", "moe_layer_activated"),
    [
        (V3, 187_107_328, 396_361_728, 583_483_392, 11_507_286_272, 585_318_656),
        (V2, 149_227_520, 188_743_680, 337_981_440, 3_972_116_480, 338_800_640),
        (LITE, 13_763_072, 67_239_936, 81_007_104, 584_847_872, 83_104_256),
    ],
)
def test_parameters_of_each_block(
    spec: str,
    attention: int,
    dense: int,
    dense_layer: int,
    moe_layer: int,
    moe_layer_activated: int,
) -> None:
    assert block(spec, "MLA").parameters == attention
    assert block(spec, "SwiGLU").parameters == dense
    first, rest = numbers(spec).model.parts
    assert first.module.parameters == dense_layer
    assert rest.module.parameters == moe_layer
    assert rest.module.activated == moe_layer_activated
    norms = [t.parameters for t in first.module.tensors]
    assert norms == [numbers(spec).model.tensors[1].parameters] * 2


@pytest.mark.parametrize(
    ("spec", "expert", "router", "routed", "embedding"),
    [
        (V3, 44_040_192, 1_835_008 + 256, 653_908_770_816, 926_679_040),
        (V2, 23_592_960, 819_200, 222_717_542_400, 524_288_000),
        (LITE, 8_650_752, 131_072, 14_394_851_328, 209_715_200),
    ],
)
def test_shares(spec: str, expert: int, router: int, routed: int, embedding: int) -> None:
    facts = numbers(spec)
    moe = next(p.module for p in inside(facts.model) if Work.ROUTED_EXPERTS in p.module.elements)
    experts = [t for t in _tensors(moe) if t.work is Work.ROUTED_EXPERTS]
    assert sum(t.parameters // t.count for t in experts) == expert
    assert moe.elements[Work.GATE] == router
    assert facts.model.elements[Work.ROUTED_EXPERTS] == routed
    assert facts.model.elements[Work.EMBEDDING] == embedding
    assert facts.model.elements[Work.HEAD] == embedding
    assert total(facts.model.elements) == facts.parameters


def _tensors(module: Module) -> list[modules.TensorCount]:
    return [*module.tensors, *(t for p in inside(module) for t in p.module.tensors)]


@pytest.mark.slow
def test_multi_token_prediction_stands_apart() -> None:
    facts = numbers(V3)
    assert facts.mtp.parameters == 11_610_068_224
    assert facts.mtp.activated == 688_100_608
    assert facts.mtp.activated + facts.mtp_shared == 2_541_458_688
    (part,) = facts.mtp.parts
    assert (part.name, part.count) == ("model.layers.61", 1)
    assert part.module.parameters == 11_507_286_272 + 102_760_448 + 21_504
    assert numbers(V2).mtp.parameters == 0
    # Each depth has a module of its own.
    assert numbers(V3, "architecture.mtp.depth=3").mtp.parameters == 3 * facts.mtp.parameters


def test_the_checkpoint() -> None:
    facts = numbers(V3)
    assert facts.stored == 684_489_845_504
    assert facts.stored_bytes == 1_368_979_721_216  # with the bias of gates in float32
    assert facts.tensor_count == 91_991 - 45_808  # all but the scales of FP8
    published = list(facts.published())
    assert sum(p.count for p in published) == facts.tensor_count
    assert sum(p.elements for p in published) == facts.stored
    assert sum(p.bytes for p in published) == facts.stored_bytes
    assert len({p.name for p in published}) == len(published)


def test_published_names_and_shapes() -> None:
    found = {p.name: (p.shape, p.dtype, p.count) for p in numbers(V3).published()}
    expert = "mlp.experts.{0..255}.down_proj.weight"
    bias = "mlp.gate.e_score_correction_bias"
    assert found[f"model.layers.{{3..60}}.{expert}"] == ((7168, 2048), "bf16", 58 * 256)
    assert found[f"model.layers.61.{expert}"] == ((7168, 2048), "bf16", 256)
    assert found[f"model.layers.{{3..60}}.{bias}"] == ((256,), "f32", 58)
    kv_a = "model.layers.{0..2}.self_attn.kv_a_proj_with_mqa.weight"
    assert found[kv_a] == ((576, 7168), "bf16", 3)
    assert found["lm_head.weight"] == ((129280, 7168), "bf16", 1)
    copies = {p.name: p.original for p in numbers(V3).published() if p.original}
    assert copies == {
        "model.layers.61.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight": "lm_head.weight",
    }


def test_the_text_of_names_counts_what_they_stand_for() -> None:
    """`{a..b}` in a name covers b - a + 1 numbers, and their product is the count."""
    for p in numbers(V3).published():
        stands_for = 1
        for piece in p.name.split("{")[1:]:
            first, last = piece.split("}")[0].split("..")
            stands_for *= int(last) - int(first) + 1
        assert stands_for == p.count, p.name


@pytest.mark.parametrize(("spec", "gflop"), [(V3, 250.45), (V2, 155.3)])
def test_training_flops(spec: str, gflop: float) -> None:
    flops = numbers(spec).training_flops
    assert round(total(flops) / 1e9, 2 if spec == V3 else 1) == gflop


def test_training_flops_by_share() -> None:
    """V3 at 4,096: six for each activated element, and the core of attention."""
    flops = numbers(V3).training_flops
    weights = 6 * (numbers(V3).activated_without_embedding - 1_006_592 - 58 * 256)
    core = 3 * 61 * 2 * 128 * (192 + 128) * 4096 // 2
    assert flops[Work.ATTENTION_CORE] == core
    assert total(flops) == weights + core == 250_449_887_232
    assert flops[Work.GATE] == 6 * 58 * 256 * 7168
    assert flops[Work.ROUTED_EXPERTS] == 6 * 58 * 8 * 3 * 7168 * 2048
    assert flops[Work.SHARED_EXPERTS] == 6 * 58 * 3 * 7168 * 2048
    assert flops[Work.DENSE] == 6 * 3 * 3 * 7168 * 18432
    assert flops[Work.HEAD] == 6 * 129280 * 7168
    assert Work.EMBEDDING not in flops and Work.NORMS not in flops


def test_what_is_in_fp8() -> None:
    """V3: all products with weights but gates and head; MTP and the core of attention apart."""
    v3 = numbers(V3)
    mla = 7168 * (1536 + 576) + 1536 * 24576 + 512 * 32768 + 16384 * 7168
    expert = 3 * 7168 * 2048
    active = 61 * mla + 3 * 3 * 7168 * 18432 + 58 * 9 * expert
    assert v3.fp8_flops == 6 * active
    assert v3.product_flops == 6 * (active + 58 * 256 * 7168 + 129280 * 7168)
    assert f"{v3.fp8_flops / v3.product_flops:.2%}" == "97.18%"
    assert v3.model.fp8_elements == active + 58 * 248 * expert
    assert numbers(V3, "precision.policy=bf16").fp8_flops == 0


@pytest.mark.slow
def test_mtp_flops_are_those_of_the_positions_that_have_a_later_token() -> None:
    """Depth 1 sees 4,095 of 4,096 positions; its head is the model's."""
    flops = numbers(V3).mtp_training_flops
    assert flops[Work.OTHER_PROJECTIONS] == 6 * 7168 * 14336 * 4095 // 4096
    assert flops[Work.HEAD] == 6 * 129280 * 7168 * 4095 // 4096
    assert numbers(V2).mtp_training_flops == {}
    short = numbers(V3, "architecture.mtp.depth=3", seq=2).mtp_training_flops
    assert short[Work.HEAD] == 6 * 129280 * 7168 // 2  # only depth 1 has a position


@pytest.mark.slow
def test_decoding_flops() -> None:
    short, long = numbers(V3, context=1), numbers(V3, context=1001)
    # numerics: 2 * 576 + 2 * 512 for each key and head, in the latent space
    core = 61 * 128 * (2 * 576 + 2 * 512)
    assert short.decoding_flops[Work.ATTENTION_CORE] == core
    assert long.decoding_flops[Work.ATTENTION_CORE] == 1001 * core
    # What does not look at the cache costs the same, a third of training.
    for work in (Work.GATE, Work.ROUTED_EXPERTS, Work.SHARED_EXPERTS, Work.DENSE, Work.HEAD):
        assert short.decoding_flops[work] == long.decoding_flops[work]
        assert 3 * short.decoding_flops[work] == short.training_flops[work]


@pytest.mark.slow
def test_flops_of_a_window() -> None:
    """Two of four layers see 64 tokens: in training all but the triangle before the window."""
    short = numbers("local_global_mini", seq=256, context=256)
    pair = 2 * 6 * (32 + 32)
    seen = 2 * 256**2 // 2 + 2 * (256**2 - 192**2) // 2
    assert short.training_flops[Work.ATTENTION_CORE] == 3 * pair * seen // 256
    assert short.decoding_flops[Work.ATTENTION_CORE] == pair * (2 * 256 + 2 * 64)
    within = numbers("local_global_mini", seq=32, context=32)
    assert within.training_flops[Work.ATTENTION_CORE] == 3 * pair * 4 * 32**2 // 2 // 32
    latent = numbers(LITE, "params.window=64", context=1000)
    assert latent.decoding_flops[Work.ATTENTION_CORE] == 27 * 16 * (2 * 576 + 2 * 512) * 64


@pytest.mark.slow
def test_decoding_makes_no_keys_and_values_of_what_is_cached() -> None:
    flops = numbers(V3, context=1000).decoding_flops
    assert Work.CACHE_PROJECTIONS not in flops
    # Folding kv_b_proj into query and output costs what projecting one token does.
    training = numbers(V3).training_flops[Work.ATTENTION_PROJECTIONS]
    assert flops[Work.ATTENTION_PROJECTIONS] == training // 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "cache", "with_mtp"),
    [(V3, 70_272, 71_424), (V2, 69_120, 69_120), (LITE, 31_104, 31_104)],
)
def test_cache_bytes(spec: str, cache: int, with_mtp: int) -> None:
    facts = numbers(spec)
    assert (facts.cache_bytes, facts.cache_bytes_with_mtp) == (cache, with_mtp)
    wide = ("precision.policy=fp32", "train.saved_bytes_per_token=64M")
    assert numbers(spec, *wide).cache_bytes == 2 * cache


def test_a_tied_head_is_counted_once_and_belongs_to_the_arithmetic() -> None:
    tied, untied = numbers(V2, "params.tie_word_embeddings=true"), numbers(V2)
    table = 102_400 * 5120
    assert tied.parameters == untied.parameters - table
    assert Work.EMBEDDING not in tied.model.elements
    assert tied.activated_without_embedding == untied.activated_without_embedding
    assert tied.training_flops == untied.training_flops


def test_json_holds_every_number() -> None:
    facts = numbers(V3)
    values = json.loads(json.dumps(facts.to_json()))
    assert values["parameters"]["total"] == 671_026_419_200
    assert values["flops_per_token"]["training"]["total"] == 250_449_887_232
    assert values["cache_bytes_per_token"] == {"model": 70_272, "with_mtp": 71_424}
    layers = values["modules"]["model"]["parts"][1]
    assert (layers["name"], layers["count"]) == ("model.layers.{3..60}", 58)
    assert layers["parameters"] == 11_507_286_272


@pytest.mark.slow
@settings(max_examples=12)
@given(
    dense=st.integers(1, 4),
    moe=st.integers(1, 4),
    experts=st.integers(2, 12).map(lambda n: 4 * n),
    active=st.integers(1, 4),
    shared=st.integers(0, 3),
    q_lora_rank=st.integers(0, 3).map(lambda n: 8 * n),
    seq=st.integers(3, 9).map(lambda n: 2 * n),
)
@example(dense=1, moe=1, experts=8, active=4, shared=0, q_lora_rank=0, seq=6)
def test_the_formulas_hold_for_any_size(
    dense: int, moe: int, experts: int, active: int, shared: int, q_lora_rank: int, seq: int
) -> None:
    sets = (
        f"architecture.layers.0.repeat={dense}",
        f"architecture.layers.1.repeat={moe}",
        f"params.n_routed_experts={experts}",
        f"params.num_experts_per_tok={active}",
        f"params.n_shared_experts={shared}",
        f"params.q_lora_rank={q_lora_rank}",
    )
    facts = numbers("deepseek_v3_tiny", *sets, seq=seq)
    d, heads, vocab, c, nope, rope, v, wide, narrow = 64, 4, 512, 24, 16, 8, 16, 192, 32
    q = d * q_lora_rank + q_lora_rank * heads * (nope + rope) if q_lora_rank else 0
    q = q or d * heads * (nope + rope)
    attention = q + d * (c + rope) + c * heads * (nope + v) + heads * v * d
    inner_norms = q_lora_rank + c
    layer = attention + inner_norms + 2 * d
    both = 2 * vocab * d + d

    def model(met: int) -> int:
        experts_of_layer = experts * d + experts + (met + shared) * 3 * d * narrow
        return both + dense * (layer + 3 * d * wide) + moe * (layer + experts_of_layer)

    assert facts.parameters == model(experts)
    assert facts.activated == model(active)
    core = (dense + moe) * 2 * heads * (nope + rope + v) * seq // 2
    norms = d + (dense + moe) * (inner_norms + 2 * d)
    products = model(active) - vocab * d - norms - moe * experts
    assert total(facts.training_flops) == 3 * (2 * products + core)
    assert facts.cache_bytes == (dense + moe) * (c + rope) * 4


@pytest.mark.slow
def test_the_cost_does_not_grow_with_layers_and_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    def operators_looked_at(*sets: str) -> int:
        seen = 0

        def counting(op: Op, graph: Graph, graphs: Mapping[str, Graph]) -> Site:
            nonlocal seen
            seen += 1
            return site_of(op, graph, graphs)

        compiled = compile(load(SPECS / "deepseek_v3.yaml", sets=sets))
        with monkeypatch.context() as patch:
            patch.setattr(modules, "site_of", counting)
            summary(compiled.lowered, compiled.programs["decode"])
        return seen

    many = (
        "architecture.layers.1.repeat=1000",
        "params.n_routed_experts=4096",
        "train.saved_bytes_per_token=1G",
    )
    assert operators_looked_at() == operators_looked_at(*many) > 0


HEADER = "(x: [.., hidden_size]) -> [.., hidden_size]:\n  params hidden_size\n"
LAYER = "SwiGLU(intermediate_size=10944)"


def lowered(folder: Path, blocks: str, old: str, new: str) -> Program:
    """V2-Lite with the blocks of a file of its own, and with `new` in place of `old`."""
    (folder / "own.dsl").write_text(blocks)
    text = (SPECS / "deepseek_v2_lite.yaml").read_text()
    assert old in text
    text = text.replace(old, new).replace("blocks: [", "blocks: [./own.dsl, ")
    (folder / "spec.yaml").write_text(text)
    return lower(load(folder / "spec.yaml"))


def test_a_weight_that_is_used_twice_is_counted_once_and_computed_twice(tmp_path: Path) -> None:
    inner = f"block Square{HEADER}  return linear(x, to = hidden_size, name = w)\n"
    body = "  return Square(Square(x, name = a), name = {})\n"
    twice = f"{inner}\nblock Twice{HEADER}{body.format('a')}"
    apart = f"{inner}\nblock Twice{HEADER}{body.format('b')}"
    shared, separate = (
        summary(program, program)
        for program in (lowered(tmp_path, text, LAYER, "Twice") for text in (twice, apart))
    )
    assert separate.parameters - shared.parameters == 2048 * 2048
    assert separate.tensor_count - shared.tensor_count == 1
    assert shared.training_flops == separate.training_flops
    assert shared.training_flops[Work.DENSE] == 2 * 6 * 2048 * 2048


def test_a_model_whose_modules_cannot_be_listed_is_refused(tmp_path: Path) -> None:
    """Blocks that each hold two of the next: 2^16 modules from sixteen short blocks."""
    body = "  return Nest{0}(Nest{0}(x, name = a), name = b)\n"
    blocks = [f"block Nest{i}{HEADER}{body.format(i + 1)}" for i in range(16)]
    last = f"block Nest16{HEADER}  return linear(x, to = hidden_size, name = w)\n"
    program = lowered(tmp_path, "\n".join([*blocks, last]), LAYER, "Nest0")
    with pytest.raises(DiagnosticError) as caught:
        summary(program, program)
    (problem,) = caught.value.diagnostics
    assert problem.code == "E590"
    assert "modules and weights" in problem.message
