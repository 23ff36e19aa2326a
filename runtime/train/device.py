"""Which device a process trains on, and the random state of that device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from .settings import TrainError


def select_device(name: str | None) -> torch.device:
    """The CPU, or one GPU: LOCAL_RANK says which, for several processes on a machine.

    Without a name a GPU if torch finds one. It becomes the current device, on which kernels run.
    Raises TrainError for a device that does not exist.
    """
    asked = _named(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if asked.type == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    if several and asked.index not in (None, local):
        raise TrainError(f"--device {name} would be the device of all ranks: give --device cuda")
    index = local if asked.index is None else asked.index
    count = torch.cuda.device_count()
    if index >= count:
        raise TrainError(f"there is no cuda:{index}: torch finds {count} GPU(s)")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _named(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise TrainError(f"--device {name} cannot train: use cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TrainError(f"--device {name}: torch finds no GPU")
    return device


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the random generators that computing on a device may use, as hex by name."""
    states = {"random": torch.get_rng_state()}
    if device.type == "cuda":
        states["random_cuda"] = torch.cuda.get_rng_state(device)
    return {name: bytes(state.tolist()).hex() for name, state in states.items()}


def set_random_state(device: torch.device, values: Mapping[str, Any]) -> None:
    """Restores what `random_state` returned; the state of a device that is not in it stays."""
    torch.set_rng_state(_bytes(values["random"]))
    if device.type == "cuda" and "random_cuda" in values:
        torch.cuda.set_rng_state(_bytes(values["random_cuda"]), device)


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
