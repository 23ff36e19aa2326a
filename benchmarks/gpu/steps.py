"""The steps of `everything.py`, each run as a process of its own: a JSON line for each row.

`python steps.py NAME FOLDER DEVICE OUT SECONDS`. They need torch, Triton, and of this repository
only what needs no more.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from cases import by_importance, message, row_of  # noqa: E402
from small import compare  # noqa: E402

from backends.triton.arguments import CaseRecord, arguments_of  # noqa: E402
from backends.triton.launches import load  # noqa: E402
from backends.triton.target import TARGETS, Target  # noqa: E402

Row = dict[str, Any]

FIRST = ("quantize", "latent_attention", "gate_grad", "attention_saving", "attention_grad")
"""Functions that once differed from their reference on a GPU, or that have not been held against it
there: names that begin like these are checked before all else."""


@dataclass(frozen=True)
class Asked:
    folder: Path
    device: str
    out: Path
    seconds: float

    @property
    def target(self) -> Target:
        record = json.loads((self.folder / "prepared.json").read_text(encoding="utf-8"))
        return TARGETS[record["target"]]

    def cases(self, libraries: bool) -> list[tuple[CaseRecord, CaseRecord]]:
        """Files with a case each, the most important first; `folder` of a file says where it is."""
        found = []
        for listed in sorted(self.folder.glob("kernels/*/kernels.json")):
            record = json.loads(listed.read_text(encoding="utf-8"))
            for file in record["files"]:
                if bool(file.get("library")) == libraries:
                    place = {**file, "folder": str(listed.parent)}
                    found += [(place, case) for case in file["cases"]]
        return by_importance(found, self.target)

    def row(self, file: CaseRecord, case: CaseRecord, compared: bool = True) -> Row:
        """A case, checked and timed; `file` and `size_key` are what a table of winners needs."""
        name = {"row": case["name"], "file": Path(file["name"]).stem}
        try:
            module = load(Path(file["folder"]) / file["name"])
        except ImportError as error:  # a library that is not installed
            return {**name, "check": message(error)}
        found = row_of(module, file, case, self.target, self.device, compared)
        hidden = ("case", "file", "sha256", "floor_us", "roofline")
        shown: Row = {k: case[k] for k in ("size_key", "flops", "bytes", "bound_by") if k in case}
        return {**name, **shown, **{k: v for k, v in found.items() if k not in hidden}}

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


# ---- kernels ---------------------------------------------------------------------------------


def compile_all(asked: Asked) -> Iterator[Row]:
    """Fills Triton's cache, a process a file; later launches find it there."""

    def one(folder: Path, file: str) -> Row:
        command = [sys.executable, "-m", "backends.triton.launches", str(folder)]
        start = time.monotonic()
        done = subprocess.run(
            [*command, asked.target.name, file],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        row: Row = {"row": f"{folder.name}/{file}", "kernels": len(rows)}
        row["seconds"] = round(time.monotonic() - start, 1)
        wrong = [found["error"] for found in rows if "error" in found]
        if done.returncode:
            wrong.append((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
        return {**row, "failed": "; ".join(wrong)} if wrong else row

    files = {(file["folder"], file["name"]): None for file, _ in asked.cases(libraries=False)}
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1)) as pool:
        jobs = [pool.submit(one, Path(folder), name) for folder, name in files]
        for job in as_completed(jobs):
            yield job.result()


def checks(asked: Asked) -> Iterator[Row]:
    """Right bits first: what differed on a GPU before, in the smallest case and in the largest."""
    chosen: dict[str, tuple[CaseRecord, CaseRecord]] = {}
    for file, case in asked.cases(libraries=False):
        if any(name in case["function"] for name in FIRST):
            chosen.setdefault(f"{case['function']} most", (file, case))
            chosen[f"{case['function']} least"] = (file, case)
    for file, case in chosen.values():
        yield asked.row(file, case, compared=False)


def kernels(asked: Asked) -> Iterator[Row]:
    """Each kernel of dslc, beside libraries that do the same work."""
    for file, case in asked.cases(libraries=False):
        yield asked.row(file, case)


def libraries(asked: Asked) -> Iterator[Row]:
    """Each library as a build calls it: held against the reference, and timed."""
    for file, case in asked.cases(libraries=True):
        yield asked.row(file, case, compared=False)


# ---- the card --------------------------------------------------------------------------------


def ceilings(asked: Asked) -> Iterator[Row]:
    """What the card gives at most: rooflines are made from these."""
    on_gpu = asked.device == "cuda"
    name = torch.cuda.get_device_name(0) if on_gpu else "cpu"
    versions = {"torch": torch.__version__, "triton": importlib.metadata.version("triton")}
    yield {"row": "machine", "gpu": name, **versions, "cuda": torch.version.cuda}
    n, size = (8192, 1 << 30) if on_gpu else (256, 1 << 20)
    source = torch.empty(size, dtype=torch.uint8, device=asked.device)
    target = torch.empty_like(source)
    yield rate("copy", "bandwidth", 2 * size, lambda: target.copy_(source), asked)
    a, b = (torch.randn(n, n, device=asked.device, dtype=torch.bfloat16) for _ in "ab")
    yield rate("bf16 product", "bf16", 2 * n**3, lambda: a @ b, asked)

    from torch.nn.functional import ScalingType, scaled_mm

    q, one = a.to(torch.float8_e4m3fn), torch.ones((), device=asked.device)
    whole = ScalingType.TensorWise
    yield rate(
        "fp8 product", "fp8", 2 * n**3, lambda: scaled_mm(q, q.t(), one, whole, one, whole), asked
    )


def rate(row: str, of: str, work: int, run: Callable[[], Any], asked: Asked) -> Row:
    """Bytes or FLOPs a second: the best of several runs."""
    try:
        return {"row": row, "of": of, "a_second": work / best(run, asked)}
    except Exception as error:
        return {"row": row, "failed": message(error)}


def best(run: Callable[[], Any], asked: Asked, times: int = 10) -> float:
    """Seconds of the fastest of several runs."""
    found = []
    for _ in range(times + 2):
        asked.sync()
        start = time.perf_counter()
        run()
        asked.sync()
        found.append(time.perf_counter() - start)
    return min(found)


def launching(asked: Asked) -> Iterator[Row]:
    """Microseconds of the host for a call, and of a call in a CUDA graph: smallest cases."""
    smallest: dict[tuple[str, str], tuple[CaseRecord, CaseRecord]] = {}
    for library in (False, True):
        for file, case in asked.cases(library):
            smallest[file["name"], case["function"]] = (file, case)
    for (name, function), (file, case) in smallest.items():
        try:
            kernel = getattr(load(Path(file["folder"]) / file["name"]), function)
            arguments, keywords = arguments_of(case, torch.device(asked.device))
            row = launched(partial(kernel, *arguments, **keywords), asked)
        except Exception as error:
            row = {"failed": message(error)}
        yield {"row": f"{Path(name).stem}: {case['name']}", **row}


def launched(run: Callable[[], Any], asked: Asked, calls: int = 50) -> Row:
    """A call, as often as the queue of a GPU holds; then as many in a graph."""

    def several() -> None:
        for _ in range(calls):
            run()

    several()
    asked.sync()
    start = time.perf_counter()
    several()
    host = time.perf_counter() - start
    asked.sync()
    row: Row = {"host_us": round(1e6 * host / calls, 1)}
    if asked.device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            several()
        row["graph_us"] = round(1e6 * best(graph.replay, asked) / calls, 1)
    return row


# ---- models ----------------------------------------------------------------------------------


def small(asked: Asked) -> Iterator[Row]:
    """A whole small model on the device equals the CPU's."""
    sys.path.insert(0, str(asked.folder / "packages"))
    for precision in ("bf16", "fp8"):
        if (asked.folder / f"packages/small_{precision}").is_dir():
            try:
                yield compare(f"small_{precision}", precision, asked.device)
            except Exception as error:
                yield {"row": f"small model {precision}", "failed": message(error)}


def models(asked: Asked) -> Iterator[Row]:
    """A slice of V3: `models.py` prints the rows."""
    import models as program

    given = ["models.py", "--packages", str(asked.folder / "packages"), "--out", str(asked.out)]
    given += ["--device", asked.device, "--minutes", str(asked.seconds / 60), "--no-compile"]
    sys.argv = given if asked.device == "cuda" else [*given, "--tokens", "16", "--context", "8"]
    program.main()
    yield from ()


STEPS: dict[str, Callable[[Asked], Iterator[Row]]] = {
    "compile": compile_all,
    "ceilings": ceilings,
    "checks": checks,
    "small": small,
    "kernels": kernels,
    "models": models,
    "libraries": libraries,
    "launching": launching,
}


def main(given: list[str]) -> None:
    name, folder, device, out, seconds = given
    for row in STEPS[name](Asked(Path(folder), device, Path(out), float(seconds))):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
