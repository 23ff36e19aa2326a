"""The text of a calibration that was measured, in the form of `dsl/schema/measured.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def calibration_text(cluster: str, where: str, measured: Any) -> str:
    """`where` says on what; `measured` is a `runtime.train.calibrate.Measured`."""
    return "".join(f"{line}\n" for line in _lines(cluster, where, measured))


def _lines(cluster: str, where: str, measured: Any) -> Iterator[str]:
    yield f"calibration: {cluster}"
    yield f"about: {where}"
    yield ""
    yield "products:"
    for one, seconds in measured.products:
        keys = {"dtype": one.dtype, "m": one.m, "n": one.n, "k": one.k}
        if one.groups > 1:
            keys["groups"] = one.groups
        if one.weight_grad:
            keys["weight_grad"] = "true"
        keys["microseconds"] = microseconds(seconds)
        yield f"  - {{{', '.join(f'{key}: {value}' for key, value in keys.items())}}}"
    if measured.attention is not None:
        yield "attention:"
        for name, rate in zip(("forward", "backward"), measured.attention, strict=True):
            yield f"  {name}: {round(rate)}"
    yield f"memory_bandwidth: {round(measured.memory_bandwidth)}"
    yield f"launch: {microseconds(measured.launch)}"
    for name, (rate, seconds) in measured.links.items():
        yield f"{name}: {{bandwidth: {max(1, round(rate))}, microseconds: {microseconds(seconds)}}}"


def microseconds(seconds: float) -> str:
    """With a thousandth of one."""
    return f"{max(seconds * 1e6, 0.001):.3f}".rstrip("0").rstrip(".")
