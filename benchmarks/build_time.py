"""How long a build takes as a whole process, how much memory, and how that grows with the model.

The peer is transformers making the same model on the meta device, its imports included: the usual
way to have a model of this size at all without a machine that holds it. Ratios carry over to other
machines, seconds do not. Run it with `python benchmarks/build_time.py` from the repository's root.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SPEC = ROOT / "specs" / "deepseek_v3.yaml"
REPEATS = 3
PEER = """
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
config = DeepseekV3Config(num_hidden_layers={layers}, n_routed_experts={experts})
with torch.device("meta"):
    model = DeepseekV3ForCausalLM(config)
"""


@dataclass(frozen=True)
class Size:
    layers: int
    experts: int

    def build(self, out: Path) -> list[str]:
        """The command line that builds V3 at this size; its first three layers are dense."""
        sets = [
            f"architecture.layers.1.repeat={self.layers - 3}",
            f"params.n_routed_experts={self.experts}",
        ]
        if self != WHOLE:
            sets.append("parallel=null")  # the layout is V3's
        flags = [argument for value in sets for argument in ("--set", value)]
        return [sys.executable, "-m", "dslc", "build", str(SPEC), "-o", str(out), *flags]

    def peer(self) -> list[str]:
        """The same model by the peer, without multi-token prediction, which it leaves out."""
        return [sys.executable, "-c", PEER.format(layers=self.layers, experts=self.experts)]


WHOLE = Size(61, 256)


@dataclass(frozen=True)
class Cost:
    seconds: float
    megabytes: float

    def __str__(self) -> str:
        return f"{self.seconds:8.2f} s {self.megabytes:7.0f} MB"


# As a user's second run: from the bytecode that the first one wrote, even where the environment
# forbids that, as containers often do. Compiling our sources takes as long as a build.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def measure(command: list[str]) -> Cost:
    """Median wall time and largest peak memory of a process, after one run to warm the caches."""
    runs = [run(command) for _ in range(REPEATS + 1)][1:]
    return Cost(
        statistics.median(cost.seconds for cost in runs), max(cost.megabytes for cost in runs)
    )


def run(command: list[str]) -> Cost:
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed with status {process.returncode}: {' '.join(command)}")
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(seconds, usage.ru_maxrss * unit / 1e6)


def main() -> None:
    sizes = [Size(4, 16), WHOLE, Size(1000, 256), Size(61, 4096), Size(1000, 4096)]
    print("layers experts            dslc build  transformers on meta   peer takes")
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            ours, peer = measure(size.build(Path(folder) / "build")), measure(size.peer())
            times = peer.seconds / ours.seconds
            memory = peer.megabytes / ours.megabytes
            ratio = f"{times:.1f}x the time, {memory:.1f}x the memory"
            print(f"{size.layers:6} {size.experts:7} {ours} {peer}   {ratio}", flush=True)


if __name__ == "__main__":
    main()
