"""Which ranks hold which weights, and which part of their optimizer state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

from compiler.graph.core import Program
from compiler.parallel.layout import Layout
from compiler.plan.weights import HeldWeights, weights_of


@dataclass(frozen=True)
class Placed:
    """A weight, of each of `layers` if its name has a star, and where it lies.

    Every rank of the `pipelines` (pipeline ranks) holds `on_rank` of its elements: all of them,
    or those of its own routed experts. `copies` ranks hold the same elements.
    """

    held: HeldWeights
    layers: tuple[int, ...]
    pipelines: tuple[int, ...]
    on_rank: int
    copies: int

    @property
    def elements(self) -> int:
        """Different elements, in all layers and of all experts."""
        return self.held.elements * max(1, len(self.layers))

    @property
    def name(self) -> str:
        """The published name, with the layers written out: `model.layers.{3..6}.mlp.gate.weight`"""
        if not self.layers:
            return self.held.name
        first, last = self.layers[0], self.layers[-1]
        layers = str(first) if first == last else f"{{{first}..{last}}}"
        return self.held.name.replace("*", layers, 1)


# A slice is a whole number of so many elements (`runtime/train/buckets.py`).
ROW = 64


@dataclass(frozen=True)
class Bucket:
    """Trained weights of one element type that the same ranks hold, behind one another.

    Each of the ranks sums the gradients of an equal slice and, with ZeRO-1, updates that.
    """

    placed: tuple[Placed, ...]

    @property
    def copies(self) -> int:
        """How many ranks hold the same elements."""
        return self.placed[0].copies

    @property
    def elements(self) -> int:
        return sum(one.on_rank for one in self.placed)

    @property
    def slice(self) -> int:
        """The elements of a slice, the last of which may be none of any weight."""
        if self.copies == 1:
            return self.elements
        return -(-self.elements // (self.copies * ROW)) * ROW

    @property
    def padding(self) -> int:
        return self.copies * self.slice - self.elements

    def shares(self) -> tuple[int, ...]:
        """A slice, dealt to the weights by their sizes: what the mean rank has of each."""
        ends = [0, *accumulate(one.on_rank for one in self.placed)]
        size, elements = self.slice, self.elements
        cuts = [size * end // elements for end in ends]
        return tuple(stop - start for start, stop in pairwise(cuts))


def buckets(placed: Iterable[Placed]) -> tuple[Bucket, ...]:
    """Those of the weights of a rank."""
    found: dict[tuple[tuple[int, ...], int, str], list[Placed]] = {}
    for one in placed:
        if one.held.trainable:
            found.setdefault((one.pipelines, one.copies, one.held.type.dtype), []).append(one)
    return tuple(Bucket(tuple(members)) for members in found.values())


def placements(program: Program, layout: Layout) -> tuple[Placed, ...]:
    """Every weight of the model once, in the order of the stages."""
    mesh = layout.mesh
    weights = {
        unit.ops: weights_of(program, unit) for stage in layout.stages for unit in stage.units
    }
    found: dict[tuple[str, tuple[int, ...]], tuple[HeldWeights, set[int]]] = {}
    for stage in layout.stages:
        layers: dict[range, tuple[int, ...]] = {}
        for unit in stage.units:
            own = () if unit.layer is None else (unit.layer,)
            layers[unit.ops] = (*layers.get(unit.ops, ()), *own)
        for ops, numbers in layers.items():
            for held in weights[ops]:
                key = (held.name, numbers if "*" in held.name else ())
                _, pipelines = found.setdefault(key, (held, set()))
                pipelines.update(layout.holders(stage.index))
    return tuple(
        Placed(
            held,
            layers,
            tuple(sorted(pipelines)),
            held.elements * max(1, len(layers)) // (mesh.expert if held.routed else 1),
            len(pipelines) * (mesh.replicas if held.routed else mesh.data),
        )
        for (_, layers), (held, pipelines) in found.items()
    )
