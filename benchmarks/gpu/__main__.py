"""Every kernel of a spec on the GPU at hand: checked, timed, against libraries and the roofline.

`python benchmarks/gpu` from the repository's root; `--help` lists how to run less. Kernels are
compiled in parallel first, then the longest case of each function is run, then the second longest.
`gpu_report.md` and `gpu_report.json` are written after each case. Without a GPU that dslc has
kernels for it says so, exits with 0, and has claimed nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import inspect
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from peers import peers_of  # noqa: E402

from backends.triton.agreement import checked, reference_of  # noqa: E402
from backends.triton.arguments import CaseRecord, arguments_of  # noqa: E402
from backends.triton.compiled import compile_kernels, floor  # noqa: E402
from backends.triton.launches import load  # noqa: E402
from backends.triton.package import kernel_files, kernels_package  # noqa: E402
from backends.triton.package import write as put  # noqa: E402
from backends.triton.target import TARGETS, Target  # noqa: E402
from compiler.pipeline import compile  # noqa: E402
from dslc.specs import read  # noqa: E402
from runtime.dispatch import name_of  # noqa: E402

DEVICE = "cuda"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", default="deepseek_v3")
    parser.add_argument("--file", action="append", help="only this file of kernels; repeatable")
    parser.add_argument("--match", default="", help="only cases whose name holds this")
    parser.add_argument("--minutes", type=float, help="stop then; the most important cases first")
    parser.add_argument("--out", type=Path, default=Path("build"))
    asked = parser.parse_args()
    end = time.monotonic() + 60 * (asked.minutes or math.inf)
    target = present()
    if target is None:
        return
    report = Report(asked.spec, target, asked.out)
    folder = asked.out / "gpu_kernels"
    cases = prepared(asked.spec, target, folder, set(asked.file or ()), asked.match)
    for done, (file, case) in enumerate(cases):
        if time.monotonic() > end:
            print(f"{len(cases) - done} of {len(cases)} cases were not run: the time is over")
            break
        report.add(row_of(load(folder / file["name"]), file, case, target))
    print(f"wrote {report.page}")


def present() -> Target | None:
    """The target that the GPU at hand is; where there is none, that is said."""
    if not torch.cuda.is_available():
        print("no GPU here: no kernel was run, and nothing is claimed of their speed")
        return None
    name = name_of(0)
    if name not in TARGETS:
        print(f"the GPU here is {name}; dslc has kernels for {', '.join(TARGETS)}: none was run")
    return TARGETS.get(name)


def prepared(
    spec: str, target: Target, folder: Path, only: set[str], match: str
) -> list[tuple[CaseRecord, CaseRecord]]:
    """Files with a case each, in the order of importance; their kernels are in Triton's cache."""
    description = read(spec, None, None)
    files = kernel_files(compile(description).programs, description, target)
    files = [file for file in files if not only or file.name in only]
    texts = kernels_package(files, target)
    put(texts, folder)
    record = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
    start = time.monotonic()
    compile_kernels(files, texts, target)
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    found = [(f, case) for f in record["files"] for case in f["cases"] if match in case["name"]]
    return by_importance(found, target)


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
    module: ModuleType, file: CaseRecord, case: CaseRecord, target: Target
) -> dict[str, Any]:
    """One case, checked twice and timed. A failure is a row, too."""
    row = {"case": case["name"], "file": file["name"], "sha256": file["sha256"]}
    try:
        kernel, reference = getattr(module, case["function"]), reference_of(file, case)
        row["check"] = checked(kernel, reference, case, DEVICE) or "ok"
        arguments, keywords = arguments_of(case, torch.device(DEVICE))
        row["us"] = timed(lambda: kernel(*arguments, **keywords))
        row["floor_us"], _ = floor(case, target)
        row["roofline"] = row["floor_us"] / row["us"]
        named = inspect.signature(reference).bind(*arguments, **keywords).arguments
        row["peers_us"] = dict(peers(case["function"], named))
    except Exception as error:  # whatever a kernel or a library raises is what the row says
        row["check"] = f"{row.get('check', '')} {message(error)}".strip()
    torch.cuda.empty_cache()
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


class Report:
    """`gpu_report.json` and `gpu_report.md`, written again after each row."""

    def __init__(self, spec: str, target: Target, out: Path) -> None:
        gpu = torch.cuda.get_device_name(0)
        versions = {"torch": torch.__version__, "triton": importlib.metadata.version("triton")}
        self.facts = {"gpu": gpu, "target": target.name, "spec": spec, **versions}
        self.lines = [
            f"# Kernels of {spec} on {gpu}",
            "",
            f"`python benchmarks/gpu --spec {spec}`, torch {versions['torch']}, Triton"
            f" {versions['triton']}; floors are those of {target.gpu}. A ratio of a library is its"
            " time over ours.",
            "",
            "| case | us | of roofline | check | libraries |",
            "|---|--:|--:|---|---|",
        ]
        self.page, self.data = out / "gpu_report.md", out / "gpu_report.json"
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        print(line(row), flush=True)
        self.rows.append(row)
        time_us, share = f"{row.get('us', 0):.1f}", f"{row.get('roofline', 0):.1%}"
        self.lines.append(
            f"| {row['case']} | {time_us} | {share} | {row['check']} | {libraries(row)} |"
        )
        self.page.write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        self.data.write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
