"""Which device a process trains on, and the random state that lies there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from .settings import TrainError


def chosen(name: str | None) -> torch.device:
    """The CPU, or one GPU: of several processes on a machine each has its own, by LOCAL_RANK.

    Without a name a GPU if torch sees one. It becomes the current one, on which kernels run. Raises
    TrainError for a device that is not there.
    """
    asked = _named(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if asked.type == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    if several and asked.index not in (None, local):
        raise TrainError(f"--device {name} would be that of all ranks: give --device cuda")
    index = local if asked.index is None else asked.index
    count = torch.cuda.device_count()
    if index >= count:
        raise TrainError(f"there is no cuda:{index}: torch sees {count} GPU(s) here")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _named(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise TrainError(f"--device {name} is none to train on: it is cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TrainError(f"--device {name}: torch sees no GPU here")
    return device


def random_state(device: torch.device) -> dict[str, Any]:
    """What computing on a device may draw numbers from, as text by name."""
    states = {"random": torch.get_rng_state()}
    if device.type == "cuda":
        states["random_cuda"] = torch.cuda.get_rng_state(device)
    return {name: bytes(state.tolist()).hex() for name, state in states.items()}


def set_random_state(device: torch.device, values: Mapping[str, Any]) -> None:
    """Takes up what `random_state` gave; a device that had none then keeps its own."""
    torch.set_rng_state(_bytes(values["random"]))
    if device.type == "cuda" and "random_cuda" in values:
        torch.cuda.set_rng_state(_bytes(values["random_cuda"]), device)


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
