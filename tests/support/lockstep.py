"""A training step of all ranks of a layout: each executes its row of the schedule, in lockstep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compiler.graph.core import Graph, Program
from compiler.parallel.layout import Layout
from compiler.plan.schedule import Chunk, Receive, Schedule, Send
from tests.interpret import State, run
from tests.interpret.comm import Rank, World
from tests.support.ranks import counts, share

Tensors = Mapping[str, Tensor]


class Row:
    """One rank: what it has been given, computed and saved so far, by stage and micro-batch."""

    def __init__(
        self,
        rank: Rank,
        programs: Sequence[Program],
        order: Schedule,
        batches: Sequence[Tensors],
        weights: Tensors,
    ) -> None:
        self.rank, self.programs, self.order = rank, programs, order
        self.batches, self.weights = batches, weights
        self.grads: dict[str, Tensor] = {}
        self.states: dict[tuple[int, int], State] = {}
        self.arrived: dict[tuple[str, int, int], list[Tensor]] = {}
        self.made: dict[int, list[Tensor]] = {}
        self.numbers = {message: n for n, message in enumerate(order.messages)}

    def execute(self) -> None:
        """All of a step but its end."""
        for entry in self.order.rows[self.rank.place.pipeline]:
            if isinstance(entry, tuple):
                for chunk in entry:
                    self._compute(chunk)
            elif isinstance(entry, Send):
                receiver = self.order.messages[entry.number].receiver
                self.rank.send(receiver, (entry.number, self.made.pop(entry.number)))
            elif isinstance(entry, Receive):
                message = self.order.messages[entry.number]
                number, tensors = self.rank.receive(message.sender)
                assert number == entry.number, f"message {number} for {entry.number}"
                self.arrived[message.key] = tensors
        assert not self.states and not self.arrived and not self.made

    def _compute(self, chunk: Chunk) -> None:
        program, at = self.programs[chunk.stage], (chunk.stage, chunk.batch)
        if chunk.kind == "F":
            self.states[at] = State(grads=self.grads)
            inputs = {**self.batches[chunk.batch], **counts(program, self.batches)}
            given = {v.name: share(v, inputs[v.name], self.rank) for v in program.main.args
                     if v.name in inputs}  # fmt: skip
            self._cross(chunk, program.main, program.boundary.received, given)
        elif chunk.kind in "BI":
            backward = program.graphs[program.backward]
            given = {v.name: torch.ones((), dtype=torch.float64) for v in backward.args}
            self._cross(chunk, backward, program.backward_boundary.received, given)
        if chunk.kind in "BW":
            if program.weights:
                self._run(chunk, program.graphs[program.weights], {})
            del self.states[at]

    def _cross(
        self, chunk: Chunk, graph: Graph, received: Sequence[str], given: dict[str, Tensor]
    ) -> None:
        """Runs a graph with what arrived for it; what it makes for other stages goes there."""
        key = chunk.reads
        assert key is not None
        given |= dict(zip(received, self.arrived.pop(key, ()), strict=True))
        results = self._run(chunk, graph, given)
        program, forward = self.programs[chunk.stage], chunk.kind == "F"
        crosses = program.boundary if forward else program.backward_boundary
        leaving = [results[name] for name in crosses.sent]
        message = self.order.message(chunk)
        if message is not None:
            self.made[self.numbers[message]] = leaving
        elif leaving:  # the next stage is on the same rank
            self.arrived[key[0], chunk.stage + (1 if forward else -1), chunk.batch] = leaving

    def _run(self, chunk: Chunk, graph: Graph, given: Tensors) -> dict[str, Tensor]:
        state = self.states[chunk.stage, chunk.batch]
        program = self.programs[chunk.stage]
        results = run(program, given, self.weights, graph=graph.name, state=state,
                      rank=self.rank, dtype=torch.float64)  # fmt: skip
        return dict(zip(graph.result_names, results, strict=True))


def train_step(
    where: Layout,
    order: Schedule,
    programs: Sequence[Program],
    ends: Sequence[Program],
    batches: Sequence[Tensors],
    weights: Tensors,
) -> dict[str, Tensor]:
    """The weights after a step, of all ranks; whoever holds a weight has the same new values.

    Gradients are clipped to a norm of 1. `programs` and `ends` are by stage, `batches` the
    micro-batches of all data ranks together.
    """
    world = World(where.mesh)

    def one(rank: Rank) -> dict[str, Tensor]:
        row = Row(rank, programs, order, batches, weights)
        row.execute()
        renewed = dict(weights)
        here = {s: State(grads=row.grads) for s in sorted(where.stages_of(rank.place.pipeline))}
        squares = torch.zeros((), dtype=torch.float64)
        options: Any = {"rank": rank, "dtype": torch.float64}
        for stage, state in here.items():
            squares += sum(run(ends[stage], {}, renewed, state=state, **options))
        factor = (1 / sum(rank.everywhere(squares)).sqrt()).clamp(max=1)
        for stage, state in here.items():
            end, given = ends[stage], {"factor": factor}
            run(end, given, renewed, graph=end.update, state=state, **options)
        return {name: value for name, value in renewed.items() if value is not weights[name]}

    found: dict[str, Tensor] = {}
    for renewed in world.run(one):
        for name, value in renewed.items():
            assert torch.equal(found.setdefault(name, value), value), name
    return found
