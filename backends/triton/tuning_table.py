"""Which tile a kernel takes where there are several: the measured one, or the cost model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from dsl.diagnostic import Diagnostic, DiagnosticError

T = TypeVar("T")


class TuningTable:
    """The fastest candidate by key, as `measured` on a GPU; keys are `fp8_linear n7168 m4096`.

    `asked` holds the keys that kernels have looked up, with the names of their candidates: what
    `dslc tune` has to measure.
    """

    def __init__(self, measured: Mapping[str, str] | None = None, source: str = "") -> None:
        self.measured = measured or {}
        self.source = source
        self.asked: dict[str, tuple[str, ...]] = {}

    def pick(self, key: str, candidates: Mapping[str, T], best: str) -> T:
        """The candidate that was measured to be fastest, or `best`, which a model thinks is.

        Raises `DiagnosticError` where what was measured is no candidate any more.
        """
        self.asked[key] = tuple(candidates)
        name = self.measured.get(key, best)
        if name not in candidates:
            known = ", ".join(candidates)
            raise DiagnosticError(
                [
                    Diagnostic(
                        "E607",
                        f"{self.source}: {key} was measured with {name!r}, which kernels are not"
                        f" cut by any more; there are {known}",
                        help="measure again with `dslc tune`",
                    )
                ]
            )
        return candidates[name]
