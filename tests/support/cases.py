"""A random model, and all that can be seen of its programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compiler.graph.core import Program
from compiler.lower import lower
from dsl.load import Description
from tests.interpret import State, random_inputs, random_weights, run

CHUNKS = (4, 1, 2)
"""Tokens that a decoder is given at a time."""


class Case:
    """A random model with weights and inputs, the same ones for all of its programs.

    Without `dtype`, element types are those that programs declare.
    """

    def __init__(
        self, description: Description, batch: int = 2, dtype: torch.dtype | None = torch.float64
    ) -> None:
        self.description = description
        self.dtype = dtype
        self.lowered = lower(description)
        self.weights = random_weights(self.lowered, dtype=dtype)
        sizes = {"batch": batch, "seq": sum(CHUNKS)}
        self.inputs = random_inputs(self.lowered, sizes, dtype=dtype)
        self.inputs["position"] = torch.arange(sizes["seq"]).expand(batch, -1)

    def run(self, program: Program, at: slice = slice(None), state: State | None = None) -> Any:
        """Results for the tokens `at`."""
        inputs = {n: t[:, at] if t.dim() > 1 else t for n, t in self.inputs.items()}
        return run(program, inputs, self.weights, state=state, dtype=self.dtype)

    def observe(self, program: Program) -> dict[str, Tensor]:
        """All that can be seen of a program, by name.

        A decoder is given some tokens at a time; what scores all positions could stand for it.
        """
        if any(graph.caches for graph in program.graphs.values()):
            return self.decoded([program] * len(CHUNKS))
        seen: dict[str, Tensor] = {}
        for name, value in zip(program.main.result_names, self.run(program), strict=True):
            seen[f"{name} {sum(n.split()[0] == name for n in seen)}"] = value
        if "logits 0" in seen:
            seen |= {f"after {n}": seen["logits 0"][:, n - 1] for n in self.lengths()}
        return seen

    def decoded(self, programs: Sequence[Program]) -> dict[str, Tensor]:
        """The scores after each chunk, each made by a program of its own on the same cache."""
        seen, state, start = {}, State(), 0
        for program, end in zip(programs, self.lengths(), strict=True):
            (seen[f"after {end}"],) = self.run(program, slice(start, end), state)
            start = end
        return seen

    def gradients(self, program: Program) -> dict[str, Tensor]:
        """Of `total` by weight: as the program says, or by torch's autograd."""
        if program.backward:
            state = State()
            self.run(program, state=state)
            backward = program.graphs[program.backward]
            seeds = {v.name: torch.ones((), dtype=self.dtype) for v in backward.args}
            run(program, seeds, self.weights, graph=backward.name, state=state, dtype=self.dtype)
            return state.grads
        weights = {name: weight.clone().requires_grad_() for name, weight in self.weights.items()}
        results = run(program, self.inputs, weights, dtype=self.dtype)
        total = results[program.main.result_names.index("total")]
        found = torch.autograd.grad(total, [*weights.values()], allow_unused=True)
        return {name: grad for name, grad in zip(weights, found, strict=True) if grad is not None}

    def lengths(self) -> list[int]:
        return [sum(CHUNKS[: i + 1]) for i in range(len(CHUNKS))]


def close(a: Tensor, b: Tensor, what: str) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}")
