"""The GPUs that kernels are written for, and what limits a kernel there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One kind of GPU, as Triton and this project name it.

    `shared_bytes` is the most that one program may take of a multiprocessor's shared memory,
    `threads` and `registers` what a multiprocessor has of both. `flops` are dense peaks a second by
    element type, `bandwidth` bytes a second: the published figures of `gpu`, used for floors.
    """

    name: str
    gpu: str
    backend: str
    arch: int | str
    warp_size: int
    multiprocessors: int
    shared_bytes: int
    registers: int
    threads: int
    flops: Mapping[str, float]
    bandwidth: float


TARGETS = {
    target.name: target
    for target in (
        Target(
            name="sm_90",
            gpu="H800 SXM",
            backend="cuda",
            arch=90,
            warp_size=32,
            multiprocessors=132,
            shared_bytes=232448,
            registers=65536,
            threads=2048,
            flops={"fp8": 1979e12, "bf16": 989e12},
            bandwidth=3.35e12,
        ),
        Target(
            name="sm_100",
            gpu="B200",
            backend="cuda",
            arch=100,
            warp_size=32,
            multiprocessors=148,
            shared_bytes=232448,
            registers=65536,
            threads=2048,
            flops={"fp8": 4500e12, "bf16": 2250e12},
            bandwidth=8.0e12,
        ),
        Target(
            name="gfx942",
            gpu="MI300X",
            backend="hip",
            arch="gfx942",
            warp_size=64,
            multiprocessors=304,
            shared_bytes=65536,
            registers=131072,
            threads=2048,
            flops={"fp8": 2614e12, "bf16": 1307e12},
            bandwidth=5.3e12,
        ),
    )
}
