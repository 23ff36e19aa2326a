"""Failures that raise no error: dead or overloaded experts, losses without effect."""

from __future__ import annotations

from collections.abc import Iterator

from ..config import Config
from .trainer import StepMetrics

WINDOW = 100
"""Steps over which loads are added before they are judged."""
OVERLOADED = 8.0
"""The largest ratio of a load to the mean, over a window, without a warning."""


class HealthMonitor:
    """Checks every step; each warning is given once."""

    def __init__(self, config: Config) -> None:
        self.loss = config.train.loss
        self._loads: dict[str, list[int]] = {}
        self._steps = 0
        self._reported: set[str] = set()

    def warnings(self, step: StepMetrics) -> list[str]:
        """New warnings after this step."""
        found = [*self._terms(step), *self._experts(step)]
        new = [text for text in found if text not in self._reported]
        self._reported.update(new)
        return new

    def _terms(self, step: StepMetrics) -> Iterator[str]:
        if step.experts and self.loss.balance_alpha and step.balance == 0:
            yield "the balance loss is 0, though balance_alpha is not: it has no effect"
        for depth, loss in enumerate(step.mtp, 1):
            if loss == 0 and self.loss.mtp_weight.value_at(step.tokens):
                yield f"the loss of MTP depth {depth} is 0, though mtp_weight is not"

    def _experts(self, step: StepMetrics) -> Iterator[str]:
        for name, experts in step.experts.items():
            before = self._loads.get(name, [0] * len(experts.load))
            self._loads[name] = [a + b for a, b in zip(before, experts.load, strict=True)]
        self._steps += 1
        if self._steps < WINDOW:
            return
        loads, self._loads, self._steps = self._loads, {}, 0
        for name, load in loads.items():
            mean = sum(load) / len(load)
            for expert, tokens in enumerate(load):
                if tokens == 0:
                    yield f"{name}: expert {expert} is dead: no token in {WINDOW} steps"
                elif tokens > OVERLOADED * mean:
                    yield f"{name}: expert {expert} has over {OVERLOADED:g} times the mean load"
