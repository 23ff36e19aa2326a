"""One command that answers what a GPU has to answer, in eight minutes.

    python benchmarks/gpu/everything.py --prepare build/gpu       where dslc is installed
    python benchmarks/gpu/everything.py build/gpu --minutes 8     where the GPU is

Both from the repository's root. The first builds kernels, cases and packages into a folder; the
second needs that folder, this repository, torch and Triton, and neither a network nor dslc. Each
step is a process of its own with a limit: one that fails or hangs is a row, and the next one runs.
`gpu.json`, `gpu.md` and `tuned.json`, which `dslc build --tuned` reads, are written after each row.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from page import page, tuned  # noqa: E402

Row = dict[str, Any]

STEPS = {
    "compile": 90,
    "ceilings": 25,
    "checks": 60,
    "small": 60,
    "kernels": 100,
    "models": 150,
    "libraries": 60,
    "launching": 30,
}
"""Seconds that each may take at most. What they do is in `steps.py`."""

POLICIES = {"fp8": "precision.policy=fp8_blockwise", "bf16": "precision.policy=bf16"}

OF_BF16 = ("linear", "grouped_linear", "cublas")
"""Files that are of interest in bfloat16: all others are the same as in FP8."""


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="what --prepare made")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="build what the steps need")
    parser.add_argument("--target", default="sm_90", help="of the GPU, with --prepare")
    parser.add_argument("--spec", default="deepseek_v3", help="of kernels and models")
    parser.add_argument("--small", default="deepseek_v3_tiny", help="compared with the CPU")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("build/gpu_results"))
    asked = parser.parse_args(given)
    if asked.prepare:
        prepare(asked)
    elif asked.folder is None or not (asked.folder / "prepared.json").is_file():
        parser.error("give the folder that `--prepare DIR` has made")
    else:
        run(asked)


# ---- where dslc is installed -----------------------------------------------------------------


def prepare(asked: argparse.Namespace) -> None:
    """Kernels and cases of a spec in FP8 and BF16, with every library that could serve, and
    packages for the steps that run models."""
    from models import prepare as prepare_models

    from backends.build import build
    from backends.triton.kernel import write
    from backends.triton.package import kernels_package
    from backends.triton.target import TARGETS
    from dslc.specs import read

    folder, target, packages = asked.prepare, TARGETS[asked.target], asked.prepare / "packages"
    for precision, policy in POLICIES.items():
        if {"checks", "kernels", "libraries", "compile"} & set(asked.only):
            files = candidates(read(asked.spec, [policy], None), target)
            files = [f for f in files if precision == "fp8" or f.name in OF_BF16]
            write(kernels_package(files, target), folder / "kernels" / precision)
        if "small" in asked.only:
            name = f"small_{precision}"
            build(
                read(asked.small, [policy, f"model={name}"], None), packages / name, target=target
            )
    if "models" in asked.only:
        prepare_models(packages, asked.spec, asked.target)
    facts = {"target": asked.target, "spec": asked.spec, "commit": commit()}
    (folder / "prepared.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    print(f"wrote {folder}: run `python benchmarks/gpu/everything.py {folder}` where the GPU is")


def candidates(description: Any, target: Any) -> list[Any]:
    """The files of a build, and those of every library, which serve at all sizes that they have."""
    from backends.triton.package import LIBRARIES, kernel_files
    from backends.triton.tuning_table import TuningTable
    from compiler.pipeline import compile

    programs, first = compile(description).programs, TuningTable()
    own = kernel_files(programs, description, target, first)
    found = []
    for library in LIBRARIES:
        keys = [key for key, names in first.files.items() if library.name in names]
        table = TuningTable(dict.fromkeys(keys, library.name))
        files = kernel_files(programs, description, target, table)
        found += [file for file in files if file.name == library.name]
    return [*found, *own]


def commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip()


# ---- where the GPU is ------------------------------------------------------------------------


def run(asked: argparse.Namespace) -> None:
    """All steps, until the time is over."""
    end = time.monotonic() + 60 * asked.minutes
    asked.out.mkdir(parents=True, exist_ok=True)
    record = Record(asked)
    for name in asked.only:
        left = end - time.monotonic()
        step = record.begin(name)
        if left < 5:
            record.add({"row": name, "failed": "the time is over"})
            continue
        command = [sys.executable, str(Path(__file__).parent / "steps.py"), name]
        command += [str(asked.folder), asked.device, str(asked.out)]
        limit = min(STEPS[name], left) if asked.device == "cuda" else left
        for row in rows_of([*command, str(limit)], limit):
            record.add(row)
        step["seconds"] = round(60 * asked.minutes - (end - time.monotonic()), 1)
    record.write()
    print(f"wrote {asked.out / 'gpu.md'}")


class Record:
    """`gpu.json`, `gpu.md` and `tuned.json`, written again after each row."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.facts = json.loads((asked.folder / "prepared.json").read_text(encoding="utf-8"))
        self.facts["command"] = f"python benchmarks/gpu/everything.py --minutes {asked.minutes:g}"
        self.out, self.steps = asked.out, list[Row]()

    def begin(self, name: str) -> Row:
        print(f"== {name}", flush=True)
        self.steps.append({"step": name, "rows": []})
        return self.steps[-1]

    def add(self, row: Row) -> None:
        print(json.dumps(row)[:240], flush=True)
        if row["row"] == "machine":
            self.facts |= {key: value for key, value in row.items() if key != "row"}
        self.steps[-1]["rows"].append(row)
        self.write()

    def write(self) -> None:
        content = {**self.facts, "steps": self.steps}
        (self.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (self.out / "gpu.md").write_text(page(content), encoding="utf-8")
        (self.out / "tuned.json").write_text(tuned(content), encoding="utf-8")


def rows_of(command: Sequence[str], limit: float) -> Iterator[Row]:
    """The JSON lines that a process prints, as they come, and one that says how it ended, if not
    well. After `limit` seconds it is killed with all that it started."""
    end = time.monotonic() + limit
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    assert process.stdout is not None
    said = ""
    try:
        for line in lines(process.stdout.fileno(), lambda: end - time.monotonic()):
            row = parsed(line)
            said = line if row is None and line.strip() else said
            if row is not None:
                yield row
        status = process.wait(max(end - time.monotonic(), 0.1))
        if status:
            yield {"row": "the step", "failed": f"exit status {status}: {said.strip()[:200]}"}
    except (TimeoutError, subprocess.TimeoutExpired):
        yield {"row": "the step", "failed": f"stopped at its limit of {limit:.0f} s"}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def lines(source: int, left: Callable[[], float]) -> Iterator[str]:
    """Lines of a pipe until it is closed. Raises TimeoutError when no time is left."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        while True:
            if not selector.select(max(left(), 0)) or left() <= 0:
                raise TimeoutError
            read = os.read(source, 1 << 16)
            *whole, rest = (rest + read).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
            if not read:
                yield from [rest.decode(errors="replace")] if rest else []
                return


def parsed(line: str) -> Row | None:
    """A row, if the line is one."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "row" in found else None


if __name__ == "__main__":
    main()
