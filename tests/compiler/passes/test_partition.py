"""The programs of all ranks together compute what the program of one rank does, and send no more
than they may. Ranks run in lockstep in the interpreter (`tests/interpret/comm.py`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from compiler.graph.build import site_of
from compiler.graph.core import Boundary, Graph, Op, Program, copy_program
from compiler.graph.parse import parse_program
from compiler.graph.text import link_lines, print_graph, print_program
from compiler.graph.verify import spans_missing, verify
from compiler.ops import OPS
from compiler.ops.comm import Dispatch
from compiler.parallel.layout import Layout, Stage, units
from compiler.parallel.mesh import Mesh
from compiler.passes.cut_stages import cut_stages
from compiler.passes.partition import partition
from compiler.pipeline import PIPELINES, after
from dsl.diagnostic import DiagnosticError, render
from dsl.load import Description, load
from dsl.source import Source
from tests.interpret import State, random_inputs, random_weights, run
from tests.interpret.comm import World
from tests.interpret.operators import LEARNING_RATE
from tests.support.golden import Golden
from tests.support.longcat import small as longcat
from tests.support.models import description
from tests.support.places import SPECS, TINY
from tests.support.ranks import (
    MESHES,
    end_of,
    gradients,
    layout,
    named,
    rank_programs,
    run_ranks,
    uncut,
)

LAST = PIPELINES["train"][-1].name


def check_same(of: Description, where: Layout, name: str = "train") -> World:
    """Whether all ranks together compute what one does. Gives what they sent."""
    single = after(of, name, PIPELINES[name][-1].name)
    sizes = {"batch": 2 * where.mesh.data, "seq": 7}
    inputs = random_inputs(single, sizes, dtype=torch.float64)
    weights = random_weights(single, dtype=torch.float64)
    state = State()
    results = run(single, inputs, weights, state=state, dtype=torch.float64)
    expected = dict(zip(named(single.main), results, strict=True))
    grads = gradients(single, weights, state)
    expected |= {f"gradient of {weight}": grad for weight, grad in grads.items()}
    expected |= {f"new {n}": weights[n] - LEARNING_RATE * grad for n, grad in grads.items()}
    assert bool(grads) == (name == "train")
    programs = rank_programs(of, where, name)
    for program in programs:
        verify(program)
        assert not spans_missing(program)
        again = parse_program(Source("rank.graph", print_program(program)))
        assert print_program(again) == print_program(program)
    ends = [end_of(of, where, i, program) for i, program in enumerate(programs)]
    ends = ends if name == "train" else []
    world, found = run_ranks(programs, where.mesh, inputs, weights, ends=ends)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12, msg=key)
    return world


DENSE = """
model: dense
blocks: [causal_lm, decoder, gqa, swiglu]
params: {vocab_size: 64, hidden_size: 32}
architecture:
  layers:
    - repeat: 4
      attention: GQA(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
      feed_forward: SwiGLU(intermediate_size=48)
sequence: {max_position_embeddings: 64}
precision: {policy: fp32}
train: {}
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward", "train"])
@pytest.mark.parametrize("mesh", MESHES)
def test_all_ranks_together_compute_what_one_does(mesh: str, name: str) -> None:
    of = description()
    check_same(of, layout(MESHES[mesh], of), name)


@pytest.mark.slow
def test_a_mask_between_documents_is_that_of_each_ranks_sequences() -> None:
    of = description("train.document_mask=true")
    check_same(of, layout(MESHES["2 stages x 2 replicas x 2 experts"], of))


@pytest.mark.slow
def test_biases_and_free_parameters_are_those_of_all_ranks() -> None:
    """Biases of experts, and gradients that are sums over dimensions that were broadcast."""
    of = load(SPECS / "examples" / "biased.yaml", sets=["architecture.layers.1.repeat=1"])
    check_same(of, layout(MESHES["2 replicas"], of))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"), [("sinks", "2 replicas"), ("sparse", "2 stages x 2 replicas x 2 experts")]
)
def test_sinks_are_those_of_all_ranks_and_indexer_losses_their_mean(name: str, mesh: str) -> None:
    of = load(SPECS / "examples" / f"{name}.yaml")
    check_same(of, layout(MESHES[mesh], of))


@pytest.mark.slow
def test_tokens_that_are_given_back_stay_where_they_are() -> None:
    of = longcat("precision.policy=fp32", "architecture.layers.0.repeat=1")
    check_same(of, layout(MESHES["2 stages x 2 replicas x 2 experts"], of))


@pytest.mark.slow
def test_models_without_experts_are_partitioned(tmp_path: Path) -> None:
    """Their balance loss is a number, and no sum over ranks."""
    (tmp_path / "dense.yaml").write_text(DENSE)
    of = load(tmp_path / "dense.yaml")
    check_same(of, layout(Mesh(2, 2, 1, 2), of))


@pytest.mark.slow
def test_gradients_of_weights_may_wait() -> None:
    of = description("architecture.mtp.depth=1")
    where = replace(layout(MESHES["2 stages x 2 replicas x 2 experts"], of), schedule="zero_bubble")
    assert all(program.weights for program in rank_programs(of, where))
    check_same(of, where)


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [(1, 2), (1, 4), (2, 3), (3, 4)])
def test_stages_may_be_cut_anywhere_between_layers(cuts: tuple[int, int]) -> None:
    """Also with nothing but the embedding first, or nothing but head and MTP modules last."""
    of = description()
    check_same(of, layout(MESHES["3 stages"], of, *cuts))


# Each example takes a second: what fails is small enough as it is.
@pytest.mark.slow
@settings(max_examples=8, phases=[Phase.generate])
@given(st.data())
def test_random_specs_on_random_meshes(data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.sampled_from([1, 2, 4]))
    experts = draw(st.sampled_from([8, 16]))
    keep = draw(st.integers(1, groups))
    k = draw(st.integers(1, min(4, keep * experts // groups)))
    of = description(
        f"params.n_group={groups}", f"params.n_routed_experts={experts}",
        f"params.topk_group={keep}", f"params.num_experts_per_tok={k}",
        f"params.n_shared_experts={draw(st.integers(0, 1))}",
        f"architecture.mtp.depth={draw(st.integers(0, 1))}",
    )  # fmt: skip
    expert = draw(st.sampled_from([1, 2, 4]))
    mesh = Mesh(draw(st.integers(1, 3)), draw(st.integers(1, 2)), expert,
                draw(st.sampled_from([n for n in (1, 2, 4) if n <= expert])))  # fmt: skip
    count = len(units(uncut(of).main))
    cuts = sorted(draw(st.permutations(range(1, count)))[: mesh.pipeline - 1])
    check_same(of, layout(mesh, of, *cuts))


# ---- one layer of experts -----------------------------------------------------------------------


def moe_layer(of: Description, mesh: Mesh) -> tuple[Program, Program]:
    """A program and the same of each rank; the layer also gives away the route."""
    single = uncut(of)
    moe = single.graphs["DeepSeekMoE"]
    route = next(op for op in moe.ops if op.kind == "topk_groups").results[0]
    moe.result_names = (*moe.result_names, "route")
    moe.ops[-1].operands.append(route)
    single.root = moe.name
    single.graphs = {name: single.graphs[name] for name in (*moe.calls(), moe.name)}
    single.aliases = {}
    ranks = copy_program(single)
    partition(layout(mesh, of)).run(ranks, of)
    return single, ranks


def one(graph: Graph, kind: str) -> Op:
    (found,) = [op for op in graph.walk() if op.kind == kind]
    return found


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_bytes_are_those_of_tokens_and_their_nodes(groups: int) -> None:
    """Counted message by message; and, once more, from the route alone."""
    of = description(f"params.n_group={groups}", f"params.topk_group={(groups + 1) // 2}")
    mesh, layer = MESHES["2 nodes x 2 ranks"], "DeepSeekMoE"
    single, ranks = moe_layer(of, mesh)
    sizes = {"batch": 8, "seq": 5}
    inputs = random_inputs(single, sizes, graph=layer)
    weights = random_weights(single, graph=layer)
    expected = run(single, inputs, weights, graph=layer)
    world, found = run_ranks([ranks], mesh, inputs, weights, layer, dtype=None)
    torch.testing.assert_close(found["deepseekmoe"], expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found["load"], expected[2])
    graph = ranks.graphs[layer]
    dispatch, combine = one(graph, "dispatch"), one(graph, "combine")
    limit = dispatch.attrs["limit"]
    assert limit == {4: 2, 2: 1, 1: 2}[groups]
    each, k, hidden = 4, 4, 64
    row, routing = 4 * hidden, k * (8 + 4)
    for rank in world.ranks:
        route = found["route"].chunk(mesh.data)[rank.number].flatten(0, -2)
        across = inside = 0
        for experts in route.tolist():
            to = {e // each for e in experts}
            nodes = {r // 2 for r in to}
            assert len(nodes) <= limit
            across += len(nodes - {rank.number // 2})
            inside += len({r for r in to if r % 2 != rank.number % 2})
        sent = {k: (v.intra_node, v.inter_node) for k, v in rank.sent.items()}
        assert sent["dispatch"] == (inside * (row + routing), across * (row + routing))
        assert sent["combine"] == (inside * row, across * row)
        here = {"batch": 2, "seq": 5}
        for op in (dispatch, combine):
            most = OPS[op.kind].moved(site_of(op, graph, ranks.graphs), here)
            assert sent[op.kind] <= (most.intra_node, most.inter_node)
            assert sent[op.kind][0] <= most.intra_node and sent[op.kind][1] <= most.inter_node


def test_the_backward_pass_sends_each_token_once_out_and_once_back() -> None:
    """By the handle of the forward pass, gradients of weights in the message of those of rows."""
    of = description()
    (program,) = rank_programs(of, layout(MESHES["2 nodes x 2 ranks"], of))
    backward = program.backward_of("DeepSeekMoE")
    assert backward is not None
    exchanges = [
        op for op in backward.walk() if op.kind in ("dispatch", "dispatch_again", "combine")
    ]
    assert [(op.kind, len(op.results)) for op in exchanges] == [
        ("dispatch_again", 1),
        ("combine", 2),
    ]


def test_a_token_that_goes_to_too_many_nodes_is_noticed() -> None:
    of, mesh = description(), MESHES["2 nodes x 2 ranks"]
    single, ranks = moe_layer(of, mesh)
    for kind in ("dispatch", "combine"):
        one(ranks.graphs["DeepSeekMoE"], kind).attrs["limit"] = 1
    inputs = random_inputs(single, {"batch": 8, "seq": 5}, graph="DeepSeekMoE")
    weights = random_weights(single, graph="DeepSeekMoE")
    with pytest.raises(AssertionError, match="a token goes to 2 nodes"):
        run_ranks([ranks], mesh, inputs, weights, "DeepSeekMoE")


def test_limit_follows_from_groups_and_nodes() -> None:
    """V3: 8 groups, each on a node of its own, 4 of them for a token."""
    of = load(TINY.with_name("deepseek_v3.yaml"))
    program = uncut(of)
    partition(Layout(Mesh(1, 2, 64, 8), "1f1b", (), 1, 1, 1)).run(program, of)
    moe = program.graphs["DeepSeekMoE"]
    assert one(moe, "dispatch").attrs == {"count": 256, "ranks": 64, "nodes": 8, "limit": 4}
    assert moe.weights["experts.*.up_proj.weight"].stack == 4
    assert str(one(moe, "dispatch").results[0].type) == (
        "bf16[arrived@(replica, expert), hidden_size=7168]"
    )


@pytest.mark.slow
def test_bytes_of_a_token_of_v3() -> None:
    """In the finished graph: FP8 and scales out, 7392 bytes a token and node; BF16 back, 14336."""
    of = load(TINY.with_name("deepseek_v3.yaml"))
    where = Layout(Mesh(1, 2, 64, 8), "1f1b", (Stage(0, units(uncut(of).main)),), 1, 1, 1)
    (program,) = rank_programs(of, where)
    moe = program.graphs["DeepSeekMoE"]
    there = site_of(one(moe, "dispatch"), moe, program.graphs)
    assert Dispatch.token_bytes(there) == 7168 + 4 * 56 == 7392
    back = one(moe, "combine").operands[0].type
    assert str(back).startswith("bf16[arrived@(replica, expert)") and back.last.size == 7168


# ---- golden texts ------------------------------------------------------------------------------


def test_one_layer_of_experts_over_2_nodes_of_2_ranks(golden: Golden) -> None:
    of = description("architecture.mtp.depth=0")
    program = uncut(of)
    texts = [f"// before partition\n{print_graph(program.graphs['DeepSeekMoE'])}"]
    partition(layout(MESHES["2 nodes x 2 ranks"], of)).run(program, of)
    verify(program)
    texts.append(f"// 2 nodes of 2 ranks\n{print_graph(program.graphs['DeepSeekMoE'])}")
    golden("passes/partition.graph", "\n".join(texts))


def test_the_end_of_a_step(golden: Golden) -> None:
    """Gates and norms are shared by all ranks, experts by the two replicas."""
    of = description("architecture.mtp.depth=0")
    where = layout(MESHES["2 replicas"], of)
    (program,) = rank_programs(of, where)
    end = end_of(of, where, 0, program)
    texts = [
        print_graph(end.graphs[name])
        for name in (
            "DeepSeekMoE_reduce",
            "DeepSeekMoE_update",
            "CausalLM_reduce",
            "CausalLM_update",
        )
    ]
    golden("passes/optimizer_step.graph", "\n".join(texts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"update": "Other"}, "there is no graph @Other"),
        ({"reduce": "CausalLM_update"}, "@CausalLM_update takes something"),
        ({"update": "CausalLM_reduce"}, "takes or gives anything but the factor"),
        ({"update": "DeepSeekMoE_update"}, "@DeepSeekMoE_update reads"),
    ],
)
def test_the_phases_of_a_step_fit_each_other(change: dict[str, str], message: str) -> None:
    of = description("architecture.mtp.depth=0")
    where = layout(MESHES["2 replicas"], of)
    end = end_of(of, where, 0, rank_programs(of, where)[0])
    end.steps["CausalLM"] = replace(end.steps["CausalLM"], **change)
    with pytest.raises(DiagnosticError) as error:
        verify(end)
    assert any(message in one.message for one in error.value.diagnostics)


def test_three_stages(golden: Golden) -> None:
    of = description("architecture.mtp.depth=0")
    where = layout(MESHES["3 stages"], of, 2, 3)
    texts = [f"// before cut_stages\n{print_graph(uncut(of).main)}"]
    for stage in range(3):
        program = uncut(of)
        cut_stages(where, stage).run(program, of)
        verify(program)
        head = "\n".join(link_lines(program))
        texts.append(f"// stage {stage}\n// {head}\n{print_graph(program.main)}")
    golden("passes/cut_stages.graph", "\n".join(texts))


@pytest.mark.slow
def test_a_count_is_one_of_an_argument() -> None:
    of = description("architecture.mtp.depth=0")
    program = rank_programs(of, layout(MESHES["3 stages"], of, 2, 3))[2]
    assert program.counts == {"valid": "labels"}
    program.counts["valid"] = "tokens"
    with pytest.raises(DiagnosticError, match="has no argument tokens"):
        verify(program)


@pytest.mark.parametrize(
    ("boundary", "message"),
    [
        (Boundary(("h",), ("h_7",)), "@CausalLM has no argument h"),
        (Boundary(("h_4_in",), ("h",)), "@CausalLM has no single result h"),
        (Boundary(("h_4_in", "balance_alpha"), ("h_7",)), "of (f32[batch, seq, hidden_size=64], "
         "f32[]) the gradients do not cross it the other way"),
    ],
)  # fmt: skip
def test_a_boundary_is_that_of_the_program(boundary: Boundary, message: str) -> None:
    of = description("architecture.mtp.depth=0")
    program = rank_programs(of, layout(MESHES["3 stages"], of, 2, 3))[1]
    verify(program)
    program.boundary = boundary
    with pytest.raises(DiagnosticError) as error:
        verify(program)
    assert message in error.value.diagnostics[0].message


def test_what_only_all_stages_together_know_cannot_be_cut(golden: Golden) -> None:
    of = description()
    program = uncut(of)
    total = next(op for op in program.main.ops if op.kind == "sum")
    total.kind = "sigmoid"
    total.result.type = total.operands[0].type
    cut = cut_stages(layout(MESHES["3 stages"], of), 1)
    with pytest.raises(DiagnosticError) as caught:
        cut.run(program, of)
    golden("passes/E519_stages.txt", render(caught.value.diagnostics))
