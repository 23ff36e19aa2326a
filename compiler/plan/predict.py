"""How long a step takes: every operator of every stage at its rate, run by the schedule.

What overlaps is stated here and in `overlap.py`, and nowhere else; it is what the executor does
(`runtime/train/overlap.py`). A backward and a forward chunk that a schedule pairs (DualPipe,
report, section 3.2.1) compute in turn, while the other one's tokens are under way. A chunk alone
hides nothing. Products that are gradients of weights wait for gaps: the chunks W of a schedule, and
in pairs whenever a chunk would wait. Messages between stages are sent beside computing, and what
waits for one waits for all of it. The sums of gradients, the update and the gathering of weights
follow the last chunk of a rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

from compiler.analysis.executed import Executed, executed
from compiler.graph.core import Graph, Program
from compiler.ops import OPS
from compiler.plan.memory import Kind
from compiler.plan.overlap import OverlapSegment, paired
from compiler.plan.plan import Plan, Rank
from compiler.plan.rates import Rates, Term
from compiler.plan.schedule import Chunk, Schedule, Step, schedule
from compiler.plan.simulate import Timeline, simulate
from compiler.roles import Role

Part = Mapping[Term, float]
"""Seconds between two exchanges, the second included."""

Chunks = Mapping[str, Sequence[Part]]
"""Of a stage, by kind: F, I and W."""

COMPUTING = (Term.PRODUCTS, Term.AGAIN, Term.ATTENTION, Term.POINTWISE)
ALL = (*COMPUTING, Term.EXCHANGE)


class StageTimes:
    """How long the chunks of each stage take, of whose times those of `terms` count.

    `transfer` is how long a message to the next or previous stage takes.
    """

    def __init__(
        self,
        stages: Sequence[Chunks],
        transfer: float = 0.0,
        terms: Sequence[Term] = ALL,
        *,
        perfect: bool = False,
    ) -> None:
        """`perfect`: a pair takes the longer of its computing and its sending."""
        self.stages, self.transfer, self.terms = stages, transfer, terms
        self.perfect = perfect
        self._known: dict[tuple[tuple[str, int], ...], float] = {}

    def of(self, step: Step) -> float:
        key = tuple((chunk.kind, chunk.stage) for chunk in step)
        if key not in self._known:
            self._known[key] = self._of(step)
        return self._known[key]

    def _of(self, step: Step) -> float:
        chains = [self._segments(chunk.kind, chunk.stage) for chunk in step]
        later = sum(self._later(chunk) for chunk in step)
        computing = later + sum(one.computing for chain in chains for one in chain)
        sending = sum(one.sending for chain in chains for one in chain)
        if len(step) == 1:
            return computing + sending
        if self.perfect:
            return max(computing, sending)
        forward, backward = chains
        return paired(backward, forward, later)

    def _segments(self, kind: str, stage: int) -> list[OverlapSegment]:
        """Of a chunk, without what is computed later."""
        if kind == "W":
            return []
        sends = Term.EXCHANGE in self.terms
        return [
            OverlapSegment(self._computing(part), part[Term.EXCHANGE] if sends else 0.0)
            for part in self.stages[stage]["F" if kind == "F" else "I"]
        ]

    def _later(self, chunk: Chunk) -> float:
        """Seconds for the gradients of weights of a chunk."""
        if chunk.kind not in "BW":
            return 0.0
        return sum(map(self._computing, self.stages[chunk.stage]["W"]))

    def _computing(self, part: Part) -> float:
        return sum(part[term] for term in COMPUTING if term in self.terms)

    def of_chunk(self, kind: str, stage: int) -> Part:
        """The seconds of a whole chunk by what they are spent on."""
        return {term: sum(part[term] for part in self.stages[stage][kind]) for term in Term}


@dataclass(frozen=True)
class Phases:
    """What a pipeline rank does in a step, in seconds."""

    forward: float = 0.0
    backward: float = 0.0
    weights: float = 0.0
    pairs: float = 0.0
    bubble: float = 0.0
    update: float = 0.0


@dataclass(frozen=True)
class Added:
    """A cause of time: what is counted besides, and how long the step is with it."""

    cause: str
    step: float


@dataclass(frozen=True)
class Prediction:
    """The step of a plan at given rates. `times` are those of every stage."""

    plan: Plan
    rates: Rates
    times: StageTimes
    added: tuple[Added, ...]
    updates: tuple[float, ...] = field(repr=False)

    @property
    def step(self) -> float:
        """Seconds."""
        return self.added[-1].step

    @property
    def mfu(self) -> float | None:
        """The time of the model's FLOPs at peak rates over that of the step."""
        each = self.plan.peak_seconds_of_token
        if each is None:
            return None
        tokens = self.plan.parallel.batch * self.plan.parallel.sequence_length
        return each * tokens / self.plan.layout.mesh.size / self.step

    @cached_property
    def timeline(self) -> Timeline:
        return simulate(_order(self.plan), self.times)

    def phases(self, pipeline: int) -> Phases:
        """Of one pipeline rank; the bubble is all that it waits for, messages included."""
        order, spent = _order(self.plan), dict.fromkeys(("F", "B", "W", "pair"), 0.0)
        for step in order.steps(pipeline):
            kind = "pair" if len(step) > 1 else step[0].kind.replace("I", "B")
            spent[kind] += self.times.of(step)
        bubble = self.timeline.bubble(pipeline)
        update = self.step - self.timeline.end
        return Phases(spent["F"], spent["B"], spent["W"], spent["pair"], bubble, update)


def predict(plan: Plan, roles: Sequence[Role], rates: Rates) -> Prediction:
    """Of a plan whose stages run the programs `roles`.

    Raises `compiler.plan.rates.NoRate` for products of an element type without a rate.
    """
    bound = plan.step_seconds()
    peak = Rates(plan.cluster.model_copy(update={"memory_bandwidth": None}))
    times = _stage_times(plan, roles, rates)
    at_peak = times if bound is None else _stage_times(plan, roles, peak)
    transfer = rates.sending("pair", *boundary(plan))
    updates = tuple(_update(rank, plan, rates) for rank in plan.ranks)
    order = _order(plan)

    def end(stages: list[Chunks], *terms: Term) -> float:
        return simulate(order, StageTimes(stages, terms=terms)).end

    mixed = _with_products_of(at_peak, times)
    as_executed = _stage_times(plan, roles, rates, as_executed=True)
    complete = StageTimes(as_executed, transfer)
    last = simulate(order, complete)
    whole = [ends[-1][1] if ends else 0.0 for ends in last.ranks]
    products = (Term.PRODUCTS, Term.ATTENTION)
    slowest = "products at peak rates, every stage as slow as the slowest"
    peaks = () if bound is None else (
        Added(slowest, bound),
        Added("each stage as long as it takes", end(at_peak, *products)),
        Added("products that are computed again", end(at_peak, *products, Term.AGAIN)),
    )  # fmt: skip
    added = (
        *peaks,
        Added("products at measured rates", end(mixed, *products, Term.AGAIN)),
        Added("attention at its measured rate", end(times, *products, Term.AGAIN)),
        Added("operators between products", end(times, *COMPUTING)),
        Added(
            "dispatch and combine of chunks without a pair",
            simulate(order, StageTimes(times, perfect=True)).end,
        ),
        Added("dispatch and combine that pairs cannot hide", end(times, *ALL)),
        Added(
            "gradients of weights that do not wait for gaps",
            simulate(order, StageTimes(as_executed)).end,
        ),
        Added("messages between stages", last.end),
        Added(
            "sums of gradients, update, gathering of weights",
            max(end + update for end, update in zip(whole, updates, strict=True)),
        ),
    )
    return Prediction(plan, rates, complete, added, updates)


def _order(plan: Plan) -> Schedule:
    layout = plan.layout
    return schedule(layout.schedule, layout.mesh.pipeline, layout.micro_batches)


def _stage_times(
    plan: Plan, roles: Sequence[Role], rates: Rates, *, as_executed: bool = False
) -> list[Chunks]:
    """Of every stage, those of its chunks F, I and W: as programs have them, or as executed."""
    found: dict[int, Chunks] = {}
    for role in roles:
        graphs = _graphs(role.program)
        chunks = {
            kind: _parts(_executed(plan, role, graph), rates) for kind, graph in graphs.items()
        }
        if as_executed:
            wait, rest = _apart(list(_executed(plan, role, graphs["W"])))
            chunks["I"] = _longer(chunks["I"], _parts(rest, rates))
            chunks["W"] = _parts(wait, rates)
        found |= {stage.index: chunks for stage in role.stages}
    return [found[i] for i in sorted(found)]


def _apart(weights: Sequence[Executed]) -> tuple[list[Executed], list[Executed]]:
    """What waits for a chunk W: products, with what adds them to gradients of weights; and the rest
    of the graph of gradients of weights, which is computed with those of inputs.

    Generated code says so by `grads.defer`.
    """
    products = {v for one in weights if OPS[one.op.kind].weight_product for v in one.op.results}
    wait, rest = list[Executed](), list[Executed]()
    for one in weights:
        values = {*one.op.results, *one.op.operands}
        (wait if values & products else rest).append(one)
    return wait, rest


def _longer(parts: Sequence[Part], more: Sequence[Part]) -> list[Part]:
    """Parts of which each computes some of what `more` computes, as it is long."""
    own, added = (sum(p[t] for p in some for t in COMPUTING) for some in (parts, more))
    by = 1 + added / own if own else 1.0
    return [{t: part[t] * (by if t in COMPUTING else 1) for t in Term} for part in parts]


def of_a_micro_batch(plan: Plan, role: Role) -> Iterator[Executed]:
    """What the stages of a role execute for one micro-batch, forward and backward."""
    for graph in _graphs(role.program).values():
        yield from _executed(plan, role, graph)


def _executed(plan: Plan, role: Role, graph: Graph | None) -> Iterator[Executed]:
    tokens = plan.parallel.sequence_length
    sizes = {"batch": plan.parallel.micro_batch, "seq": tokens, "context": tokens}
    return iter(()) if graph is None else executed(role.program, graph, sizes)


def _graphs(program: Program) -> Mapping[str, Graph | None]:
    """The graphs of the three kinds of chunks; with 1F1B, I has the gradients of weights, too."""
    derivative = program.derivatives[program.main.name]
    backward = program.graphs.get(derivative.backward)
    return {"F": program.main, "I": backward, "W": program.graphs.get(derivative.weights)}


def _parts(every: Iterable[Executed], rates: Rates) -> list[Part]:
    """Of a chunk, in order; loops are unrolled."""
    found: list[dict[Term, float]] = [dict.fromkeys(Term, 0.0)]
    for runs, inside in groupby(every, key=lambda one: one.times):
        timed = [rates.seconds(one) for one in inside]
        for term, seconds in timed * runs:
            found[-1][term] += seconds
            if term is Term.EXCHANGE:
                found.append(dict.fromkeys(Term, 0.0))
    return [*found]


def _with_products_of(peak: Sequence[Chunks], measured: Sequence[Chunks]) -> list[Chunks]:
    """The times `measured`, but those of attention at peak rates."""
    return [
        {
            kind: [
                {**part, Term.ATTENTION: peak_part[Term.ATTENTION]}
                for peak_part, part in zip(fast[kind], parts, strict=True)
            ]
            for kind, parts in slow.items()
        }
        for fast, slow in zip(peak, measured, strict=True)
    ]


def boundary(plan: Plan) -> tuple[int, int]:
    """Bytes of one message between stages, inside nodes and across."""
    for rank in plan.ranks:
        for one in rank.sent:
            if one.purpose == "pipeline":
                inside = one.bytes_inside // max(1, one.messages_inside)
                return inside, one.bytes_across // max(1, one.messages_across)
    return 0, 0


def _update(rank: Rank, plan: Plan, rates: Rates) -> float:
    """Seconds of a rank after its last chunk."""
    sent = sum(
        rates.sending("ring", one.bytes_inside, one.bytes_across)
        for one in rank.sent
        if one.purpose in ("gradients", "parameters")
    )
    if not rates.memory_bandwidth:
        return sent
    memory = rank.memory
    # State and gradients of the shard are read and the state is written; FP8 copies are made again.
    state = memory.of(Kind.MASTER) + memory.of(Kind.MOMENTS)
    touched = 3 * state + 3 * memory.of(Kind.FP8_COPIES)
    return sent + touched / rates.memory_bandwidth
