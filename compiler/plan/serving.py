"""What a served model takes and gives on a cluster, as bounds at the rates of the cluster file.

Attention and everything outside of the routed experts is on every GPU, for its own requests; the
routed experts of a layer are spread over a unit of GPUs, with copies of some. A step of decoding
reads all weights that a GPU holds, once, and the cache of its requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from compiler.analysis.costs import Costs
from compiler.analysis.modules import Module
from compiler.analysis.summary import TRAINING_PASSES, Summary, summary
from compiler.analysis.work import Work, total
from compiler.graph.core import Program
from compiler.graph.types import BYTES
from compiler.parallel.layout import router_of
from compiler.plan.traffic import expert_bytes
from dsl.schema import Cluster
from dsl.schema.traffic import Traffic, Unit

DAY = 24 * 60 * 60

CONVENTIONS = (
    "Weights of FP8 products are held in FP8, all others and the cache in the model's element type;"
    " scales are left out. A GPU holds equally many experts of every layer.",
    "Products with weights run at the FP8 rate where the spec's precision is FP8, the core of"
    " attention at the BF16 rate, and reading memory goes on beside both.",
    "In decoding, a token goes once to each of its experts and back over the links between nodes:"
    " in FP8 with its scales, and back in BF16. In prefill it goes once to each of its nodes, and"
    " on to the GPUs there.",
    "Seconds are those at the full rates of the cluster file. `overlapped` is the bound if sending"
    " is hidden by everything else, `in turn` if by nothing.",
)


@dataclass(frozen=True)
class RoutedExperts:
    """The routed layers of a model, which are alike; bytes are of one token, for all layers."""

    layers: int
    count: int
    k: int
    nodes: int
    """The most nodes that a token goes to, by the groups of the router."""
    dispatch: int
    combine: int
    groups: int
    """Of the router; 1 where it has none."""


@dataclass(frozen=True)
class DecodeStep:
    """One step of decoding on each GPU, in seconds and bytes."""

    requests: int
    weights: float
    cache: float
    memory: float
    products: float
    core: float
    sending: float
    gpus_per_node: int

    @property
    def computing(self) -> float:
        """Memory and arithmetic beside each other."""
        return max(self.memory, self.products + self.core)

    def rate(self, seconds: float) -> float:
        """Tokens a second and node."""
        return self.requests * self.gpus_per_node / seconds

    @property
    def overlapped(self) -> float:
        return self.rate(max(self.computing, self.sending))

    @property
    def in_turn(self) -> float:
        return self.rate(self.computing + self.sending)


@dataclass(frozen=True)
class Prompt:
    """One computed token of a prompt, in seconds of a GPU."""

    products: float
    core: float
    across: float
    inside: float
    gpus_per_node: int

    @property
    def overlapped(self) -> float:
        """Tokens a second and node, if everything runs beside everything else."""
        return self.gpus_per_node / max(self.products + self.core, self.across, self.inside)


@dataclass(frozen=True)
class ServingPlan:
    """A served model: `steps` for each number of requests, and what a day takes."""

    decode_bytes: float
    """Weights of a GPU that decodes; `prefill_bytes` of one that computes prompts."""
    prefill_bytes: float
    mtp_bytes: tuple[float, float]
    """What the MTP modules add to either."""
    steps: tuple[DecodeStep, ...]
    prompt: Prompt
    cache_transfer: float
    """Seconds that the cache of a request takes from a prefill unit to a decoding one."""
    prefill_nodes: float
    decode_nodes: float


def serve(
    lowered: Program, decode: Program, absorbed: Program, cluster: Cluster, traffic: Traffic
) -> ServingPlan:
    """`absorbed` is the decode program before its experts are fused.

    Raises ValueError for a model without routed experts, and for a cluster without the rates.
    """
    rates = _rates(cluster)
    experts = routed_experts(absorbed)
    contexts = summary(
        lowered,
        decode,
        sequence_length=2 * traffic.prefill_context,  # of which a query sees half
        context_length=traffic.context,
    )
    held = Weights(contexts, experts)
    product_rate = rates["fp8"] if contexts.model.fp8_elements else rates["bf16"]
    gpus = cluster.gpus_per_node
    flops = contexts.decoding_flops
    core = flops.get(Work.ATTENTION_CORE, 0)
    steps = []
    asked = traffic.requests if isinstance(traffic.requests, tuple) else (traffic.requests,)
    for requests in asked:
        read = held.read(traffic.decode)
        cache = float(requests * traffic.context * contexts.cache_bytes)
        steps.append(
            DecodeStep(
                requests=requests,
                weights=read,
                cache=cache,
                memory=(read + cache) / rates["memory_bandwidth"],
                products=requests * (total(flops) - core) / product_rate,
                core=requests * core / rates["bf16"],
                sending=requests
                * experts.k
                * (experts.dispatch + experts.combine)
                / rates["across"],
                gpus_per_node=gpus,
            )
        )
    prompt = _prompt(contexts, experts, traffic, rates, product_rate, gpus)
    day = _nodes(traffic, steps, prompt)
    transfer = traffic.context * contexts.cache_bytes / rates["across"]
    return ServingPlan(
        decode_bytes=held.stored(traffic.decode),
        prefill_bytes=held.stored(traffic.prefill),
        mtp_bytes=(held.mtp(traffic.decode), held.mtp(traffic.prefill)),
        steps=tuple(steps),
        prompt=prompt,
        cache_transfer=transfer,
        prefill_nodes=day[0],
        decode_nodes=day[1],
    )


def _prompt(
    numbers: Summary,
    experts: RoutedExperts,
    traffic: Traffic,
    rates: dict[str, float],
    product_rate: float,
    gpus: int,
) -> Prompt:
    core = numbers.training_flops.get(Work.ATTENTION_CORE, 0) / TRAINING_PASSES
    # The head scores the last token of a prompt only.
    head = numbers.training_flops.get(Work.HEAD, 0)
    products = (numbers.product_flops - head) / TRAINING_PASSES
    spanned = -(-traffic.prefill.expert // gpus)
    nodes = min(experts.nodes, spanned)
    moved = experts.dispatch + experts.combine
    return Prompt(
        products=products / product_rate,
        core=core / rates["bf16"],
        across=float(nodes * Fraction(spanned - 1, spanned) * moved) / rates["across"],
        inside=nodes * moved / rates["inside"],
        gpus_per_node=gpus,
    )


def _nodes(traffic: Traffic, steps: list[DecodeStep], prompt: Prompt) -> tuple[float, float]:
    """For prompts and for answers, at the measured rates, or at the best bounds."""
    measured = traffic.measured
    read = measured.prefill or prompt.overlapped / max(1 - traffic.cached, 1e-9)
    written = measured.decode or max(step.in_turn for step in steps)
    return traffic.input_tokens / DAY / read, traffic.output_tokens / DAY / written


class Weights:
    """Bytes of weights on a GPU of a unit."""

    def __init__(self, numbers: Summary, experts: RoutedExperts) -> None:
        self._model, self._mtp = numbers.model, numbers.mtp
        self._experts = experts

    def read(self, unit: Unit) -> float:
        """What a step of decoding reads: all but the table of the embedding."""
        table = self._model.elements.get(Work.EMBEDDING, 0) * BYTES["bf16"]
        return self._bytes(self._model, unit) - table

    def stored(self, unit: Unit) -> float:
        return self._bytes(self._model, unit)

    def mtp(self, unit: Unit) -> float:
        return self._bytes(self._mtp, unit)

    def _bytes(self, module: Module, unit: Unit) -> float:
        routed = module.elements.get(Work.ROUTED_EXPERTS, 0)
        width = 1 if module.fp8_elements else BYTES["bf16"]
        others = module.bytes - module.fp8_elements - routed * width
        each = -(-(self._experts.count + unit.redundant) // unit.expert)
        return others + routed * width * each / self._experts.count


def routed_experts(absorbed: Program) -> RoutedExperts:
    """Of a decode program before its experts are fused.

    Raises ValueError if there are none, or if layers differ.
    """
    runs = Costs(absorbed).runs()
    found = [one for graph in absorbed.graphs for one in _of(absorbed, graph, runs[graph])]
    if not found:
        raise ValueError("the model has no routed experts that could be spread over GPUs")
    if len({(one.count, one.k, one.nodes) for one in found}) > 1:
        raise ValueError("the layers of the model have different numbers of experts")
    first = found[0]
    return RoutedExperts(
        sum(one.layers for one in found),
        first.count,
        first.k,
        first.nodes,
        sum(one.dispatch for one in found),
        sum(one.combine for one in found),
        first.groups,
    )


def _of(program: Program, name: str, runs: int) -> Iterator[RoutedExperts]:
    graph = program.graphs[name]
    producers = graph.producers()
    for op in graph.walk():
        if op.kind != "experts":
            continue
        route = op.operands[1]
        router, k = router_of(producers, route), route.type.last.size or 0
        dispatch, combine, _ = expert_bytes(graph, op)
        yield RoutedExperts(
            runs,
            op.number("count"),
            k,
            k if router is None else min(k, router.number("topk_group")),
            runs * dispatch,
            runs * combine,
            1 if router is None else router.number("n_group"),
        )


def _rates(cluster: Cluster) -> dict[str, float]:
    """Raises ValueError that names what is missing."""
    rates = {
        "memory_bandwidth": cluster.memory_bandwidth,
        "bf16": cluster.flops.bf16,
        "fp8": cluster.flops.fp8 or cluster.flops.bf16,
        "inside": cluster.links.inside,
        "across": cluster.links.across,
    }
    missing = [name for name, rate in rates.items() if rate is None]
    if missing:
        raise ValueError(f"the cluster {cluster.cluster} does not say {', '.join(missing)}")
    return {name: float(rate) for name, rate in rates.items() if rate is not None}
