"""Which tensors a checkpoint of a model holds: names written out, shapes, types, first values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from compiler.graph.core import Graph, Op, Program
from compiler.lower.precision import published_in_fp8


@dataclass(frozen=True)
class Published:
    """A tensor under its published name. It begins as N(value, std^2).

    `trainable`: a gradient reaches it.
    `fp8`: FP8 checkpoints hold it as E4M3 with scales. `kept`: those of DeepSeek-V3 do, and those
    of this model do not. `copy_of` names the tensor that this one repeats: a checkpoint may hold
    it, a model does not.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    value: float
    std: float
    trainable: bool
    fp8: bool
    copy_of: str = ""
    kept: bool = False


def published(program: Program) -> Iterator[Published]:
    """Every tensor of a lowered program in the order of use, expert by expert; copies come last."""
    originals: dict[str, Published] = {}
    for one in _Walk(program).tensors(program.main, "", program.main.ops, ()):
        if one.name in program.aliases.values():
            originals[one.name] = one
        yield one
    for copy, original in program.aliases.items():
        yield replace(originals[original], name=copy, copy_of=original)


def kept_modules(tensors: Iterable[Published]) -> list[str]:
    """The modules of weights that are `kept`: `modules_to_not_convert` of a quantization config.

    All experts of a layer are one module, unless some of their weights are in FP8.
    """
    tensors = list(tensors)
    partly = {_experts(one.name) for one in tensors if one.fp8}
    found: dict[str, None] = {}
    for one in tensors:
        experts = _experts(one.name)
        if one.kept:
            whole = experts and experts not in partly
            found[experts if whole else one.name.removesuffix(".weight")] = None
    return list(found)


def _experts(name: str) -> str:
    """The module of all experts of which a weight is one's; empty for other weights."""
    block, experts, _ = name.partition(".experts.")
    return f"{block}.experts" if experts else ""


class _Walk:
    def __init__(self, program: Program) -> None:
        self._graphs = program.graphs
        self._fp8, self._kept = published_in_fp8(program)
        self._seen: set[tuple[str, str]] = set()

    def tensors(
        self, graph: Graph, prefix: str, ops: Sequence[Op], layers: tuple[int, ...]
    ) -> Iterator[Published]:
        """Of `ops` in a graph under the names of `prefix`, in `layers` of the repeats around."""
        for op in ops:
            for symbol in op.symbols:
                yield from self._weights(graph, prefix, symbol)
            if op.callee:
                scope = _written(op.text("scope"), layers)
                callee = self._graphs[op.callee]
                below = f"{prefix}{scope}." if scope else prefix
                yield from self.tensors(callee, below, callee.ops, ())
                continue
            for layer in _layers(op):
                for region in op.regions:
                    yield from self.tensors(graph, prefix, region.ops, (*layers, *layer))

    def _weights(self, graph: Graph, prefix: str, symbol: str) -> Iterator[Published]:
        """One weight; where it is that of an expert, all those of all experts of the graph.

        None that was given before.
        """
        before, star, _ = symbol.partition("*")
        if (prefix, before) in self._seen:
            return
        self._seen.add((prefix, before))
        if not star:
            yield self._tensor(graph, symbol, f"{prefix}{symbol}")
            return
        alike = [one for one in graph.weights if one.startswith(f"{before}*")]
        for expert in range(graph.weights[symbol].stack):
            for one in alike:
                yield self._tensor(graph, one, prefix + _written(one, (expert,)))

    def _tensor(self, graph: Graph, symbol: str, name: str) -> Published:
        weight = graph.weights[symbol]
        shape = tuple(dim.size or 0 for dim in weight.type.dims)
        fp8 = (graph.name, symbol) in self._fp8
        first = {"ones": 1.0, "zeros": 0.0}.get(weight.init, weight.value)
        std = weight.std if weight.init == "normal" else 0.0
        kept = (graph.name, symbol) in self._kept
        dtype, trainable = weight.type.dtype, weight.trainable
        return Published(name, shape, dtype, first, std, trainable, fp8, kept=kept)


def _layers(op: Op) -> Iterator[tuple[int, ...]]:
    """What is added to the layers around the regions of an operator, one for each run of them."""
    yield from ((layer,) for layer in op.layers) if op.kind == "repeat" else ((),)


def _written(name: str, numbers: Sequence[int]) -> str:
    """A name with each `*` replaced; the last star belongs to the last number."""
    parts = name.split("*")
    used = numbers[len(numbers) - len(parts) + 1 :]
    return parts[0] + "".join(f"{n}{p}" for n, p in zip(used, parts[1:], strict=True))
