"""What the backward pass recomputes instead of saving it, by bytes freed for each FLOP.

1. Views are never saved in addition to their base, nor by a callee what its caller has.
2. Norms and pointwise functions are recomputed: no matrix product, hence almost free.
3. So are products that widen: q_b_proj and kv_b_proj of MLA, and down_proj of fine-grained experts,
   free several times the bytes for each FLOP that a product with the hidden state would
   (DeepSeek-V3 report, section 3.2.3; of the experts it says nothing).

With `train.saved_bytes_per_token` in the spec there is a budget instead of the third rule: the best
ratio goes first, until what is saved for one token fits. Recomputation runs the same operators on
the same values, so that gradients have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from compiler.analysis.costs import Costs
from compiler.analysis.saved import SEQUENCE, sizes_of, token_bytes
from compiler.graph.build import site_of
from compiler.graph.core import REPEATS, Graph, Op, Program, Value
from compiler.graph.types import BYTES
from compiler.ops import OPS
from compiler.passes.base import Pass
from compiler.passes.differentiate import in_order, save
from compiler.rewrite import Miss
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.load import Description

# A product is recomputed if it frees this many times the bytes for each FLOP that one with the
# hidden state would. For V3: kv_b_proj 14, q_b_proj 4.7, down_proj of an expert 3.5.
WIDENING = 3


def _run(program: Program, description: Description) -> Sequence[Miss]:
    if not program.backward:
        return ()
    pairs = {pair.forward.name: pair for pair in _pairs(program)}
    for pair in pairs.values():  # callees stand before callers, which provide lifted arguments
        _apply_default_rules(pair, pairs, program)
    _choose(list(pairs.values()), program, description)
    for pair in pairs.values():
        _apply_default_rules(pair, pairs, program)
    for pair in pairs.values():
        pair.write()
    return ()


RECOMPUTE = Pass(
    "recompute",
    "recompute what is cheap to compute, instead of saving it",
    _run,
    requires="differentiate: everything that is needed is saved",
    ensures="no view is saved; the budget of the spec holds",
)


@dataclass
class _Pair:
    """A graph and its gradients.

    `saved` and `made` map names of forward values to those values in the backward graph that are
    read from what was saved and that are recomputed or lifted.
    """

    forward: Graph
    backward: Graph
    sizes: Mapping[str, int]

    def __post_init__(self) -> None:
        self.producers = {v.name: op for op in _decompose(self.forward.ops) for v in op.results}
        self.values = {v.name: v for op in self.forward.ops for v in op.results}
        self.values |= {v.name: v for v in self.forward.args}
        self.head = self.backward.ops[0]
        self.saved: dict[str, Value] = {v.name: v for v in self.head.results}
        self.made: dict[str, Value] = {}
        self.clones: dict[Value, Op] = {}
        self.taken = {v.name for op in self.backward.ops for v in op.results}
        self.taken |= {v.name for v in self.backward.args}

    def local(self, value: Value) -> Value:
        """The value of a forward value in the backward graph; without one it is saved."""
        if value.name in self.made:
            return self.made[value.name]
        if value.name not in self.saved:
            self.saved[value.name] = Value(self.unique(value.name), value.type)
        return self.saved[value.name]

    def unique(self, name: str) -> str:
        base, n = name, 2
        while name in self.taken:
            name, n = f"{base}_{n}", n + 1
        self.taken.add(name)
        return name

    def recompute_cheap(self) -> None:
        """Recomputes saved values that views made, and cheap operators where that frees bytes."""
        self._recompute_all(lambda op: OPS[op.kind].view)
        self._recompute_all(lambda op: OPS[op.kind].cheap and self.bytes_freed(op) > 0)

    def _recompute_all(self, wanted: Callable[[Op], bool]) -> None:
        changed = True
        while changed:
            changed = False
            for name in list(self.saved):
                op = self.producers.get(name)
                if op is None or name not in self.saved or not wanted(op):
                    continue
                self.recompute(op)
                changed = True

    def bytes_freed(self, op: Op) -> Fraction:
        """Bytes for one token that need not be saved when `op` and its followers are recomputed."""
        new = dict.fromkeys(s for v in op.operands for s in self._sources(v))
        freed = [v for n, v in self.saved.items() if self._follows(self.values[n], op)]
        return self._bytes(freed) - self._bytes(new)

    def _bytes(self, values: Iterable[Value]) -> Fraction:
        return sum((token_bytes(v.type, self.sizes) for v in values), Fraction(0))

    def _follows(self, value: Value, op: Op) -> bool:
        """Whether a saved value is made of the results of `op` alone, by views and pointwise."""
        made_by = self.producers.get(value.name)
        if made_by is op:
            return True
        if made_by is None or not _costs_little(made_by):
            return False
        sources = {s for v in made_by.operands for s in self._sources(v)}
        return bool(sources) and sources <= set(op.results)

    def _sources(self, value: Value) -> Iterator[Value]:
        """What has to be saved so that views and pointwise functions can recompute a value."""
        if value.name in self.saved or value.name in self.made:
            return
        op = self.producers.get(value.name)
        if op is None or not _costs_little(op):
            yield value
            return
        for operand in op.operands:
            yield from self._sources(operand)

    def flops(self, op: Op, program: Program) -> int:
        """Of recomputing `op`, for one token."""
        site = site_of(op, self.forward, program.graphs)
        return max(1, OPS[op.kind].flops(site, self.sizes) // SEQUENCE)

    def recompute(self, op: Op) -> None:
        """Recomputes a forward operator; `write` finds the place for it."""
        copies = []
        for result in op.results:
            old = self.saved.pop(result.name, None)
            new = Value(old.name if old else self.unique(result.name), result.type)
            self.made[result.name] = new
            copies.append(new)
            if old is not None:
                self.backward.replace_uses(old, new)
                for clone in self.clones.values():
                    clone.operands = [new if v is old else v for v in clone.operands]
        operands = [self.local(v) for v in op.operands]
        clone = Op(op.kind, operands, op.symbols, dict(op.attrs), [], copies, op.spans)
        self.clones |= dict.fromkeys(copies, clone)
        self.backward.weights |= {s: self.forward.weights[s] for s in op.symbols}

    def recompute_from(self, op: Op) -> None:
        """Recomputes `op`, and what leads from it to saved values."""
        follow = [n for n in self.saved if self._follows(self.values[n], op)]
        while follow:
            made_by = self.producers[follow.pop()]
            before = set(self.saved)
            self.recompute(made_by)
            if made_by is not op:
                follow += [n for n in self.saved if n not in before and self.producers.get(n)]
                follow = [n for n in follow if self._follows(self.values[n], op)]

    def _place(self) -> None:
        """Every recomputed operator is put right before the first one that reads it."""
        placed: list[Op] = []
        done: set[int] = set()

        def place(op: Op) -> None:
            for value in op.operands:
                clone = self.clones.get(value)
                if clone is not None and id(clone) not in done:
                    done.add(id(clone))
                    place(clone)
            placed.append(op)

        for op in self.backward.ops:
            place(op)
        self.backward.ops = placed

    def write(self) -> None:
        """Lets the two graphs say what is saved in the end."""
        self._place()
        read = {v for op in self.backward.ops for v in op.operands}
        names = [v.name for v in in_order(self.forward) if v.name in self.saved]
        self.saved = {name: self.saved[name] for name in names if self.saved[name] in read}
        self.head.results = list(self.saved.values())
        save(self.forward, [self.values[name] for name in self.saved])


def _pairs(program: Program) -> Iterator[_Pair]:
    for name, graph in list(program.graphs.items()):
        backward = program.backward_of(name)
        if backward is not None and name != program.root:
            yield _Pair(graph, backward, sizes_of(graph, program))


def _decompose(ops: Sequence[Op]) -> Iterator[Op]:
    """Operators one by one: the norm of a saved sum needs nothing but the sum."""
    for op in ops:
        if op.kind == "add_rms_norm":
            total, normed = op.results
            yield Op("add", op.operands, results=[total], spans=op.spans)
            yield Op("rms_norm", [total], op.symbols, op.attrs, results=[normed], spans=op.spans)
        else:
            yield op


def _costs_little(op: Op) -> bool:
    return OPS[op.kind].view or OPS[op.kind].cheap


def _apply_default_rules(pair: _Pair, pairs: Mapping[str, _Pair], program: Program) -> None:
    """The first two rules, for one graph."""
    pair.recompute_cheap()
    _lift_arguments(pair, pairs, program)


def _lift_arguments(pair: _Pair, pairs: Mapping[str, _Pair], program: Program) -> None:
    """Arguments that are saved come from the callers instead, which have them anyway.

    Not for what the outermost block calls: autograd hands those nothing but gradients.
    """
    name = pair.forward.name
    lifted = [i for i, v in enumerate(pair.forward.args) if v.name in pair.saved]
    if not lifted or name in program.main.calls():
        return
    for i in lifted:
        argument = pair.forward.args[i].name
        pair.made[argument] = pair.saved.pop(argument)
        pair.backward.args.append(pair.made[argument])
    derivative = program.derivatives[name]
    numbers = (*derivative.lifted, *lifted)
    program.derivatives[name] = replace(derivative, lifted=numbers)
    for caller, op in program.calls_of(pair.backward.name):
        around = pairs[program.forward_of(caller.name)]
        same = next(
            o
            for o in around.forward.walk()
            if o.callee == name and o.attrs["scope"] == op.attrs["scope"]
        )
        op.operands += [around.local(same.operands[i]) for i in lifted]


def _choose(pairs: Sequence[_Pair], program: Program, description: Description) -> None:
    """Products that are recomputed: those that widen, or as many as the budget asks for."""
    times = Costs(program).runs()
    budget = description.spec.train.saved_bytes_per_token
    least = WIDENING * _baseline_ratio(program) if budget is None else Fraction(0)

    def total() -> Fraction:
        return sum(
            (
                times[pair.forward.name] * token_bytes(v.type, pair.sizes)
                for pair in pairs
                for v in pair.saved.values()
            ),
            Fraction(0),
        )

    while budget is None or total() > budget:
        found = [
            (pair.bytes_freed(op) / pair.flops(op, program), -i, pair, op)
            for i, (pair, op) in enumerate(_products(pairs))
        ]
        found = [f for f in found if f[0] > least]
        if not found:
            break
        _, _, pair, op = max(found, key=lambda f: f[:2])
        pair.recompute_from(op)
        pair.recompute_cheap()
    if budget is not None and total() > budget:
        raise DiagnosticError([_over(math.ceil(total()), budget, description)])


def _products(pairs: Sequence[_Pair]) -> Iterator[tuple[_Pair, Op]]:
    for pair in pairs:
        for op in pair.forward.ops:
            if OPS[op.kind].product and not any(v.name in pair.made for v in op.results):
                yield pair, op


def _baseline_ratio(program: Program) -> Fraction:
    """Bytes saved for each FLOP by a product with what layers hand on."""
    for op in program.main.ops:
        if op.kind in REPEATS:
            hidden = op.operands[0].type
            return Fraction(BYTES[hidden.dtype], 2 * (hidden.last.size or 1))
    return Fraction(0)


def _over(total: int, budget: int, description: Description) -> Diagnostic:
    return Diagnostic(
        "E420",
        f"{total:,} bytes have to be saved for one token, more than the {budget:,} allowed",
        description.span("train", "saved_bytes_per_token"),
        "the budget",
        help=f"raise it to at least {total:,}: inputs of layers and experts cannot be recomputed",
    )
