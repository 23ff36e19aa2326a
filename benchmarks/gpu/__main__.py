"""Every kernel of a spec on the GPU at hand: checked, timed, against libraries and the roofline.

`python benchmarks/gpu` from the repository's root; `--help` lists how to run less. It writes
`gpu_report.md` and `gpu_report.json`. Without a GPU that dslc has kernels for it says so, exits
with 0, and has claimed nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from check import checked, reference_of  # noqa: E402
from peers import peers_of  # noqa: E402

from backends.triton.arguments import Case, arguments_of  # noqa: E402
from backends.triton.compiled import floor  # noqa: E402
from backends.triton.launches import load  # noqa: E402
from backends.triton.package import kernel_files, kernels_package  # noqa: E402
from backends.triton.package import write as put  # noqa: E402
from backends.triton.target import TARGETS, Target  # noqa: E402
from compiler.pipeline import compile  # noqa: E402
from dslc.specs import read  # noqa: E402
from runtime.dispatch import name_of  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", default="deepseek_v3")
    parser.add_argument("--file", action="append", help="only this file of kernels; repeatable")
    parser.add_argument("--match", default="", help="only cases whose name holds this")
    parser.add_argument("--out", type=Path, default=Path("build"))
    asked = parser.parse_args()
    target = present()
    if target is None:
        return
    rows = []
    for row in measured(asked.spec, target, asked.file, asked.match, asked.out / "gpu_kernels"):
        rows.append(row)
        print(line(row), flush=True)
    write(rows, target, asked.spec, asked.out)


def present() -> Target | None:
    """The target that the GPU at hand is; where there is none, that is said."""
    if not torch.cuda.is_available():
        print("no GPU here: no kernel was run, and nothing is claimed of their speed")
        return None
    name = name_of(0)
    if name not in TARGETS:
        print(f"the GPU here is {name}; dslc has kernels for {', '.join(TARGETS)}: none was run")
    return TARGETS.get(name)


def measured(
    spec: str, target: Target, only: list[str] | None, match: str, folder: Path
) -> Iterator[dict[str, Any]]:
    """A row for each case of each file of kernels."""
    description = read(spec, None, None)
    files = kernel_files(compile(description).programs, description, target)
    put(kernels_package(files, target), folder)
    record = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
    for file in record["files"]:
        if only and file["name"].removesuffix(".py") not in only:
            continue
        module = load(folder / file["name"])
        for case in file["cases"]:
            if match in case["name"]:
                yield row_of(module, file, case, target)


def row_of(module: ModuleType, file: Case, case: Case, target: Target) -> dict[str, Any]:
    """One case, checked twice and timed. A failure is a row, too."""
    from triton.testing import do_bench

    row = {"case": case["name"], "file": file["name"], "sha256": file["sha256"]}
    arguments, keywords = arguments_of(case, torch.device("cuda"))
    kernel = getattr(module, case["function"])
    try:
        wrong = checked(kernel, reference_of(file, case), case)
        row["check"] = wrong or "ok"
        row["us"] = 1e3 * do_bench(lambda: kernel(*arguments, **keywords), return_mode="median")
    except (RuntimeError, ValueError, torch.OutOfMemoryError) as error:
        row["check"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return row
    row["floor_us"], _ = floor(case, target)
    row["roofline"] = row["floor_us"] / row["us"]
    row["peers_us"] = {
        name: 1e3 * do_bench(run, return_mode="median")
        for name, run in peers_of(case["function"], arguments, keywords).items()
    }
    return row


def line(row: dict[str, Any]) -> str:
    if "us" not in row:
        return f"{row['case']:<44} {row['check']}"
    peers = "  ".join(f"{name} x{us / row['us']:.2f}" for name, us in row["peers_us"].items())
    return (
        f"{row['case']:<44} {row['us']:10.1f} us  {row['roofline']:6.1%} of roofline  "
        f"{row['check']}  {peers}"
    )


def cells(row: dict[str, Any]) -> list[str]:
    peers = (f"{name} {us / row['us']:.2f}" for name, us in row.get("peers_us", {}).items())
    time, share = f"{row.get('us', 0):.1f}", f"{row.get('roofline', 0):.1%}"
    return [row["case"], time, share, row["check"], ", ".join(peers)]


def write(rows: list[dict[str, Any]], target: Target, spec: str, out: Path) -> None:
    """The report: as data, and as a page of Markdown."""
    gpu = torch.cuda.get_device_name(0)
    out.mkdir(parents=True, exist_ok=True)
    facts = {"gpu": gpu, "target": target.name, "spec": spec, "torch": torch.__version__}
    (out / "gpu_report.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    head = [
        f"# Kernels of {spec} on {gpu}",
        "",
        f"`python benchmarks/gpu --spec {spec}`; floors are those of {target.gpu}. A ratio of a"
        " library is its time over ours.",
        "",
        "| case | us | of roofline | check | libraries |",
        "|---|--:|--:|---|---|",
    ]
    body = ["| " + " | ".join(cells(row)) + " |" for row in rows]
    (out / "gpu_report.md").write_text("\n".join([*head, *body]) + "\n", encoding="utf-8")
    print(f"wrote {out / 'gpu_report.md'}")


if __name__ == "__main__":
    main()
