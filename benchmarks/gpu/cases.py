"""Cases of kernels, run: the most important first, checked, timed, beside libraries.

It needs torch and Triton, and of dslc only what needs no more.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from peers import peers_of

from backends.triton.agreement import checked, reference_of
from backends.triton.arguments import CaseRecord, arguments_of
from backends.triton.compiled import floor
from backends.triton.target import Target


def by_importance(
    cases: list[tuple[CaseRecord, CaseRecord]], target: Target
) -> list[tuple[CaseRecord, CaseRecord]]:
    """The longest case of each function, then the second longest of each, and so on."""
    ranked: list[tuple[int, float, tuple[CaseRecord, CaseRecord]]] = []
    seen: Counter[str] = Counter()
    for file, case in sorted(cases, key=lambda pair: -floor(pair[1], target)[0]):
        function = f"{file['name']}: {case['function']}"
        ranked.append((seen[function], -floor(case, target)[0], (file, case)))
        seen[function] += 1
    return [pair for _, _, pair in sorted(ranked, key=lambda entry: entry[:2])]


def row_of(
    module: ModuleType,
    file: CaseRecord,
    case: CaseRecord,
    target: Target,
    device: str = "cuda",
    compared: bool = True,
) -> dict[str, Any]:
    """One case, checked and timed, if `compared` beside libraries. A failure is a row, too."""
    row = {"case": case["name"], "file": file["name"], "sha256": file["sha256"]}
    try:
        kernel, reference = getattr(module, case["function"]), reference_of(file, case)
        row["check"] = checked(kernel, reference, case, device) or "ok"
        arguments, keywords = arguments_of(case, torch.device(device))
        row["us"] = timed(lambda: kernel(*arguments, **keywords))
        row["floor_us"], _ = floor(case, target)
        row["roofline"] = row["floor_us"] / row["us"]
        if not compared:
            return row
        named = inspect.signature(reference).bind(*arguments, **keywords).arguments
        row["peers_us"] = dict(peers(case["function"], named))
    except Exception as error:  # whatever a kernel or a library raises is what the row says
        row["check"] = f"{row.get('check', '')} {message(error)}".strip()
    torch.cuda.empty_cache()  # nothing without a GPU
    return row


def peers(function: str, named: dict[str, Any]) -> Iterator[tuple[str, float | str]]:
    """Microseconds of each library, or why it has none."""
    for name, run in peers_of(function, named):
        try:
            yield name, timed(run)
        except Exception as error:
            yield name, message(error)


def message(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def timed(run: Callable[[], Any]) -> float:
    """Microseconds: the median of many runs within 40 ms."""
    from triton.testing import do_bench

    return 1e3 * float(do_bench(run, warmup=8, rep=40, return_mode="median"))


def line(row: dict[str, Any]) -> str:
    if "roofline" not in row:
        return f"{row['case']:<44} {row['check']}"
    return (
        f"{row['case']:<44} {row['us']:10.1f} us  {row['roofline']:6.1%} of roofline  "
        f"{row['check']}  {libraries(row)}"
    )


def libraries(row: dict[str, Any]) -> str:
    """The time of each library over ours, or its error."""
    return ", ".join(
        f"{name} {us}" if isinstance(us, str) else f"{name} x{us / row['us']:.2f}"
        for name, us in row.get("peers_us", {}).items()
    )
