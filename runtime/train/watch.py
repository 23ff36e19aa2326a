"""What goes wrong in silence: experts that nothing or everything reaches, losses without effect."""

from __future__ import annotations

from collections.abc import Iterator

from ..config import Config
from .trainer import Step

WINDOW = 100
"""Steps whose loads are judged together."""
OVERLOADED = 8.0
"""Times the mean load, over a window."""


class Watch:
    """Reads every step and says what a person should know; the same thing once."""

    def __init__(self, config: Config) -> None:
        self.loss = config.train.loss
        self._loads: dict[str, list[int]] = {}
        self._steps = 0
        self._told: set[str] = set()

    def step(self, step: Step) -> list[str]:
        """Warnings that this step gives reason for."""
        found = [*self._terms(step), *self._experts(step)]
        new = [text for text in found if text not in self._told]
        self._told.update(new)
        return new

    def _terms(self, step: Step) -> Iterator[str]:
        if step.experts and self.loss.balance_alpha and step.balance == 0:
            yield "the balance loss is 0, though balance_alpha is not: it trains nothing"
        for depth, loss in enumerate(step.mtp, 1):
            if loss == 0 and self.loss.mtp_weight.value_at(step.tokens):
                yield f"the loss of MTP depth {depth} is 0, though mtp_weight is not"

    def _experts(self, step: Step) -> Iterator[str]:
        for name, use in step.experts.items():
            before = self._loads.get(name, [0] * len(use.load))
            self._loads[name] = [a + b for a, b in zip(before, use.load, strict=True)]
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
                    yield f"{name}: expert {expert} has more than {OVERLOADED:g} times its share"
