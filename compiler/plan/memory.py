"""What lies in the memory of a rank while it trains, by tensor, with the line behind each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from compiler.graph.types import BYTES
from compiler.ops.quantize import runs
from compiler.parallel.layout import Layout, Unit
from compiler.plan.placement import Bucket, Placed, buckets
from compiler.plan.saved import Activations
from compiler.plan.schedule import Schedule
from compiler.plan.transfers import most_held
from dsl.source import Span

# Sums over micro-batches are kept in FP32 (report, section 3.3.2).
GRADIENT_BYTES = 4
MASTER_BYTES = 4
SCALE_BYTES = 4


class Kind(StrEnum):
    """What memory is for, in the order in which tables list it."""

    WEIGHTS = "weights"
    FP8_COPIES = "fp8_copies"
    GRADIENTS = "gradients"
    MASTER = "master_weights"
    MOMENTS = "moments"
    ACTIVATIONS = "activations"
    WORKING = "working"

    @property
    def words(self) -> str:
        return self.value.replace("_", " ").replace("fp8", "FP8")


@dataclass(frozen=True)
class Use:
    """Memory of one tensor or kind of activation.

    `layer` is the first layer that it belongs to, if any; `span` is the equation behind it.
    """

    kind: Kind
    name: str
    bytes: int
    layer: int | None
    span: Span | None


@dataclass(frozen=True)
class RankMemory:
    """Of each rank with one pipeline coordinate, which all hold as much.

    `parameters` counts the elements that the rank holds.
    """

    pipeline: int
    parameters: int
    uses: tuple[Use, ...]

    @property
    def peak(self) -> int:
        return sum(use.bytes for use in self.uses)

    def of(self, kind: Kind) -> int:
        return self._of_kinds.get(kind, 0)

    @cached_property
    def _of_kinds(self) -> Mapping[Kind, int]:
        found: dict[Kind, int] = {}
        for use in self.uses:
            found[use.kind] = found.get(use.kind, 0) + use.bytes
        return found

    def largest(self) -> list[Use]:
        """Most first; all that one tensor takes of one kind counts together."""
        return sorted(self.uses, key=lambda use: (-use.bytes, use.kind.value, use.name))


def rank_memory(
    layout: Layout,
    placed: Sequence[Placed],
    saved: Mapping[range, Activations],
    order: Schedule,
    message: int,
    buffers: int,
    pipeline: int,
) -> RankMemory:
    """The memory of the ranks at `pipeline`; `saved` is by the operators of a unit.

    `order` is the schedule with its messages, of so many bytes each; `buffers` are bytes that every
    rank has for exchanges of tokens.
    """
    own = [one for one in placed if pipeline in one.pipelines]
    uses = [use for one in own for use in _weight_uses(one)]
    uses += [use for one in buckets(own) for use in _state_uses(one, layout.zero)]
    kept: dict[int, int] = {}
    for stage in layout.stages_of(pipeline):
        found = list(_activation_uses(layout, stage, saved))
        kept[stage] = sum(use.bytes for use in found) // layout.in_flight(stage)
        uses += found
    held = [unit for s in layout.stages_of(pipeline) for unit in layout.stages[s].units]
    without = sum(layout.in_flight(stage) * size for stage, size in kept.items())
    operands = {
        stage: sum(saved[unit.ops].operands for unit in layout.stages[stage].units)
        for stage in kept
    }
    span = saved[held[0].ops].working.span
    # First as if products of chunks I were computed at once.
    for name, waiting in (
        ("messages between stages", dict.fromkeys(kept, 0)),
        ("operands of gradients of weights that wait", operands),
    ):
        most = max(without, most_held(order, pipeline, kept, message, waiting))
        uses.append(Use(Kind.ACTIVATIONS, name, most - without, held[0].layer, span))
        without = most
    uses.append(_working_use(held, saved))
    uses.append(Use(Kind.WORKING, "buffers of exchanges", buffers, None, None))
    parameters = sum(one.on_rank for one in own)
    return RankMemory(pipeline, parameters, tuple(use for use in uses if use.bytes))


def _weight_uses(one: Placed) -> Iterator[Use]:
    sizes = {
        Kind.WEIGHTS: one.on_rank * BYTES[one.held.type.dtype],
        Kind.FP8_COPIES: _copy_bytes(one),
        Kind.GRADIENTS: one.on_rank * GRADIENT_BYTES if one.held.trainable else 0,
    }
    for kind, size in sizes.items():
        yield _use(kind, one, size)


def _state_uses(bucket: Bucket, zero: int) -> Iterator[Use]:
    """What the optimizer keeps, and what makes slices equal."""
    last = bucket.placed[-1]
    width = BYTES[last.held.type.dtype]
    # Weights in FP32 are their own masters. Moments are two, each in the element type of the weight
    # (report, section 3.3.2).
    masters = MASTER_BYTES if width < MASTER_BYTES else 0
    shares = bucket.shares() if zero else [one.on_rank for one in bucket.placed]
    for one, share in zip(bucket.placed, shares, strict=True):
        yield _use(Kind.MASTER, one, share * masters)
        yield _use(Kind.MOMENTS, one, share * 2 * width)
    widths = {Kind.WEIGHTS: width, Kind.GRADIENTS: GRADIENT_BYTES}
    if not zero:
        widths |= {Kind.MASTER: masters, Kind.MOMENTS: 2 * width}
    for kind, each in widths.items():
        yield _use(kind, last, bucket.padding * each)


def _use(kind: Kind, one: Placed, size: int) -> Use:
    return Use(kind, one.name, size, one.layers[0] if one.layers else None, one.held.span)


def _copy_bytes(one: Placed) -> int:
    """The FP8 copy of a weight: a byte a number, and a float32 scale for 128 x 128 of them."""
    if not one.held.fp8:
        return 0
    *_, rows, columns = (dim.size or 0 for dim in one.held.type.dims)
    scales = runs(rows) * runs(columns)
    return one.on_rank + SCALE_BYTES * scales * (one.on_rank // (rows * columns))


def _activation_uses(
    layout: Layout, stage: int, saved: Mapping[range, Activations]
) -> Iterator[Use]:
    times = layout.in_flight(stage)
    units: dict[range, list[Unit]] = {}
    for unit in layout.stages[stage].units:
        units.setdefault(unit.ops, []).append(unit)
    counted: set[str] = set()
    for ops, equal in units.items():
        for one in saved[ops].saved:
            if one.shared in counted:
                continue
            own = equal[:1] if one.shared else equal
            name = f"%{one.name} of {one.block}, {_counted(own)} x {times} micro-batches"
            yield Use(Kind.ACTIVATIONS, name, len(own) * times * one.bytes, own[0].layer, one.span)
            counted |= {one.shared} - {""}


def _counted(equal: Sequence[Unit]) -> str:
    layers = [unit.layer for unit in equal]
    if layers[0] is None:
        return "once"
    return f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"


def _working_use(units: Sequence[Unit], saved: Mapping[range, Activations]) -> Use:
    unit = max(units, key=lambda one: saved[one.ops].working.bytes)
    largest = saved[unit.ops].working
    name = f"{largest.name} of {largest.block}"
    return Use(Kind.WORKING, name, largest.bytes, unit.layer, largest.span)
