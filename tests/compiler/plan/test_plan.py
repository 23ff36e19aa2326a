"""Plans: DeepSeek-V3 as published, and any layout of any spec."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from compiler.analysis import summary
from compiler.pipeline import Compiled, compile
from compiler.plan.make import planned
from compiler.plan.memory import Kind
from compiler.plan.placement import ROW, buckets
from compiler.plan.plan import Plan, Planner
from compiler.plan.search import why_not
from compiler.plan.traffic import holders
from dsl.load import load
from dsl.schema import Cluster, Parallel
from dslc.specs import shipped
from tests.support.planners import planner

# As published: numerics of the model, and of its two routed projections on the way.
V3_PARAMETERS, V3_MTP = 671_026_419_200, 11_610_068_224


@pytest.fixture(scope="module")
def v3() -> Plan:
    made, parallel = planner("deepseek_v3")
    return made.plan(parallel)


def placed_on_all_ranks(plan: Plan) -> int:
    return plan.layout.mesh.data * sum(rank.memory.parameters for rank in plan.ranks)


def test_v3_is_placed_whole_and_as_often_as_the_plan_says(v3: Plan) -> None:
    assert sum(one.elements for one in v3.placed) == V3_PARAMETERS + V3_MTP
    assert placed_on_all_ranks(v3) == sum(one.elements * one.copies for one in v3.placed)
    # Under DualPipe two pipeline ranks hold each stage: 2 x 128 copies, 2 x 2 of routed experts.
    copies = Counter((one.held.routed, one.copies) for one in v3.placed)
    assert set(copies) == {(False, 256), (True, 4)}
    shared = {one.name: one.pipelines for one in v3.placed if not one.layers}
    assert shared["model.embed_tokens.weight"] == shared["lm_head.weight"] == (0, 15)


def test_v3_has_four_routed_experts_on_each_rank_and_layer(v3: Plan) -> None:
    layout = v3.layout
    routed = [one for one in v3.placed if one.held.routed]
    layers = {n for one in routed for n in one.layers}
    assert layers == set(range(3, 61))
    expert = 2048 * 7168
    for one in routed:
        assert one.on_rank == 4 * expert * max(1, len(one.layers))
    assert Counter(layout.owner(e, 256) for e in range(256)) == dict.fromkeys(range(64), 4)


@pytest.mark.slow
def test_v3_sends_fp8_to_at_most_four_nodes_and_gets_bf16_back(v3: Plan) -> None:
    (exchange,) = v3.exchanges
    assert (exchange.dispatch, exchange.combine) == (7_392, 14_336)
    assert (exchange.nodes, exchange.k) == (4, 8)
    plain, parallel = planner("deepseek_v3", policy="bf16")
    assert {one.dispatch for one in plain.plan(parallel).exchanges} == {14_336}


def test_v3_fits_80_gb_on_every_rank_and_every_use_knows_its_line(v3: Plan) -> None:
    assert v3.fits and v3.cluster.memory == 80 * 10**9
    for rank in v3.ranks:
        assert rank.memory.peak == sum(rank.memory.of(kind) for kind in Kind) < 80 * 10**9
        assert all(use.span is not None for use in rank.memory.uses)


def test_buffers_of_symmetric_memory_count_on_every_rank() -> None:
    """Three, for 4,096 tokens of each of 8 ranks: y in bfloat16, and 8 gradients of weights."""
    made, parallel = planner("deepseek_v3")
    near = parallel.model_copy(update={"expert": 8})
    plain, plan = (
        made.plan(near.model_copy(update={"exchange": one}))
        for one in ("torch", "symmetric_memory")
    )
    for one, other in zip(plan.ranks, plain.ranks, strict=True):
        assert one.memory.peak - other.memory.peak == 3 * 8 * 4096 * (2 * 7168 + 4 * 8)


def test_what_waits_for_chunks_w_counts_where_it_is_more_than_what_was_saved() -> None:
    made, parallel = planner("deepseek_v3")
    name = "operands of gradients of weights that wait"
    found = {}
    for kind in ("dualpipe", "zero_bubble"):
        plan = made.plan(parallel.model_copy(update={"schedule": kind}))
        uses = [use for rank in plan.ranks for use in rank.memory.uses if use.name == name]
        found[kind] = [use.bytes for use in uses]
    assert found["dualpipe"] == []
    # Each rank has one more that waits than the one before, of four layers: 5.2 GB.
    steps = {b - a for a, b in pairwise(found["zero_bubble"][1:-1])}
    assert len(steps) == 1 and round(min(steps) / 10**8) == 52


def test_v3_keeps_one_micro_batch_more_than_there_are_stages(v3: Plan) -> None:
    layout = v3.layout
    for pipeline in range(16):
        assert sum(layout.in_flight(s) for s in layout.stages_of(pipeline)) == 17


def test_the_arithmetic_of_v3_is_that_of_the_model(v3: Plan) -> None:
    description = load(shipped()["deepseek_v3"])
    compiled = compile(description)
    numbers = summary(compiled.lowered, compiled.programs["decode"], sequence_length=4096)
    tokens = v3.parallel.batch * 4096
    of_model = sum((*numbers.training_flops.values(), *numbers.mtp_training_flops.values()))
    of_plan = sum(rank.flops.total for rank in v3.ranks) * v3.layout.mesh.data
    # The summary rounds FLOPs for each token down.
    assert of_model * tokens <= of_plan < (of_model + 50) * tokens
    # What a build keeps for the metrics of a run.
    assert v3.flops_of_token == of_plan // tokens
    busy = sum(v3.seconds(rank)["compute"] for rank in v3.ranks) * v3.layout.mesh.data
    assert v3.peak_seconds_of_token == pytest.approx(busy / tokens)


def test_a_step_of_v3_is_the_slowest_stage_with_the_bubble_of_dualpipe(v3: Plan) -> None:
    slow, fast = v3.slowest.total - v3.slowest.fp8, v3.slowest.fp8
    chunk = slow / 989e12 + fast / 1979e12
    step = v3.step_seconds()
    # 60 chunks from each end, forward and twice as much backward; (PP/2 - 1)(F&B + B - 3W) more.
    assert step == pytest.approx((120 * 3 + 7 * (3 + 2 - 3)) * chunk)
    # Published: 19.9 s, not at full speed.
    assert 5 < step < 19.9


def test_ranks_send_what_two_nodes_of_two_would() -> None:
    made, parallel = planner(
        "deepseek_v3_tiny",
        "{cluster: cpu_2x2, pipeline: 1, expert: 4, batch: 8, sequence_length: 16}",
    )
    plan = made.plan(parallel)
    (exchange,) = plan.exchanges
    # 16 experts in 4 groups, one on each rank; 2 of them are on both nodes. fp32: 4 bytes.
    assert (exchange.nodes, exchange.dispatch, exchange.combine) == (2, 4 * 64, 4 * 64)
    sent = {one.purpose: one for one in plan.ranks[0].sent}
    # 2 micro-batches, 4 layers with experts (2 of them MTP, one and two tokens shorter: counted as
    # whole ones), in which ranks say how many tokens come; a token of two meets the other node.
    # x goes with weights and numbers of 4 experts, then the gradient of y; y comes back, then the
    # gradients of x and of weights.
    calls, tokens = 2 * 4, 16
    there, back = 256 + 4 * 4 + 4 * 2 + 256, 256 + 256 + 4 * 4
    assert sent["dispatch"].bytes_across == calls * (tokens * there * 2 // 2 + 8)
    assert sent["dispatch"].messages_across == 3 * calls
    assert sent["dispatch"].bytes_inside == calls * (tokens * there * 4 // 2 + 8)
    assert sent["combine"].bytes_across == calls * tokens * back * 2 // 2
    assert sent["combine"].messages_across == 2 * calls
    assert "pipeline" not in sent
    dense = sum(one.on_rank for one in plan.placed if not one.held.routed and one.held.trainable)
    gradients = sent["gradients"].bytes_inside + sent["gradients"].bytes_across
    assert gradients == 3 * 4 * ROW * math.ceil(dense / 4 / ROW)


MODELS = [
    # Dense layers, layers with experts, depth of MTP, experts, tied embeddings.
    (0, 1, 0, 8, False),
    (1, 2, 2, 16, True),
    (3, 5, 1, 32, False),
]


@cache
def compiled_model(dense: int, sparse: int, mtp: int, experts: int, tied: bool) -> Compiled:
    groups = [
        f"{{repeat: {count}, attention: MLA, feed_forward: {block}}}"
        for count, block in ((dense, "SwiGLU(intermediate_size=96)"), (sparse, "DeepSeekMoE"))
        if count
    ]
    sets = [
        f"architecture.layers=[{', '.join(groups)}]",
        f"architecture.mtp.depth={mtp}",
        f"params.n_routed_experts={experts}",
        f"params.tie_word_embeddings={str(tied).lower()}",
    ]
    return compile(load(shipped()["deepseek_v3_tiny"], sets=sets))


layouts = st.builds(
    Parallel.model_construct,
    pipeline=st.sampled_from([1, 2, 3, 4]),
    expert=st.sampled_from([1, 2, 4, 8]),
    zero=st.integers(0, 1),
    schedule=st.sampled_from(["1f1b", "zero_bubble", "dualpipe", "dualpipe_v"]),
    batch=st.sampled_from([8, 24, 48, 96]),
    micro_batch=st.just(1),
    sequence_length=st.just(32),
)
clusters = st.builds(
    Cluster.model_construct,
    nodes=st.sampled_from([1, 2, 3, 4]),
    gpus_per_node=st.sampled_from([1, 2, 4, 8]),
)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.sampled_from(MODELS), layouts, clusters)
def test_any_layout_that_can_be_owns_every_weight_and_shards_it_exactly(
    model: tuple[int, int, int, int, bool], parallel: Parallel, cluster: Cluster
) -> None:
    compiled = compiled_model(*model)
    made = Planner(planned(compiled), compiled.programs["train"], cluster, longest=32)
    assume(not why_not(made, parallel))
    plan = made.plan(parallel)
    numbers = summary(compiled.lowered, compiled.programs["decode"])
    assert sum(one.elements for one in plan.placed) == numbers.parameters + numbers.mtp.parameters
    assert placed_on_all_ranks(plan) == sum(one.elements * one.copies for one in plan.placed)
    for one in plan.placed:
        group = holders(plan.layout, one.pipelines, one.held.routed, one.pipelines[0])
        assert len(group) == one.copies == len(set(group))
        if one.held.routed:
            assert one.on_rank * plan.layout.mesh.expert == one.elements
    for rank in plan.ranks:
        own = [one for one in plan.placed if rank.pipeline in one.pipelines]
        found = buckets(own)
        assert Counter(w for one in found for w in one.placed) == Counter(
            one for one in own if one.held.trainable
        )
        for bucket in found:
            # Elements of ranks beside one another are those of a weight, and few are of none.
            assert sum(bucket.shares()) == bucket.slice
            assert 0 <= bucket.padding < bucket.copies * ROW
            assert len({(one.pipelines, one.copies) for one in bucket.placed}) == 1
    layers = [n for stage in plan.layout.stages for n in stage.layers]
    assert layers == list(range(model[0] + model[1]))
    assert plan.fits and all(rank.memory.peak for rank in plan.ranks)
