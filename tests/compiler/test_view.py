"""JSON, Graphviz and pictures of programs: complete, well-formed, safe, and readable."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiler.graph import svg, view
from compiler.graph.core import Graph, Op, Program, Value, Weight
from compiler.graph.layout import GAP, Box, arrange
from compiler.graph.types import Dim, Type
from compiler.lower import lower
from dsl.load import load
from tests.support.golden import Golden
from tests.support.places import SPECS

X = Type("bf16", (Dim("batch"), Dim("seq"), Dim("hidden_size", 8)))
HOSTILE = [
    "</text><script>alert(1)</script>",
    '"];} digraph evil {"',
    "back\\slash\\",
    'quote" onload="alert(1)',
    "line\nbreak & <b>ampersand</b> ]]> -->",
    "{{ 7 * 7 }}{% include 'x' %}",
]
# A document of XML cannot hold these at all.
CONTROL = "bell\x07 null\x00 escape\x1b"


@pytest.fixture(scope="module")
def tiny() -> Program:
    return lower(load(SPECS / "deepseek_v3_tiny.yaml"))


def one_block(program: Program, name: str) -> Program:
    graph = next(g for g in program.graphs.values() if g.name.startswith(name))
    return Program(program.name, graph.name, {graph.name: graph})


def named(text: str) -> Program:
    """A graph in which everything that has a name has this one."""
    x, y = Value(text, X), Value(text + "2", X)
    ops = [Op("linear", [x], (text,), results=[y], attrs={"about": text}), Op("return", [y])]
    weight = Weight(Type("bf16", (X.last, X.last)))
    graph = Graph(text, [x], ops, {text: weight}, result_names=(text,), about=text)
    return Program(text, text, {text: graph}, {text: text})


# ---- JSON -----------------------------------------------------------------------------------


def json_ops(ops: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for op in ops:
        yield op
        for region in op["regions"]:
            yield from json_ops(region["ops"])


def test_json_says_all_of_a_program(tiny: Program) -> None:
    value = json.loads(view.to_json(tiny))
    assert (value["program"], value["root"]) == (tiny.name, tiny.root)
    assert value["aliases"] == tiny.aliases
    assert [g["name"] for g in value["graphs"]] == list(tiny.graphs)
    for found, graph in zip(value["graphs"], tiny.graphs.values(), strict=True):
        assert [r["name"] for r in found["results"]] == list(graph.result_names)
        assert [w["name"] for w in found["weights"]] == list(graph.weights)
        for shown, op in zip(json_ops(found["ops"]), graph.walk(), strict=True):
            assert shown["kind"] == op.kind
            assert shown["operands"] == [v.name for v in op.operands]
            assert shown["symbols"] == list(op.symbols)
            assert json.dumps(shown["attrs"]) == json.dumps(op.attrs)
            assert shown["places"] == [s.location for s in op.spans] != []
            for result, value_ in zip(shown["results"], op.results, strict=True):
                dims = [(d["name"], d["size"], d["offset"]) for d in result["type"]["dims"]]
                assert dims == [(d.name, d.size, d.offset) for d in value_.type.dims]
                assert result["type"]["dtype"] == value_.type.dtype


# ---- Graphviz -------------------------------------------------------------------------------

STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def test_dot_of_a_block(tiny: Program, golden: Golden) -> None:
    golden("view/swiglu.dot", view.to_dot(one_block(tiny, "SwiGLU_32")))


def test_dot_has_a_node_for_each_operator_and_an_edge_for_each_use(tiny: Program) -> None:
    graphs = tiny.graphs.values()
    text = view.to_dot(tiny)
    ops = [op for g in graphs for op in g.walk()]
    args = [v for g in graphs for v in g.args]
    args += [v for op in ops for r in op.regions for v in r.args]
    nodes = re.findall(r"^ +g\d+_\d+ \[label=", text, re.MULTILINE)
    edges = re.findall(r"^ +g\d+_\d+ -> g\d+_\d+ \[tooltip=", text, re.MULTILINE)
    assert len(nodes) == len(ops) + len(args)
    assert len(edges) == sum(len(op.operands) for op in ops)
    clusters = text.count("subgraph cluster_")
    assert clusters == len(tiny.graphs) + sum(len(op.regions) for op in ops)
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_dot_keeps_texts_inside_strings(hostile: str) -> None:
    text = view.to_dot(named(hostile))
    outside = STRING.sub("", text)
    assert '"' not in outside
    assert set(re.findall(r"\w+", outside)) <= {
        "digraph", "subgraph", "label", "node", "shape", "box", "fontname", "monospace", "style",
        "dashed", "tooltip", *re.findall(r"g0_\d+|cluster_g0_\d+", outside),
    }  # fmt: skip
    assert text.count("\n") == view.to_dot(named("plain")).count("\n")


# ---- pictures -------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"
DRAWN = {"svg", "style", "g", "a", "rect", "path", "text", "title"}


def elements(text: str) -> list[ET.Element]:
    return list(ET.fromstring(text).iter())


def test_picture_of_a_block(tiny: Program, golden: Golden) -> None:
    golden("view/swiglu.svg", svg.to_svg(one_block(tiny, "SwiGLU_32")))


def test_a_picture_has_a_box_for_each_operator_and_says_its_type(tiny: Program) -> None:
    for graph in tiny.graphs.values():
        found = elements(svg.picture(graph))
        titles = [e.text or "" for e in found if e.tag == f"{SVG}title"]
        for op in graph.walk():
            if op.kind in ("yield", "return"):
                continue
            start = ", ".join(map(str, op.results)) + f" = {op.kind}("
            (title,) = [t for t in titles if t.startswith(start)]
            assert str(op.results[0].type) in title
            assert re.search(r"\w+\.(dsl|yaml):\d+:\d+", title)


def test_all_graphs_are_drawn_and_calls_lead_to_them(tiny: Program) -> None:
    found = elements(svg.to_svg(tiny))
    anchors = [e.attrib["id"] for e in found if "id" in e.attrib]
    assert anchors == [f"block-{name}" for name in reversed(tiny.graphs)]
    links = {e.attrib["href"] for e in found if e.tag == f"{SVG}a"}
    assert links == {f"#block-{name}" for name in tiny.graphs if name != tiny.root}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_pictures_show_texts_and_never_run_them(hostile: str) -> None:
    found = elements(svg.to_svg(named(hostile)))
    assert {e.tag.removeprefix(SVG) for e in found} <= DRAWN
    assert not any(name.startswith("on") for e in found for name in e.attrib)
    assert any(hostile in (e.text or "") for e in found)


def test_a_picture_stays_a_document_with_control_characters_in_names() -> None:
    found = elements(svg.to_svg(named(CONTROL)))
    assert any("bell\ufffd null\ufffd escape\ufffd" in (e.text or "") for e in found)


def test_a_picture_that_nobody_could_read_is_not_drawn() -> None:
    program = named("long")
    graph = program.main
    value = graph.args[0]
    for i in range(svg.MAX_OPERATORS + 1):
        result = Value(f"y{i}", X)
        graph.ops.insert(-1, Op("silu", [value], results=[result]))
        value = result
    assert "operators are too many for a picture" in svg.picture(graph)


def test_names_of_places_are_the_same_on_every_machine(tmp_path: Path) -> None:
    folder = tmp_path / "somewhere"
    folder.mkdir()
    copied = folder / "deepseek_v3_tiny.yaml"
    copied.write_text((SPECS / "deepseek_v3_tiny.yaml").read_text())
    here = svg.to_svg(lower(load(SPECS / "deepseek_v3_tiny.yaml")))
    there = svg.to_svg(lower(load(copied)))
    assert here == there and "somewhere" not in there


# ---- layout ---------------------------------------------------------------------------------


@st.composite
def drawings(draw: st.DrawFn) -> tuple[list[Box], list[tuple[int, int]]]:
    count = draw(st.integers(1, 14))
    size = st.integers(1, 300).map(float)
    boxes = [Box(draw(size), draw(size)) for _ in range(count)]
    pairs = [(i, j) for j in range(count) for i in range(j)]
    arrows = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=30)) if pairs else []
    return boxes, arrows


@given(drawings())
def test_boxes_lie_apart_and_arrows_lead_down_past_them(
    drawing: tuple[list[Box], list[tuple[int, int]]],
) -> None:
    boxes, arrows = drawing
    layout = arrange(boxes, arrows)
    slack = 1e-6
    for box in boxes:
        assert -slack <= box.x - box.width / 2
        assert box.x + box.width / 2 <= layout.width + slack
        assert box.y >= 0 and box.y + box.height <= layout.height + slack
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            if a.layer == b.layer:
                assert abs(a.x - b.x) >= (a.width + b.width) / 2 + GAP - slack
    for (i, j), points in zip(arrows, layout.arrows, strict=True):
        assert boxes[i].layer < boxes[j].layer
        assert points[0] == (boxes[i].x, boxes[i].y + boxes[i].height)
        assert points[-1] == (boxes[j].x, boxes[j].y)
        for (x, y), (to_x, to_y) in pairwise(points):
            assert y < to_y or (y == to_y and x == to_x)
            crossed = [
                b for b in boxes if y < b.y + b.height and b.y < to_y and x == to_x
                and abs(b.x - x) < b.width / 2
            ]  # fmt: skip
            assert not crossed


def test_neighbours_stand_below_each_other() -> None:
    """A chain is straight; of two branches the one that is left above stays left."""
    boxes = [Box(20, 10), Box(60, 10), Box(20, 10)]
    arrange(boxes, [(0, 1), (1, 2)])
    assert len({box.x for box in boxes}) == 1
    top, left, right, left_end, right_end = fork = [Box(20, 10) for _ in range(5)]
    arrange(fork, [(0, 1), (0, 2), (2, 4), (1, 3)])
    assert left.x < top.x < right.x
    assert left_end.x < right_end.x
