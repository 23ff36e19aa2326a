"""One program for all stages that do the same; what the others run follows from it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from backends.build import build
from compiler.graph.parse import parse_program
from compiler.graph.text import print_program
from compiler.graph.verify import verify
from compiler.lower import lower
from compiler.parallel.layout import Layout, Stage, units
from compiler.parallel.mesh import Mesh
from compiler.pipeline import rank_passes, run, shared_prefix
from compiler.plan.check import problems
from compiler.plan.schedule import schedule_from_json
from compiler.roles import roles
from dsl.load import Description, load
from dsl.source import Source
from tests.support.places import TINY

DEEP = (
    "architecture.layers=[{repeat: 4, attention: MLA, feed_forward: SwiGLU(intermediate_size=32)}, "
    "{repeat: 7, attention: MLA, feed_forward: DeepSeekMoE}]"
)


def layout(of: Description, ends: list[int]) -> Layout:
    found = units(shared_prefix("train", lower(of), of).main)
    cuts = [0, *ends, len(found)]
    stages = tuple(Stage(i, found[a:b]) for i, (a, b) in enumerate(pairwise(cuts)))
    return Layout(Mesh(len(stages), 1, 2, 2), "1f1b", stages, 1, 1, 1)


@pytest.mark.slow
def test_programs_of_all_stages_follow_from_those_of_their_roles() -> None:
    """Units: the embedding, layers 0 to 3, layers 4 to 10, head and MTP modules."""
    of = load(TINY, sets=[DEEP])
    where = layout(of, [2, 3, 4, 5, 7, 9, 11, 12])
    shared = shared_prefix("train", lower(of), of)
    found = list(roles(of, lower(of), where))
    assert [r.name for r in found] == ["00", "01-03", "04", "05-06", "07", "08"]
    for role in found:
        verify(role.program)
        text = parse_program(Source("rank.graph", role.text(role.program)))
        assert print_program(text) == print_program(role.program)
        for stage in role.stages:
            passes = rank_passes("train", where, stage.index)
            *_, step = run("train", shared, passes, of)
            assert print_program(role.of(stage)) == print_program(step.program), stage.index


@pytest.mark.slow
def test_a_build_with_a_layout_holds_the_programs_of_its_ranks(tmp_path: Path) -> None:
    sets = ["parallel={cluster: cpu_2x2, pipeline: 2, expert: 2, batch: 8, sequence_length: 64}"]
    files = build(load(TINY, sets=sets), tmp_path / "tiny").files
    ranks = sorted(name for name in files if name.startswith("graph/rank"))
    assert ranks == [f"graph/rank-0{i}{end}.graph" for i in (0, 1) for end in ("-step", "")]
    for name in ranks:
        text = (tmp_path / "tiny" / name).read_text(encoding="utf-8")
        program = parse_program(Source(name, text))
        verify(program)
        ends = name.endswith("-step.graph")
        assert bool(program.backward) != ends
        assert ("reduce_scatter(" if ends else "dispatch(") in text
    order = (tmp_path / "tiny" / "graph" / "schedule.txt").read_text(encoding="utf-8")
    assert order.startswith("rank 0: 0F0 ") and len(order.splitlines()) == 2
    rows = schedule_from_json((tmp_path / "tiny" / "graph" / "schedule-4.json").read_text("utf-8"))
    assert str(rows) == order and problems(rows) == []
