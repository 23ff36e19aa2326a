"""What a launch costs the host: launchers of a build against Triton's own `kernel[grid](...)`.

`python benchmarks/launch.py [SPEC]` from the repository's root. No GPU is needed: tensors are
the CPU's, and where Triton would compile and launch there is nothing. Each function of a build is
called with the arguments of one of its cases, as the model calls it (dispatch included), then what
it launched is launched again by Triton alone; both in turns, of which the least time counts. What
torch takes to allocate memory on a GPU, and the driver to launch, is in neither.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from backends.build import build  # noqa: E402
from backends.triton.arguments import read as arguments_of  # noqa: E402
from backends.triton.launches import with_driver  # noqa: E402
from backends.triton.target import TARGETS  # noqa: E402
from dslc.specs import read  # noqa: E402

Call = Callable[[], object]

GOAL = 2.0
TORCH = {"linear_cross_entropy"}
"""What multiplies by torch between its launches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec", nargs="?", default="deepseek_v3_tiny")
    parser.add_argument(
        "--target", choices=[name for name in TARGETS if name != "cpu"], default="sm_90"
    )
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--rows", default="m64", help="cases to take, where a function has them")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=50, help="of a round")
    asked = parser.parse_args()
    without_launches(asked.target)
    print(f"torch {torch.__version__}, Triton {triton.__version__}, {asked.spec} {asked.target}")
    print(
        f"{'function':34} {'launches':>8} {'launcher':>9} {'Triton':>9} {'ratio':>6}   microseconds"
    )
    totals = [0.0, 0.0]
    ratios: list[float] = []
    for name, call, launches in functions(asked):
        ours, own = least(asked, call, partial(repeat, launches))
        totals = [totals[0] + ours, totals[1] + own]
        ratios.append(ours / own)
        print(f"{name:34} {len(launches):8} {ours:9.1f} {own:9.1f} {ours / own:6.2f}", flush=True)
    print(f"{'all':34} {'':8} {totals[0]:9.1f} {totals[1]:9.1f} {totals[0] / totals[1]:6.2f}")
    within = sum(ratio <= GOAL for ratio in ratios)
    print(f"median {statistics.median(ratios):.2f}; {within} of {len(ratios)} within {GOAL}")


def functions(asked: argparse.Namespace) -> Iterator[tuple[str, Call, list[Call]]]:
    """Each function that kernels serve, called by the model's name with the arguments of a case.

    With what it launches.
    """
    folder, package = Path(tempfile.mkdtemp()), "launch_benchmark"
    sets = [*asked.set, f"model={package}"]
    build(read(asked.spec, sets, None), folder / package, target=TARGETS[asked.target])
    sys.path.insert(0, str(folder))
    kernels = importlib.import_module(f"{package}.kernels")
    dispatch: Any = importlib.import_module(f"{package}.runtime.dispatch")
    dispatch.serves = lambda target, device: True
    record = json.loads((folder / package / "kernels" / "kernels.json").read_text())
    spaces = [space for space in vars(kernels).values() if isinstance(space, type)]
    for file in record["files"]:
        cases: dict[str, list[dict[str, Any]]] = {}
        for case in sorted(file["cases"], key=partial(order, asked.rows)):
            cases.setdefault(case["function"], []).append(case)
        for name in (name for name in cases if name not in TORCH):
            those = [space for space in spaces if name in vars(space)]
            if len(those) > 1:  # products have the same name in bfloat16 and FP8
                fp8 = file["name"].startswith("fp8_")
                those = [space for space in those if (space.__name__ == "fp8") is fp8]
            function = getattr(those[0], name)
            for case in cases[name]:  # some are of another type than the model has
                positional, named = arguments_of(case, empty)
                call = partial(function, *positional, **named)
                if launches := launched(call):
                    yield f"{those[0].__name__}.{name}", call, launches
                    break


def order(rows: str, case: dict[str, Any]) -> tuple[bool, int]:
    """Cases with the rows that are asked for first, then small ones: a CPU really fills zeros."""
    tensors = [one for one in case["arguments"] if isinstance(one, dict) and "shape" in one]
    return rows not in case["name"].split(), sum(math.prod(one["shape"]) for one in tensors)


def empty(value: dict[str, Any]) -> torch.Tensor:
    """A tensor of a case, on the CPU: torch's `meta` device takes longer for the same."""
    made = torch.empty(value["shape"], dtype=getattr(torch, value["dtype"]))
    if not value.get("strides"):
        return made
    return torch.empty_strided(value["shape"], value["strides"], dtype=made.dtype)


def without_launches(target: str) -> None:
    """Where Triton would compile a kernel there is one that does nothing."""
    launch = JITFunction.__getitem__
    with_driver(TARGETS[target], lambda told: None)
    JITFunction.__getitem__ = launch

    class Nothing:
        function = packed_metadata = None

        def launch_metadata(self, *arguments: Any) -> None:
            return None

        def run(self, *arguments: Any) -> None:
            return None

    def compile_nothing(self: Any, key: Any, signature: Any, device: Any, *rest: Any) -> Nothing:
        found: Nothing = self.device_caches[device][0].setdefault(key, Nothing())
        return found

    JITFunction._do_compile = compile_nothing


def launched(call: Call) -> list[Call]:
    """What a call launches, to be launched again."""
    found: list[Call] = []
    launch = JITFunction.__getitem__

    def remember(self: Any, grid: Any) -> Callable[..., None]:
        def run(*arguments: Any, **keywords: Any) -> None:
            found.append(lambda: self[grid](*arguments, **keywords))

        return run

    JITFunction.__getitem__ = remember
    try:
        call()
    finally:
        JITFunction.__getitem__ = launch
    return found


def repeat(launches: list[Call]) -> None:
    for launch in launches:
        launch()


@torch.inference_mode()
def least(asked: argparse.Namespace, *calls: Call) -> list[float]:
    """Microseconds of each, the least of all rounds."""
    found = [float("inf") for _ in calls]
    for call in calls:
        call()
    gc.disable()
    for _ in range(asked.rounds):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(asked.calls):
                call()
            found[i] = min(found[i], (time.perf_counter() - start) / asked.calls)
    gc.enable()
    return [1e6 * seconds for seconds in found]


if __name__ == "__main__":
    main()
