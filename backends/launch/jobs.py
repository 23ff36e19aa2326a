"""Job files that start the ranks of a layout on every node of its cluster, by torchrun."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from backends import VERSION
from backends.render import render
from compiler.plan.plan import Plan
from dsl.schema import Cluster

PORT = 29500
"""Where torchrun's processes meet on the first node, as it does by default."""


@dataclass(frozen=True)
class Variable:
    """Of the environment; without a value it is shown as a comment, for people to set."""

    name: str
    value: str | None
    why: str


def variables(cluster: Cluster) -> Iterator[Variable]:
    """The environment of each rank."""
    yield Variable("OMP_NUM_THREADS", "1", "Threads of one rank on the CPU, of which it needs few.")
    yield Variable(
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
        "1",
        "Ranks that start again meet in a new store, without the addresses of those before.",
    )
    if not on_gpus(cluster):
        return
    yield Variable(
        "PYTORCH_CUDA_ALLOC_CONF",
        "expandable_segments:True",
        "Experts get other numbers of tokens each time: memory that grows is not fragmented.",
    )
    yield Variable("NCCL_DEBUG", "WARN", "NCCL says what goes wrong; INFO: how it connects, too.")
    if cluster.nodes > 1:
        yield Variable(
            "NCCL_SOCKET_IFNAME",
            None,
            "The interface by which NCCL meets, such as =eth0, where nodes have several.",
        )
        yield Variable(
            "GLOO_SOCKET_IFNAME",
            None,
            "The same, without =, for the groups of checkpoints and stops.",
        )
        yield Variable(
            "NCCL_IB_HCA",
            None,
            "Which InfiniBand adapters NCCL uses, such as mlx5; by default all.",
        )
        yield Variable(
            "NCCL_IB_TIMEOUT",
            "22",
            "A packet is lost after 4 us x 2^22 = 17 s (2^20: 4 s): links may come up again.",
        )
    yield Variable(
        "TORCH_FR_BUFFER_SIZE",
        "2000",
        "The flight recorder keeps the last 2,000 operations of each rank ...",
    )
    yield Variable("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "... writes them when one never ends ...")
    yield Variable(
        "TORCH_FR_DUMP_TEMP_FILE", "logs/flight-", "... to files of this name and the rank."
    )


def on_gpus(cluster: Cluster) -> bool:
    """Whether a cluster file describes GPUs: it has a rate or a size of memory."""
    return cluster.flops.bf16 is not None or cluster.memory is not None


def slurm(plan: Plan, model: str, spec: str, spare: int, restarts: int) -> str:
    """A script for `sbatch`."""
    return render("launch/slurm.sh.jinja", **_facts(plan, model, spec, spare, restarts))


def kubernetes(
    plan: Plan, model: str, spec: str, spare: int, restarts: int, image: str, claim: str
) -> str:
    """A headless service and an indexed job for `kubectl apply`."""
    facts = _facts(plan, model, spec, spare, restarts)
    # Names of Kubernetes are those of hosts.
    job = model.lower().replace("_", "-").strip("-")
    return render("launch/kubernetes.yaml.jinja", job=job, image=image, claim=claim, **facts)


def _facts(plan: Plan, model: str, spec: str, spare: int, restarts: int) -> dict[str, object]:
    mesh, cluster = plan.layout.mesh, plan.cluster
    return {
        "model": model,
        "spec": spec,
        "version": VERSION,
        "mesh": f"{mesh.pipeline} pipeline x {mesh.replicas} replicas x {mesh.expert} expert ranks",
        "cluster": cluster,
        "gpus": on_gpus(cluster),
        "spare": spare,
        "restarts": restarts,
        "variables": list(variables(cluster)),
        "port": PORT,
    }
