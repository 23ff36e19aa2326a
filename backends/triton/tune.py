"""Measuring candidates on the GPU at hand, and the file that a build takes the winners from."""

from __future__ import annotations

import importlib.metadata
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from backends.triton.agreement import checked, reference_of
from backends.triton.arguments import CaseRecord, arguments_of
from backends.triton.kernel import KernelFile, write
from backends.triton.launches import load
from backends.triton.package import kernel_files, kernels_package
from backends.triton.target import Target
from backends.triton.tuning_table import TuningTable
from compiler.graph.core import Program
from dsl.load import Description

Timer = Callable[[Callable[[], Any]], float]
"""Microseconds that a call takes."""

Check = Callable[[Any, Any, CaseRecord], str]
"""What is wrong with a kernel, held against its reference in a case; nothing is an empty text."""


@dataclass(frozen=True)
class TuningRound:
    """One candidate of each tuning key, and the microseconds that the cases of each took."""

    taken: Mapping[str, str]
    microseconds: Mapping[str, float]


def measure(
    programs: Mapping[str, Program],
    description: Description,
    target: Target,
    timer: Timer,
    check: Check = checked,
) -> Iterator[TuningRound]:
    """Tiles first, then kernels with the fastest tiles against libraries: as many rounds of each as
    the key with most candidates has; each measures all keys."""
    first = TuningTable()
    kernel_files(programs, description, target, first)
    rounds: list[TuningRound] = []
    for keys in (first.asked, first.files):
        best = winners(rounds)
        for i in range(max(map(len, keys.values()), default=0)):
            taken = {key: names[i] for key, names in keys.items() if i < len(names)}
            files = kernel_files(programs, description, target, TuningTable({**best, **taken}))
            rounds.append(TuningRound(taken, _times(files, target, taken, timer, check)))
            yield rounds[-1]


def winners(rounds: Sequence[TuningRound]) -> dict[str, str]:
    """The fastest candidate of each key; one that fails never is."""
    return {key: min(us, key=us.__getitem__) for key, us in times(rounds).items()}


def times(rounds: Sequence[TuningRound]) -> dict[str, dict[str, float]]:
    """Microseconds of the candidates of each key that did not fail."""
    found: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for one in rounds:
        for key, name in one.taken.items():
            if math.isfinite(us := one.microseconds.get(key, math.inf)):
                found[key][name] = us
    return dict(sorted(found.items()))


def _times(
    files: Sequence[KernelFile],
    target: Target,
    taken: Mapping[str, str],
    timer: Timer,
    check: Check,
) -> dict[str, float]:
    """Microseconds by tuning key: those of all cases that it decides."""
    sums: defaultdict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        write(kernels_package(files, target), Path(folder))
        record = json.loads(Path(folder, "kernels.json").read_text(encoding="utf-8"))
        for file in record["files"]:
            name = Path(file["name"]).stem
            timed = [case for case in file["cases"] if _key(case, name, taken)]
            module = _loaded(Path(folder, file["name"])) if timed else None
            for case in timed:
                kernel = getattr(module, case["function"], None)
                compared = case.get("tuning_key") not in taken
                wrong = compared and _wrong(kernel, file, case, check)
                us = math.inf if kernel is None or wrong else _time(kernel, case, timer)
                sums[_key(case, name, taken)] += us
    return dict(sums)


def _key(case: CaseRecord, file: str, taken: Mapping[str, str]) -> str:
    """The key of the round for which a case of a file is measured, or nothing."""
    if (tile := case.get("tuning_key", "")) in taken:
        return str(tile)
    size = case.get("size_key", "")
    return str(size) if taken.get(size) == file else ""


def _loaded(file: Path) -> ModuleType | None:
    """A file of kernels, or None where its library is not installed, which then does not win."""
    try:
        return load(file)
    except ModuleNotFoundError:
        return None


def _wrong(kernel: Any, file: CaseRecord, case: CaseRecord, check: Check) -> str:
    try:
        return check(kernel, reference_of(file, case), case)
    except Exception as error:  # whatever a library raises, it does not serve
        return str(error) or type(error).__name__


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


def text_of(rounds: Sequence[TuningRound], target: Target, gpu: str) -> str:
    """The file that `dslc build --tuned` reads: on which GPU, with what, how long each took."""
    head = {
        "target": target.name,
        "gpu": gpu,
        "torch": importlib.metadata.version("torch"),
        "triton": importlib.metadata.version("triton"),
    }
    best = winners(rounds)
    lines = [
        f"  {json.dumps(key)}: {json.dumps({'fastest': best[key], 'us': us})}"
        for key, us in times(rounds).items()
    ]
    return json.dumps(head, indent=1)[:-2] + ',\n "choices": {\n' + ",\n".join(lines) + "\n }\n}\n"
