"""Every kernel of a spec on the GPU at hand: checked, timed, against libraries and the roofline.

`python benchmarks/gpu` from the repository's root; `--help` lists how to run less. Kernels are
compiled in parallel first, then the longest case of each function is run, then the second longest.
`gpu_report.md` and `gpu_report.json` are written after each case. Without a GPU that dslc has
kernels for it says so, exits with 0, and has claimed nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from cases import by_importance, libraries, line, row_of  # noqa: E402

from backends.triton.arguments import CaseRecord  # noqa: E402
from backends.triton.compiled import compile_kernels  # noqa: E402
from backends.triton.kernel import write as put  # noqa: E402
from backends.triton.launches import load  # noqa: E402
from backends.triton.package import kernel_files, kernels_package  # noqa: E402
from backends.triton.target import TARGETS, Target  # noqa: E402
from compiler.pipeline import compile  # noqa: E402
from dslc.specs import read  # noqa: E402
from runtime.dispatch import name_of  # noqa: E402


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
