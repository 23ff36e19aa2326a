"""The mesh: ranks are coordinates, groups cut the ranks, experts are spread evenly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.graph.types import MESH_AXES
from compiler.parallel.layout import Layout, Stage, units
from compiler.parallel.mesh import Mesh
from compiler.pipeline import compile
from compiler.plan.schedule import SCHEDULES, schedule
from dsl.load import load
from dslc.specs import shipped
from tests.support.schedules import under_way

meshes = st.builds(Mesh, *(st.integers(1, 5) for _ in range(3)), st.integers(1, 8))


@given(meshes)
def test_ranks_and_coordinates_are_one_to_one(mesh: Mesh) -> None:
    for rank in range(mesh.size):
        at = mesh.coordinates(rank)
        assert mesh.rank(at.pipeline, at.replica, at.expert) == rank
        assert at.pipeline < mesh.pipeline and at.replica < mesh.replicas
    assert mesh.node(mesh.size - 1) == mesh.nodes - 1


@given(meshes, st.sets(st.sampled_from(sorted(MESH_AXES))))
def test_groups_cut_the_ranks(mesh: Mesh, axes: set[str]) -> None:
    groups = {mesh.group(rank, axes) for rank in range(mesh.size)}
    assert all(rank in mesh.group(rank, axes) for rank in range(mesh.size))
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))


@pytest.mark.slow
@given(meshes)
def test_groups_of_different_axes_share_one_rank(mesh: Mesh) -> None:
    rank = mesh.size // 2
    met = set(mesh.group(rank, ("expert",))) & set(mesh.group(rank, ("replica", "mirror")))
    assert met == {rank}


@pytest.mark.parametrize("pipeline", range(6))
def test_under_dualpipe_a_stage_lies_on_the_ranks_of_its_mirror(pipeline: int) -> None:
    mesh = Mesh(pipeline=6, replicas=2, expert=4, node_size=8)
    layout = Layout(mesh, "dualpipe", (), 1, 12, 1)
    group = mesh.group(mesh.rank(pipeline, 1, 3), ("mirror",))
    assert sorted(layout.holders(pipeline)) == [mesh.coordinates(one).pipeline for one in group]


@given(meshes, st.integers(1, 4))
def test_every_expert_has_one_owner_in_a_group(mesh: Mesh, each: int) -> None:
    layout = Layout(mesh, "1f1b", (), 1, 1, 1)
    count = each * mesh.expert
    owners = [layout.owner(e, count) for e in range(count)]
    assert owners == [at for at in range(mesh.expert) for _ in range(each)]


def test_v3_as_published_keeps_each_group_of_experts_on_one_node() -> None:
    mesh = Mesh(pipeline=16, replicas=2, expert=64, node_size=8)
    assert (mesh.size, mesh.nodes, mesh.data) == (2048, 256, 128)
    layout = Layout(mesh, "dualpipe", (), 1, 120, 1)
    assert [layout.nodes_of_group(g, 8, 256) for g in range(8)] == [(n,) for n in range(8)]
    assert layout.stages_of(0) == (0, 15) and layout.stages_of(15) == (15, 0)
    assert layout.holders(3) == (3, 12)
    # Neighbours along the pipeline sit at the same place of their nodes.
    assert (mesh.rank(1, 0, 0) - mesh.rank(0, 0, 0)) % mesh.node_size == 0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("pipeline", "batches"), [(2, 8), (4, 8), (16, 120), (6, 12)])
def test_as_many_are_in_flight_as_the_schedule_has_under_way(
    name: str, pipeline: int, batches: int
) -> None:
    layout = Layout(Mesh(pipeline, 1, 1, 8), name, (), 1, batches, 1)
    order = schedule(name, pipeline, batches)
    for rank in range(pipeline):
        kept = sum(layout.in_flight(stage) for stage in layout.stages_of(rank))
        assert kept == under_way(order, rank)


def test_units_are_the_whole_outermost_block_in_order() -> None:
    main = compile(load(shipped()["deepseek_v3"])).programs["train"].main
    found = units(main)
    assert [unit.layer for unit in found] == [None, *range(61), None]
    indices = dict.fromkeys(i for unit in found for i in unit.ops)
    assert list(indices) == list(range(len(main.ops) - 1))
    assert Stage(0, found[:5]).layers == (0, 1, 2, 3)
