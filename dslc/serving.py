"""The tables of `dslc plan --serve`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compiler.plan.serving import ServingPlan
    from dsl.schema import Cluster, Traffic
    from dslc.balance import LoadBalance

Row = tuple[str, ...]


def serving_text(
    served: ServingPlan,
    model: str,
    cluster: Cluster,
    traffic: Traffic,
    found: Sequence[LoadBalance],
) -> str:
    from compiler.plan.serving import CONVENTIONS
    from dslc.commands.show import table, wrapped

    parts = [
        table(_heads(model, cluster, traffic), "<<"),
        table(_decoding(served), "<" + ">" * len(served.steps)),
        table(_prompts(served), "<>"),
        table(_nodes(served, traffic), "<><"),
        table(_balance(found), "<" + ">" * len(found)) if found else [],
        table(_besides(served), "<<"),
        ["How this is counted:", *wrapped(CONVENTIONS)],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _heads(model: str, cluster: Cluster, traffic: Traffic) -> Iterator[Row]:
    yield ("model", model)
    yield ("cluster", f"{cluster.cluster}, nodes of {cluster.gpus_per_node} GPUs")
    yield ("traffic", f"{traffic.traffic}: {traffic.about}".rstrip(": "))
    for name, unit in (("decode", traffic.decode), ("prefill", traffic.prefill)):
        yield (f"{name} unit", f"{unit.expert} GPUs, {unit.redundant} redundant experts a layer")


def _decoding(served: ServingPlan) -> Iterator[Row]:
    steps = served.steps
    yield (
        f"a step of decoding, {served.decode_bytes / 1e9:.1f} GB of weights",
        *(f"{step.requests} requests a GPU" for step in steps),
    )
    yield ("weights read, GB", *(f"{step.weights / 1e9:.1f}" for step in steps))
    yield ("cache read, GB", *(f"{step.cache / 1e9:.1f}" for step in steps))
    yield ("memory, ms", *(f"{step.memory * 1e3:.1f}" for step in steps))
    yield ("products, ms", *(f"{step.products * 1e3:.1f}" for step in steps))
    yield ("attention core, ms", *(f"{step.core * 1e3:.1f}" for step in steps))
    yield ("dispatch and combine, ms", *(f"{step.sending * 1e3:.1f}" for step in steps))
    yield ("bound, overlapped: tokens/s and node", *(f"{step.overlapped:,.0f}" for step in steps))
    yield ("bound, in turn: tokens/s and node", *(f"{step.in_turn:,.0f}" for step in steps))


def _prompts(served: ServingPlan) -> Iterator[Row]:
    prompt = served.prompt
    yield (f"a computed token of a prompt, {served.prefill_bytes / 1e9:.1f} GB of weights", "us")
    yield ("products", f"{prompt.products * 1e6:.1f}")
    yield ("attention core", f"{prompt.core * 1e6:.1f}")
    yield ("to other nodes", f"{prompt.across * 1e6:.1f}")
    yield ("inside nodes", f"{prompt.inside * 1e6:.1f}")
    yield ("bound, overlapped: tokens/s and node", f"{prompt.overlapped:,.0f}")


def _nodes(served: ServingPlan, traffic: Traffic) -> Iterator[Row]:
    read, written = traffic.measured.prefill, traffic.measured.decode
    yield ("a day", "nodes", "at tokens/s and node")
    yield ("prompts", f"{served.prefill_nodes:,.1f}", _rate(read, "bound, overlapped"))
    yield ("answers", f"{served.decode_nodes:,.1f}", _rate(written, "best bound, in turn"))
    yield ("together", f"{served.prefill_nodes + served.decode_nodes:,.1f}", "")


def _balance(found: Sequence[LoadBalance]) -> Iterator[Row]:
    """Of the recorded loads, for each number of redundant experts."""
    yield (
        "tokens of the busiest GPU over the mean",
        *(f"{one.redundant} redundant" for one in found),
    )
    for name in ("decode", "prefill"):
        units = [getattr(one, name) for one in found]
        yield (f"{name} unit, mean of layers", *(f"{one.mean:.2f}" if one else "" for one in units))
        yield (f"{name} unit, worst layer", *(f"{one.worst:.2f}" if one else "" for one in units))


def _besides(served: ServingPlan) -> Iterator[Row]:
    decode, prefill = (f"{size / 1e9:.1f}" for size in served.mtp_bytes)
    yield ("MTP modules", f"{decode} GB of weights of a decoding GPU, {prefill} of a prefill GPU")
    yield ("cache", f"{served.cache_transfer * 1e3:.1f} ms for that of a request to another unit")


def _rate(rate: int | None, bound: str) -> str:
    return f"the {bound}" if rate is None else f"{rate:,}, measured"
