"""Where boxes and arrows of a picture go: layers from top to bottom, few crossings, short arrows.

The method is the layered one of Sugiyama, Tagawa and Toda (1981): longest-path layers, order
within a layer by the middle of the neighbours, then positions as near to the neighbours as the
order allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

SWEEPS = 6
GAP = 18.0  # between boxes of a layer
LAYER_GAP = 30.0


@dataclass
class Box:
    """A rectangle; `x` is its middle and `y` its top once it is placed."""

    width: float
    height: float
    x: float = 0.0
    y: float = 0.0
    layer: int = 0
    floor: float = 0.0  # where its layer ends
    # Boxes that arrows come from and go to, those that only reserve space for an arrow included.
    above: list[Box] = field(default_factory=list, repr=False)
    below: list[Box] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Drawing:
    """Size of the picture, and the points that each arrow passes, first and last on its boxes."""

    width: float
    height: float
    arrows: tuple[tuple[tuple[float, float], ...], ...]


def arrange(boxes: Sequence[Box], arrows: Sequence[tuple[int, int]]) -> Drawing:
    """Places `boxes`; an arrow (i, j) leads from box i to a later box j."""
    _choose_layers(boxes, arrows)
    chains = [_chain(boxes[i], boxes[j]) for i, j in arrows]
    layers: list[list[Box]] = [[] for _ in range(max((b.layer for b in boxes), default=-1) + 1)]
    for box in boxes:
        layers[box.layer].append(box)
    for chain in chains:
        for box in chain[1:-1]:
            layers[box.layer].append(box)
    _order(layers)
    _place(layers)
    width = max((b.x + b.width / 2 for layer in layers for b in layer), default=0.0)
    height = max((b.y + b.height for b in boxes), default=0.0)
    return Drawing(width, height, tuple(tuple(_points(chain)) for chain in chains))


def _choose_layers(boxes: Sequence[Box], arrows: Sequence[tuple[int, int]]) -> None:
    sources: list[list[int]] = [[] for _ in boxes]
    targets: list[list[int]] = [[] for _ in boxes]
    for i, j in arrows:
        sources[j].append(i)
        targets[i].append(j)
    for j, box in enumerate(boxes):
        box.layer = max((boxes[i].layer + 1 for i in sources[j]), default=0)
    # A box with more arrows out than in is better off near where these lead.
    for i in reversed(range(len(boxes))):
        if len(targets[i]) > len(sources[i]):
            boxes[i].layer = min(boxes[j].layer for j in targets[i]) - 1


def _chain(first: Box, last: Box) -> list[Box]:
    """The two boxes of an arrow, with a thin one in every layer between them, linked."""
    between = [Box(2.0, 0.0, layer=i) for i in range(first.layer + 1, last.layer)]
    chain = [first, *between, last]
    for upper, lower in pairwise(chain):
        upper.below.append(lower)
        lower.above.append(upper)
    return chain


def _order(layers: list[list[Box]]) -> None:
    for layer in layers:
        _number(layer)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            # Boxes without neighbours on that side keep their place.
            layer.sort(key=lambda box: _middle(box.above if down else box.below, box.x))
            _number(layer)


def _number(layer: list[Box]) -> None:
    for i, box in enumerate(layer):
        box.x = (i + 0.5) / len(layer)


def _middle(neighbours: Sequence[Box], otherwise: float) -> float:
    return sum(n.x for n in neighbours) / len(neighbours) if neighbours else otherwise


def _place(layers: list[list[Box]]) -> None:
    top = 0.0
    for layer in layers:
        floor = top + max(box.height for box in layer)
        for box in layer:
            box.x, box.y, box.floor = 0.0, top, floor
        top = floor + LAYER_GAP
        _spread(layer)
    for sweep in range(SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            for box in layer:
                box.x = _middle([*box.above, *box.below], box.x)
            _spread(layer)
    left = min((b.x - b.width / 2 for layer in layers for b in layer), default=0.0)
    for layer in layers:
        for box in layer:
            box.x -= left


def _spread(layer: list[Box]) -> None:
    """Moves boxes apart that overlap, all together as little as possible, and keeps their order.

    Measured from where each box would stand if all touched, places may only grow: the nearest
    growing sequence comes from joining neighbours that shrink and giving them their mean.
    """
    offsets = [0.0]
    for left, right in pairwise(layer):
        offsets.append(offsets[-1] + (left.width + right.width) / 2 + GAP)
    runs: list[tuple[float, int]] = []  # mean, number of boxes
    for box, offset in zip(layer, offsets, strict=True):
        mean, count = box.x - offset, 1
        while runs and runs[-1][0] > mean:
            before, number = runs.pop()
            mean = (before * number + mean * count) / (number + count)
            count += number
        runs.append((mean, count))
    places = (mean for mean, count in runs for _ in range(count))
    for box, offset, place in zip(layer, offsets, places, strict=True):
        box.x = place + offset


def _points(chain: list[Box]) -> Iterator[tuple[float, float]]:
    # Straight through each layer, so that no box of it is crossed; between layers as it comes.
    first, last = chain[0], chain[-1]
    yield first.x, first.y + first.height
    if first.floor > first.y + first.height:
        yield first.x, first.floor
    for box in chain[1:-1]:
        yield box.x, box.y
        yield box.x, box.floor
    yield last.x, last.y
