"""Measuring candidates on the GPU at hand, and the file that a build takes the winners from."""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.triton.arguments import CaseRecord, arguments_of
from backends.triton.kernel import KernelFile
from backends.triton.launches import load
from backends.triton.package import kernel_files, kernels_package, write
from backends.triton.target import Target
from backends.triton.tuning_table import TuningTable
from compiler.graph.core import Program
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.load import Description

Timer = Callable[[Callable[[], Any]], float]
"""Microseconds that a call takes."""


@dataclass(frozen=True)
class TuningRound:
    """One candidate of each tuning key, and the microseconds that the cases of each took."""

    taken: Mapping[str, str]
    microseconds: Mapping[str, float]


def measure(
    programs: Mapping[str, Program], description: Description, target: Target, timer: Timer
) -> Iterator[TuningRound]:
    """As many rounds as the key with most candidates has; each measures all keys."""
    first = TuningTable()
    kernel_files(programs, description, target, first)
    for i in range(max(map(len, first.asked.values()), default=0)):
        taken = {key: names[i] for key, names in first.asked.items() if i < len(names)}
        files = kernel_files(programs, description, target, TuningTable(taken))
        yield TuningRound(taken, _times(files, target, set(taken), timer))


def winners(rounds: Sequence[TuningRound]) -> dict[str, str]:
    """The fastest candidate of each key; one that fails never is."""
    best: dict[str, tuple[float, str]] = {}
    for one in rounds:
        for key, name in one.taken.items():
            candidate = (one.microseconds.get(key, math.inf), name)
            if candidate[0] < best.get(key, (math.inf, ""))[0]:
                best[key] = candidate
    return {key: name for key, (_, name) in sorted(best.items())}


def _times(
    files: Sequence[KernelFile], target: Target, keys: set[str], timer: Timer
) -> dict[str, float]:
    """Microseconds by tuning key: those of all cases that it decides."""
    sums: defaultdict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        write(kernels_package(files, target), Path(folder))
        record = json.loads(Path(folder, "kernels.json").read_text(encoding="utf-8"))
        for file in record["files"]:
            cases = [case for case in file["cases"] if case.get("tuning_key") in keys]
            module = load(Path(folder, file["name"])) if cases else None
            for case in cases:
                sums[case["tuning_key"]] += _time(getattr(module, case["function"]), case, timer)
    return dict(sums)


def _time(kernel: Callable[..., Any], case: CaseRecord, timer: Timer) -> float:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        arguments, keywords = arguments_of(case, device)
        return timer(lambda: kernel(*arguments, **keywords))
    except RuntimeError:  # what does not fit the GPU does not win
        return math.inf


def on_gpu(call: Callable[[], Any]) -> float:
    """The median of many runs."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(call, return_mode="median"))


def gpu_here() -> tuple[str, str]:
    """The GPU at hand as targets are called, and its own name."""
    import torch

    from runtime.dispatch import name_of

    if not torch.cuda.is_available():
        return "", "none"
    return name_of(0), torch.cuda.get_device_name(0)


def text_of(choices: Mapping[str, str], target: Target, gpu: str) -> str:
    """The file that `dslc build --tuned` reads."""
    content = {"target": target.name, "gpu": gpu, "choices": choices}
    return json.dumps(content, indent=1) + "\n"


def read(path: Path, target: Target) -> TuningTable:
    """What was measured for a target. Raises `DiagnosticError` for a file that does not say so."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, choices = content["target"], content["choices"]
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in choices.items()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        why = f"{path} is no file that `dslc tune` wrote"
        raise DiagnosticError([Diagnostic("E607", why, help="make one with `dslc tune`")]) from None
    if found != target.name:
        why = f"{path} was measured for {found}, this build is for {target.name}"
        raise DiagnosticError([Diagnostic("E607", why, help=f"measure on a {target.name} GPU")])
    return TuningTable(choices, str(path))
