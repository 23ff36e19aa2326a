"""Memory: what training needs at least, what there is, and errors of having run out of it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .settings import TrainError

if TYPE_CHECKING:  # `shortage` is for programs that have no torch, too
    import torch

    from ..model import LanguageModel

LESS = "lower train.micro_batch or train.sequence_length, or make the model smaller"
_SAYS = re.compile(r"(can't|cannot|unable to) allocate|out of memory|not enough memory", re.I)
_SIZE = re.compile(r"allocate ([\d.]+) *(bytes|[KMGT]?i?B)", re.I)


def shortage(error: BaseException) -> str | None:
    """How an error says that memory ran out, in one line; None for any other error.

    Of Python (MemoryError), of the system (OSError), or of torch: a RuntimeError on the CPU, a
    class of its own that is one, too, on GPUs.
    """
    system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    by_torch = isinstance(error, RuntimeError) and _SAYS.search(str(error))
    if not (isinstance(error, MemoryError) or system or by_torch):
        return None
    found = _SIZE.search(str(error))
    if found is None:
        return "out of memory"
    size, unit = found.groups()
    shown = f"{int(size) / 1e9:,.2f} GB" if unit == "bytes" else f"{size} {unit}"
    return f"out of memory: {shown} more could not be allocated"


def require_memory(model: type[LanguageModel], device: torch.device) -> None:
    """Raises TrainError where a single process cannot hold what training needs.

    Weights, float32 gradients and the state of the optimizer; activations come on top.
    """
    needed, there = training_bytes(model), memory_of(device)
    if there is not None and needed > there:
        raise TrainError(
            f"{model.config.model} needs {needed / 1e9:,.1f} GB for weights, gradients and "
            f"optimizer state alone, and {device.type} has {there / 1e9:,.1f} GB: train a smaller "
            f"model, or spread this one over ranks by the section `parallel` of its spec"
        )


def training_bytes(model: type[LanguageModel]) -> int:
    """Bytes of weights, gradients, float32 masters and moments of a whole model."""
    total = 0
    for weight in model(device="meta").parameters():
        size = weight.element_size()
        master = 0 if size == 4 else 4
        each = size + (4 + master + 2 * size if weight.requires_grad else 0)
        total += weight.numel() * each
    return total


def memory_of(device: torch.device) -> int | None:
    """The bytes that a device has for a process, other processes aside; None if not known."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return min(_limits(), default=None)


def _limits() -> Iterator[int]:
    """Of the machine with its swap space, of the container, and of the process."""
    known = dict(re.findall(r"^(\w+): +(\d+) kB$", _text("/proc/meminfo"), re.M))
    if "MemTotal" in known:
        yield (int(known["MemTotal"]) + int(known.get("SwapTotal", 0))) * 1024
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        if (limit := _text(f"/sys/fs/cgroup/{file}").strip()).isdigit():
            yield int(limit)
    try:
        import resource  # not on Windows
    except ImportError:
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        yield soft


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
