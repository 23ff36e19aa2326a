"""Two ranks train what one does, and either goes on from the other's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.processes import ended, started
from tests.support.trained import built, part, trainer

# Run once by each rank, in the folder of the package.
RANK = """
import os, resource, sys, torch
from pathlib import Path
import torch.distributed as dist
folder, rank = sys.argv[1], os.environ["RANK"]
sys.path.insert(0, folder)
import tiny_ranks
import tiny_ranks.runtime.train.command
from tests.support.trained import part, trainer

torch.set_num_threads(1)
dist.init_process_group("gloo")
group, writers = dist.group.WORLD, dist.new_group(backend="gloo")
one = trainer(tiny_ranks, group=group)
for _ in range(3):
    did = one.step()
checkpoints = part(tiny_ranks, "checkpoints").Checkpoints(Path(folder) / "two", 1, writers)
checkpoints.save(part(tiny_ranks, "state").training_state(one))
checkpoints.wait()
print(did.total, did.gradient_norm)
again = trainer(tiny_ranks, group=group, seed=9)
views = part(tiny_ranks, "state").training_state(again)
values = checkpoints.load(Path(folder) / "one" / "step-00000003", views)
part(tiny_ranks, "state").restore(again, values)
print(again.step().total)

# What only one of them sees, both tell.
hook = again.model.model.layers[1].register_forward_hook(
    lambda module, inputs, outputs: (outputs[0] * float("nan"), *outputs[1:])
    if rank == "1" else outputs
)
for work in (again.step, lambda: (checkpoints.save(views), checkpoints.wait())):
    try:
        work()
    except part(tiny_ranks, "settings").TrainError as error:
        print(error)
    hook.remove()
    if rank == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_train_what_one_does(tmp_path: Path) -> None:
    package = built(tmp_path, "tiny_ranks", train__batch="5")
    one = trainer(package)
    for _ in range(3):
        did = one.step()
    save(package, one, tmp_path / "one")
    ranks = started(["-c", RANK, str(tmp_path)])
    outputs = [out for out, _ in ended(ranks)]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert outputs[0] == outputs[1]
    first, second, not_finite, full = outputs[0].splitlines()
    assert "step 5: the loss is nan" in not_finite
    assert "first not finite is what model.layers.1 (" in not_finite
    assert "cannot write the checkpoint" in full and "File too large" in full
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["step-00000003"]
    total, norm, fourth = map(float, [*first.split(), second])
    assert (total, norm) == pytest.approx((did.total, did.gradient_norm), rel=1e-4)

    alone = trainer(package, seed=8)
    views = part(package, "state").training_state(alone)
    checkpoints = part(package, "checkpoints").Checkpoints(tmp_path / "two", 1)
    part(package, "state").restore(alone, checkpoints.load(checkpoints.newest(), views))
    for ours, theirs in zip(biases(alone.model), biases(one.model), strict=True):
        assert torch.equal(ours, theirs)
    assert alone.position == one.position
    after = one.step().total
    assert (alone.step().total, fourth) == pytest.approx((after, after), rel=1e-4)


def save(package: Any, one: Any, folder: Path) -> None:
    checkpoints = part(package, "checkpoints").Checkpoints(folder, 1)
    checkpoints.save(part(package, "state").training_state(one))
    checkpoints.wait()


def biases(model: Any) -> list[torch.Tensor]:
    return [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
