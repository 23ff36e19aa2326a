"""Pictures of graphs: operators as boxes, values as arrows, regions as boxes around boxes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from compiler.graph.core import REPEATS, Graph, Op, Program, Region, Value
from compiler.graph.layout import Box, Drawing, arrange
from compiler.graph.types import Type
from dsl.source import Source, Span

# A picture with more boxes would be too wide to read, and slow to make.
MAX_OPERATORS = 400

CHARACTER = 6.7  # width of one, at the size below in a monospaced font
LINE = 15.0
PADDING = 8.0
MARGIN = 12.0

STYLE = """
.graph { --paper: #fff; --ink: #1c2733; --faint: #8a97a6; --quiet: #5a6877;
  --product: #dcebfa; --attention: #fde4cf; --expert: #e3f3dc; --call: #ece4f8; --plain: #f3f5f7; }
@media screen and (prefers-color-scheme: dark) {
  .graph { --paper: #14191f; --ink: #dfe6ee; --faint: #7d8b9a; --quiet: #aab7c4;
    --product: #1d3a57; --attention: #553218; --expert: #24462a; --call: #3a2c57;
    --plain: #232b34; }
}
.graph text { font: 11px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  fill: var(--ink); }
.graph .head { font-weight: 600; }
.graph .more { fill: var(--quiet); }
.graph .title { font-size: 14px; font-weight: 600; }
.graph rect { fill: var(--plain); stroke: var(--faint); stroke-width: 0.8; }
.graph .product rect { fill: var(--product); }
.graph .attention rect { fill: var(--attention); }
.graph .expert rect { fill: var(--expert); }
.graph .call rect { fill: var(--call); }
.graph .value rect { fill: none; stroke-dasharray: 3 2; }
.graph rect.region { fill: var(--paper); stroke: var(--ink); }
.graph rect.paper { fill: var(--paper); stroke: none; }
.graph path { fill: none; stroke: var(--faint); stroke-width: 1.1; }
.graph .tip { fill: var(--faint); stroke: none; }
"""

_STYLES = {
    "linear": "product",
    "embedding": "product",
    "rms_norm": "product",
    "add_rms_norm": "product",
    "attention": "attention",
    "document_attention": "attention",
    "lightning_indexer": "attention",
    "rotate": "attention",
    "rotate_halves": "attention",
    "rope_table": "attention",
    "cache_entry": "attention",
    "cache_append": "attention",
    "topk_groups": "expert",
    "gate": "expert",
    "gate_saving": "expert",
    "experts": "expert",
    "expert_load": "expert",
    "sequence_balance_loss": "expert",
    "call": "call",
}


@dataclass
class _Node:
    """A box with its text; `inside` is its content below the text."""

    style: str
    lines: list[str]
    about: str
    inside: list[_Diagram] = field(default_factory=list)
    target: str = ""

    def box(self) -> Box:
        widths = [len(line) * CHARACTER for line in self.lines]
        widths += [d.layout.width + 2 * MARGIN for d in self.inside]
        height = len(self.lines) * LINE + PADDING
        height += sum(d.layout.height + 3 * MARGIN for d in self.inside)
        return Box(max(widths) + 2 * PADDING, height)


@dataclass(frozen=True)
class _Diagram:
    nodes: Sequence[_Node]
    boxes: Sequence[Box]
    values: Sequence[Value]  # of each arrow
    layout: Drawing


def to_svg(program: Program) -> str:
    """One picture of all graphs, one below the other, the outermost first."""
    parts: list[str] = []
    top, width = MARGIN, 0.0
    for graph in reversed(program.graphs.values()):
        body, w, h = _drawn(graph)
        title = f'<text class="title" x="0" y="{LINE:.1f}">{_text(graph.name)}</text>'
        place = f'id="{_anchor(graph.name)}" transform="translate({MARGIN:.1f} {top:.1f})"'
        body = f'<g transform="translate(0 {2 * LINE:.1f})">\n{body}</g>'
        parts.append(f"<g {place}>\n{title}\n{body}\n</g>\n")
        top += h + 2 * LINE + 3 * MARGIN
        width = max(width, w, len(graph.name) * 9.0)
    paper = '<rect class="paper" x="-1" y="-1" width="100%" height="100%"/>\n'
    return _svg(width + 2 * MARGIN, top, f"<style>{STYLE}</style>\n{paper}{''.join(parts)}")


def picture(graph: Graph) -> str:
    """An `<svg>` element of one graph for a page that holds `STYLE`."""
    body, width, height = _drawn(graph)
    return _svg(width, height, body)


def _svg(width: float, height: float, body: str) -> str:
    # A pixel around, for the lines of boxes at the edge.
    width, height = width + 2, height + 2
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="-1 -1 {width:.1f} {height:.1f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" class="graph" {size}>\n{body}</svg>\n'


def _drawn(graph: Graph) -> tuple[str, float, float]:
    number = sum(1 for _ in graph.walk())
    if number > MAX_OPERATORS:
        words = f"{number:,} operators are too many for a picture"
        return f'<text x="0" y="{LINE:.1f}">{words}</text>\n', len(words) * CHARACTER, 2 * LINE
    names = list(zip(graph.result_names, graph.results, strict=True))
    diagram = _diagram(graph.args, graph.ops, names)
    return _draw(diagram), diagram.layout.width, diagram.layout.height


# ---- the content of a picture ---------------------------------------------------------------


def _diagram(
    args: Iterable[Value], ops: Sequence[Op], results: Iterable[tuple[str, Value]]
) -> _Diagram:
    nodes: list[_Node] = []
    origin: dict[Value, int] = {}
    arrows: dict[tuple[int, int], Value] = {}

    def add(node: _Node, reads: Iterable[Value], makes: Iterable[Value]) -> None:
        for value in reads:
            arrows.setdefault((origin[value], len(nodes)), value)
        origin.update((value, len(nodes)) for value in makes)
        nodes.append(node)

    inner = ops[:-1]
    for value in [*args, *(v for v in _outer(ops) if v not in args)]:
        add(
            _Node("value", [str(value), _shape(value.type)], f"{value} : {value.type}"), [], [value]
        )
    for op in inner:
        add(_node(op), [*op.operands, *_outer_of(op)], op.results)
    for name, value in results:
        add(_Node("value", [name], f"{name}: {value} : {value.type}"), [value], [])
    boxes = [node.box() for node in nodes]
    layout = arrange(boxes, list(arrows))
    return _Diagram(nodes, boxes, list(arrows.values()), layout)


def _outer(ops: Sequence[Op]) -> list[Value]:
    """Values that `ops` read and do not make, in order, each once."""
    made: set[Value] = set()
    found: dict[Value, None] = {}
    for op in ops:
        for value in [*op.operands, *_outer_of(op)]:
            if value not in made:
                found.setdefault(value)
        made |= set(op.results)
    return list(found)


def _outer_of(op: Op) -> list[Value]:
    """Values from outside that the regions of an operator read."""
    return [v for r in op.regions for v in _outer(r.ops) if v not in r.args]


def _node(op: Op) -> _Node:
    style = _STYLES.get(op.kind, "plain")
    lines = [op.kind]
    if op.callee:
        lines = [op.callee, f"as {op.attrs['scope'] or 'a part of this'}"]
    elif op.kind in REPEATS:
        lines = [f"{op.kind}: layers {op.layers[0]}..{op.layers[-1]}"]
    elif op.kind == "experts":
        lines = [f"experts: {op.attrs['count']}, {op.operands[1].type.last.words} for each token"]
    lines += [f"@{symbol}" for symbol in op.symbols]
    # Where there are several results, names tell them apart.
    several = len(op.results) > 1
    lines += [f"{v} " * several + _shape(v.type) for v in op.results]
    about = "\n".join([_sentence(op), *map(_place, op.spans)])
    inside = [_of_region(region) for region in op.regions]
    target = op.callee
    return _Node(style, lines, about, inside, target)


def _of_region(region: Region) -> _Diagram:
    return _diagram(region.args, region.ops, [(f"yield {v}", v) for v in region.yielded])


def _sentence(op: Op) -> str:
    results = ", ".join(map(str, op.results))
    inputs = ", ".join([*map(str, op.operands), *(f"@{s}" for s in op.symbols)])
    attrs = ", ".join(f"{name}={value}" for name, value in op.attrs.items())
    types = ", ".join(str(v.type) for v in op.results)
    return f"{results} = {op.kind}({inputs}){f' <{attrs}>' if attrs else ''} : {types}"


def _shape(type: Type) -> str:
    """Sizes only, where the names would not fit: `batch, seq, 128, 192`."""
    dims = ", ".join(str(d.size) if d.size is not None else str(d) for d in type.dims)
    return f"{type.dtype}[{dims}]"


def _place(span: Span) -> str:
    return f"{short_name(span.source)}:{span.line}:{span.column}"


def short_name(source: Source) -> str:
    """The name of a source without the folder where it happened to lie, the same on any machine."""
    name = source.name.replace("\\", "/")
    return name if name.startswith("specs/blocks/") else name.rsplit("/", 1)[-1]


# ---- SVG ------------------------------------------------------------------------------------


def _draw(diagram: _Diagram) -> str:
    parts = []
    for value, points in zip(diagram.values, diagram.layout.arrows, strict=True):
        about = f"<title>{_text(str(value))} : {_text(str(value.type))}</title>"
        x, y = points[-1]
        tip = f"M{x:.1f} {y:.1f}l-3.5 -7h7z"
        parts.append(f'<path d="{_curve(points)}">{about}</path><path class="tip" d="{tip}"/>\n')
    for node, box in zip(diagram.nodes, diagram.boxes, strict=True):
        parts.append(_draw_node(node, box))
    return "".join(parts)


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """Smooth from point to point, upright at each."""
    (x, y), rest = points[0], points[1:]
    parts = [f"M{x:.1f} {y:.1f}"]
    for to_x, to_y in rest:
        middle = (y + to_y) / 2
        parts.append(f"C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}")
        x, y = to_x, to_y
    return "".join(parts)


def _draw_node(node: _Node, box: Box) -> str:
    left = box.x - box.width / 2
    size = f'width="{box.width:.1f}" height="{box.height:.1f}" rx="4"'
    parts = [f"<title>{_text(node.about)}</title>", f"<rect {size}/>"]
    for i, line in enumerate(node.lines):
        style = "head" if not i else "weight" if line.startswith("@") else "more"
        place = f'x="{PADDING:.1f}" y="{(i + 1) * LINE:.1f}"'
        parts.append(f'<text class="{style}" {place}>{_text(line)}</text>')
    top = len(node.lines) * LINE + PADDING
    for diagram in node.inside:
        width, height = diagram.layout.width, diagram.layout.height
        frame = f'width="{box.width - MARGIN:.1f}" height="{height + 2 * MARGIN:.1f}" rx="3"'
        shift = (box.width - width) / 2
        parts.append(f'<rect class="region" x="{MARGIN / 2:.1f}" y="{top:.1f}" {frame}/>')
        parts.append(
            f'<g transform="translate({shift:.1f} {top + MARGIN:.1f})">\n{_draw(diagram)}</g>'
        )
        top += height + 3 * MARGIN
    group = f'<g class="{node.style}" transform="translate({left:.1f} {box.y:.1f})">'
    drawn = f"{group}{''.join(parts)}</g>\n"
    return f'<a href="#{_anchor(node.target)}">{drawn}</a>' if node.target else drawn


def _anchor(name: str) -> str:
    return _text(f"block-{name}")


def _text(text: str) -> str:
    """Escaped; control characters, which XML cannot hold, become a replacement character."""
    if not text.replace("\n", "").isprintable():
        text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    return escape(text)
