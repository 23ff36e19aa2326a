"""Compiles what the launchers of a folder of kernels would launch, for a GPU that is not there.

A program of its own (`python -m backends.triton.launches FOLDER TARGET [--save] FILE..`), because
Triton either compiles or interprets for the whole of a process. It calls each case of
`kernels.json` with tensors that have no memory (torch's device `meta`), under a stand-in for the
GPU's driver: Triton specialises the arguments as for a launch, compiles, and stops short of
launching. So what is looked at is, alignment and constants included, what would run. One JSON line
a kernel on standard output.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from backends.triton.arguments import read, without_memory
from backends.triton.metrics import measure, sass
from backends.triton.target import TARGETS, Target


def main(arguments: list[str]) -> None:
    folder, target, *names = arguments
    place = Path(folder)
    record = json.loads((place / "kernels.json").read_text(encoding="utf-8"))
    for file in (one for one in record["files"] if one["name"] in names):
        save = place if "--save" in names else None
        for row in compile_file(place / file["name"], file["cases"], TARGETS[target], save):
            print(json.dumps(row), flush=True)


Launch = dict[str, Any]
Row = dict[str, Any]


def compile_file(
    path: Path, cases: list[Row], target: Target, save: Path | None = None
) -> Iterator[Row]:
    """Every kernel that the cases launch, once each, with the cases that launch it.

    With `save`, its PTX and SASS (or the assembly of AMD) are put there.
    """
    launched: list[Launch] = []
    with_driver(target, launched.append)
    module = load(path)
    rows: dict[str, Row] = {}
    for case in cases:
        launched.clear()
        start = time.perf_counter()
        try:
            call(module, case)
        except Exception as error:  # any error of Triton is reported, and fails the check
            yield _failed(path, case, error)
            continue
        seconds = time.perf_counter() - start
        for launch in launched:
            row = rows.get(launch["hash"])
            if row is None:
                row = rows[launch["hash"]] = _row(path, launch, target, seconds)
                if save is not None:
                    _keep(save, f"{path.stem}-{len(rows):02d}-{launch['name']}", launch["kernel"])
            if case not in row["cases"]:
                row["cases"].append(case)
            seconds = 0.0
    yield from rows.values()


def _row(path: Path, launch: Launch, target: Target, seconds: float) -> Row:
    return {
        "file": path.name,
        "kernel": launch["name"],
        "cases": [],
        "constants": launch["constants"],
        "warps": launch["warps"],
        "stages": launch["stages"],
        "metrics": measure(launch["kernel"], target),
        "seconds": round(seconds, 2),
    }


def _keep(folder: Path, name: str, kernel: Any) -> None:
    """The source in Triton's own form, and the assembly of the GPU."""
    texts = {
        key: kernel.asm[key] for key in ("ttir", "ttgir", "ptx", "amdgcn") if key in kernel.asm
    }
    if "cubin" in kernel.asm:
        texts["sass"] = sass(kernel.asm["cubin"])
    for suffix, text in texts.items():
        (folder / f"{name}.{suffix}").write_text(text, encoding="utf-8")


def _failed(path: Path, case: Row, error: Exception) -> Row:
    lines = str(error).strip().splitlines() or [""]
    return {
        "file": path.name,
        "kernel": case["function"],
        "cases": [case],
        "error": f"{type(error).__name__}: {lines[-1]}",
    }


def load(path: Path) -> ModuleType:
    """A file of kernels, which needs nothing of the package around it."""
    # A name of its own, since `deep_gemm.py` calls a library of that name.
    name = f"kernels_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def call(module: ModuleType, case: Row) -> None:
    """The launcher of a case, with tensors that have no memory."""
    arguments, keywords = read(case, without_memory)
    getattr(module, case["function"])(*arguments, **keywords)


def with_driver(target: Target, tell: Callable[[Launch], None]) -> None:
    """Lets Triton believe in a GPU of the target, and every launch end with the compiled kernel."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    class Absent(DriverBase):  # type: ignore[misc]
        """What the compiler asks of a driver."""

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget(target.backend, target.arch, target.warp_size)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("meta")

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError("nothing is launched")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing is launched")

    def launcher(self: JITFunction[Any], grid: object) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            kernel = self.warmup(*arguments, grid=grid, **keywords)
            constants = {
                self.arg_names[place[0]]: value
                for place, value in kernel.src.constants.items()
                if len(place) == 1 and isinstance(value, (int, float, str))
            }
            tell(
                {
                    "name": kernel.metadata.name,
                    "hash": kernel.hash,
                    "kernel": kernel,
                    "constants": constants,
                    "warps": kernel.metadata.num_warps,
                    "stages": kernel.metadata.num_stages,
                }
            )

        return launch

    driver.set_active(Absent())
    JITFunction.__getitem__ = launcher


if __name__ == "__main__":
    main(sys.argv[1:])
