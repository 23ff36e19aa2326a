"""A stand-in for symmetric memory by NVSHMEM: torch's operator, on CPUs and by gloo.

`torch.ops.symm_mem.all_to_all_vdev_2d` is called through torch's dispatcher, with the schema of the
installed torch. What it checks, limits and writes is that of pytorch's
`torch/csrc/distributed/c10d/symm_mem/nvshmem_extension.cu`. That would write past the end of `out`
where it is too short, and read what another rank has changed since: both are errors here.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from tests.support.places import TEXT

WARP, TILES = 32, 512 // 32
"""Threads of a warp, and warps of a block: the most ranks, and experts of each."""


class SymmetricMemory:
    """What `torch.distributed._symmetric_memory` has of it, and the operator."""

    def __init__(self) -> None:
        self.backend = ""
        self.allocated: dict[int, int] = {}
        """Bytes of each allocation."""
        self.met: set[tuple[int, str]] = set()
        self.used: dict[str, tuple[int, int]] = {}
        """What other ranks may still read or write, of the last exchange of a group."""
        self.calls = 0

    def set_backend(self, name: str) -> None:
        assert name == "NVSHMEM" and not self.allocated
        self.backend = name

    def is_nvshmem_available(self) -> bool:
        return True

    def empty(self, *size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """All ranks there are allocate at once, as much."""
        assert self.backend == "NVSHMEM"
        made = torch.empty(*size, dtype=dtype, device=device)
        self._all_equal(dist.group.WORLD, made.nbytes)
        self.allocated[made.data_ptr()] = made.nbytes
        return made

    def rendezvous(self, tensor: Tensor, group: dist.ProcessGroup) -> None:
        assert tensor.nbytes == self.allocated[tensor.data_ptr()]
        self._all_equal(group, tensor.nbytes)
        self.met.add((tensor.data_ptr(), group.group_name))

    def all_to_all_vdev_2d(
        self,
        input: Tensor,
        out: Tensor,
        in_splits: Tensor,
        out_splits_offsets: Tensor,
        group_name: str,
        major_align: int | None = None,
    ) -> None:
        """Rows for each expert of each rank, by rank, to rows by expert of this rank.

        out_splits_offsets has, for each expert of this rank and each rank, how many rows came and
        where they begin. Rows of an expert begin at multiples of `major_align`, and an expert
        without rows has as many nevertheless.
        """
        group: Any = _resolve_process_group(group_name)  # type: ignore[arg-type]  # a NewType
        ranks, rank, align = group.size(), group.rank(), major_align or 1
        self.calls += 1
        self._check(input, out, in_splits, out_splits_offsets, group_name, ranks)
        experts = len(in_splits) // ranks
        splits = [torch.empty_like(in_splits) for _ in range(ranks)]
        dist.all_gather(splits, in_splits, group=group)
        assert all(int(one.min()) >= 0 for one in splits)
        assert int(in_splits.sum()) <= len(input), "sum of splits is larger than input dim"
        arriving = torch.stack([one.view(ranks, experts)[rank] for one in splits])
        sent = in_splits.view(ranks, experts).sum(1).tolist()
        found = input.new_empty(int(arriving.sum()), *input.shape[1:])
        given = input[: sum(sent)].contiguous()
        dist.all_to_all_single(found, given, arriving.sum(1).tolist(), sent, group=group)
        pieces = found.split(arriving.flatten().tolist())
        start = 0
        for expert in range(experts):
            at = start
            for other in range(ranks):
                piece = pieces[other * experts + expert]
                out_splits_offsets[:, expert * ranks + other] = torch.tensor([len(piece), at])
                assert at + len(piece) <= len(out), "rows past the end of out"
                out[at : at + len(piece)] = piece
                at += len(piece)
            start += max(-(-(at - start) // align), 1) * align

    def _check(
        self, input: Tensor, out: Tensor, in_splits: Tensor, arrived: Tensor, group: str, ranks: int
    ) -> None:
        tensors = (input, out, in_splits, arrived)
        for tensor in tensors:
            assert (tensor.data_ptr(), group) in self.met, "no rendezvous"
            assert tensor.nbytes <= self.allocated[tensor.data_ptr()]
            assert tensor.is_contiguous()
        assert ranks <= WARP and len(in_splits) % ranks == 0 and len(in_splits) // ranks <= TILES
        assert in_splits.dim() == 1 and arrived.shape == (2, len(in_splits))
        assert input.dtype == out.dtype and input.stride(0) == out.stride(0)
        assert in_splits.dtype == arrived.dtype == torch.int64
        # A rank that is behind reads `input`, and one ahead writes `arrived`, until all ranks meet
        # in the exchange after this.
        used = input.data_ptr(), arrived.data_ptr()
        before = self.used.get(group, ())
        assert not set(used) & set(before), "another rank may not be done with that"
        self.used[group] = used

    def _all_equal(self, group: Any, size: int) -> None:
        sizes: list[Any] = [None] * group.size()
        dist.all_gather_object(sizes, size, group=group)
        assert set(sizes) == {size}, sizes


LIBRARIES: list[Any] = []
"""Of a process, which keep the operator registered."""


def stand_in(symmetric: Any) -> SymmetricMemory:
    """Takes the place of torch's in a module `symmetric` of `runtime`, in this process."""
    found = SymmetricMemory()
    symmetric.symmetric_memory = lambda: found
    LIBRARIES[:] = [torch.library.Library("symm_mem", "IMPL")]
    LIBRARIES[0].impl("all_to_all_vdev_2d", found.all_to_all_vdev_2d, "CPU")
    return found


def trained(package: Any) -> dict[str, Any]:
    """A step of this process's rank by symmetric memory and one by all-to-alls: run by each rank
    of `tests/support/processes.py`."""
    name = f"{package.__name__}.runtime"
    parallel, ranks, settings, sequences, waits = (
        importlib.import_module(f"{name}.train.{one}")
        for one in ("parallel", "ranks", "settings", "sequences", "waits")
    )
    memory = stand_in(importlib.import_module(f"{name}.symmetric"))
    parallel.symmetric_memory = lambda: memory
    given = settings.Settings.of(package.config)
    text = torch.tensor(list(TEXT.read_bytes()[:3000]), dtype=torch.uint8)
    found, device = [], torch.device("cpu")
    with ranks.init_process_groups() as groups:
        mesh = parallel.make_mesh(package.Model, groups, device)
        for one in (mesh, replace(mesh, symmetric=None)):
            counted = sequences.Sequences([text], given.sequence_length, 0)
            trainer = parallel.make_trainer(
                package.Model, device, 0, given, counted, groups, one, waits.Waits()
            )
            trainer.step()
            found.append({name: one.clone() for name, one in trainer.model.named_parameters()})
    same = all(torch.equal(one, found[1][name]) for name, one in found[0].items())
    return {"same": same, "calls": memory.calls}
