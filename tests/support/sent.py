"""What a rank sends in a step: run by each rank of `tests/support/processes.py`."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.places import TEXT


def sent(package: Any) -> dict[str, int]:
    """Bytes by purpose of a step of this process's rank, with tokens dealt evenly to experts."""
    name = f"{package.__name__}.runtime"
    parallel, ranks, settings, sequences, traffic, waits = (
        importlib.import_module(f"{name}.train.{one}")
        for one in ("parallel", "ranks", "settings", "sequences", "traffic", "waits")
    )
    functional = importlib.import_module(f"{name}.functional")
    with ranks.init_process_groups() as groups:
        mesh = parallel.make_mesh(package.Model, groups, torch.device("cpu"))
        given = settings.Settings.of(package.config)
        text = torch.tensor(list(TEXT.read_bytes()[:3000]), dtype=torch.uint8)
        told, counted = waits.Waits(), sequences.Sequences([text], given.sequence_length, 0)
        device = torch.device("cpu")
        trainer = parallel.make_trainer(
            package.Model, device, 0, given, counted, groups, mesh, told
        )
        plan = json.loads(Path(package.__file__).with_name("plan.json").read_text())
        functional.topk_groups = even(plan)
        counter = traffic.Counter(told)
        traffic.count_exchanges(trainer.model, counter)
        with counter:
            trainer.step()
    return {purpose: one.bytes for purpose, one in counter.sent.items()}


def even(plan: Any) -> Any:
    """A router that sends tokens to as many nodes and ranks as a plan says, and to all equally."""
    (one,), mesh = plan["experts"], plan["mesh"]
    inside = min(mesh["expert"], mesh["ranks_of_a_node"])
    nodes, each = mesh["expert"] // inside, one["on_each_rank"]
    on_a_node = one["experts_of_a_token"] // one["nodes_of_a_token"]

    def topk_groups(score: Tensor, bias: Tensor | None, *, k: int, **_: Any) -> Any:
        token = torch.arange(score[..., 0].numel()).view(*score.shape[:-1], 1)
        choice = torch.arange(k)
        node = (token + choice // on_a_node) % nodes
        rank = (token // nodes + choice % on_a_node) % inside
        found = (node * inside + rank) * each + choice // (on_a_node * nodes)
        return found, score.gather(-1, found)

    return topk_groups
