"""Two processes that share a batch compute what one computes: `fully_shard` and DDP, on gloo."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from backends.build import build
from dsl.load import load
from tests.support.places import TINY

RANKS = 2
STEPS = 2
TOKENS = torch.randint(512, (2 * RANKS, 12), generator=torch.manual_seed(0))


def train(model: Any, loss: Any, tokens: Tensor) -> None:
    """Some steps of plain descent, each of which starts from what the one before it left."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()


def fresh(folder: str) -> Any:
    sys.path.insert(0, folder)
    return importlib.import_module("tiny_parallel").Model(dtype=torch.float64, seed=1)


class Objective(nn.Module):
    """DDP sees calls of a module only."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        total: Tensor = self.model.loss(tokens, labels).total
        return total


def sharded(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    return lambda tokens, labels: model.loss(tokens, labels).total


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    own = TOKENS.chunk(RANKS)[rank]
    one = fresh(folder)
    train(one, Objective(one), TOKENS)
    expected = {n: (p.detach(), p.grad) for n, p in one.named_parameters()}

    model = fresh(folder)
    train(model, DistributedDataParallel(Objective(model)), own)
    check("DDP", {n: (p.detach(), p.grad) for n, p in model.named_parameters()}, expected)

    model = fresh(folder)
    train(model, sharded(model), own)
    whole = {
        n: (p.detach().full_tensor(), p.grad.full_tensor()) for n, p in model.named_parameters()
    }
    check("fully_shard", whole, expected)
    dist.destroy_process_group()


def check(how: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        torch.testing.assert_close(
            found[name], pair, msg=lambda text, name=name: f"{how} {name}: {text}"
        )


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    build(load(TINY), tmp_path / "tiny_parallel")
    mp.spawn(work, (str(tmp_path),), nprocs=RANKS)
