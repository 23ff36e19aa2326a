"""Which ranks hold which weights, and which part of their optimizer state."""

from __future__ import annotations

from dataclasses import dataclass

from compiler.graph.core import Program
from compiler.parallel.layout import Layout
from compiler.plan.weights import Held, weights_of


@dataclass(frozen=True)
class Placed:
    """A weight, of each of `layers` if its name has a star, and where it lies.

    Every rank of the `pipelines` (pipeline ranks) holds `on_rank` of its elements: all of them,
    or those of its own routed experts. `copies` ranks hold the same elements.
    """

    held: Held
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

    def shard(self, copy: int) -> range:
        """The elements, of those on a rank, whose optimizer state the holder `copy` keeps (ZeRO-1).

        Holders count from 0 to `copies` - 1 in the order of their ranks.
        """
        start, stop = (self.on_rank * n // self.copies for n in (copy, copy + 1))
        return range(start, stop)


def placements(program: Program, layout: Layout) -> tuple[Placed, ...]:
    """Every weight of the model once, in the order of the stages."""
    mesh = layout.mesh
    weights = {
        unit.ops: weights_of(program, unit) for stage in layout.stages for unit in stage.units
    }
    found: dict[tuple[str, tuple[int, ...]], tuple[Held, set[int]]] = {}
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
