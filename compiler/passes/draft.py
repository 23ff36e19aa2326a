"""MTP modules one by one: what drafts the tokens after the next one while a model is served.

In training module k sees, at the place of each token, the state that the module before it has there
(the first one that of the main model) and the embedding of the token k places further on. A server
has these from its last step: the states of the tokens that it computed, and the tokens after them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compiler.graph.build import Builder
from compiler.graph.core import Op, Program, Value
from compiler.passes.base import Pass
from compiler.passes.cache import retype
from compiler.passes.simplify import SIMPLIFY
from compiler.rewrite import Miss
from dsl.load import Description


@dataclass(frozen=True)
class DraftModule:
    """Where the outermost block hands over to an MTP module."""

    state: Op
    """`drop_last` of the states of the main model, or of the module before."""
    tokens: Op
    """`drop_first` of the tokens."""
    position: Op
    """`drop_first` of the positions, or `drop_last` where they are those of the states."""
    logits: Value

    @property
    def offset(self) -> int:
        """From the position of a state to that which the module counts from."""
        count = self.position.attrs["count"]
        assert isinstance(count, int)
        return count if self.position.kind == "drop_first" else 0


def modules(program: Program) -> list[DraftModule]:
    """The MTP modules in order, up to the first that reads other states than the head before it.

    The head's are those that a decoder has at hand (`Pages.last`).
    """
    main = program.main
    made, uses = main.producers(), main.uses()
    args = {value.name: value for value in main.args}
    outputs = list(zip(main.result_names, main.results, strict=True))
    scores = [value for name, value in outputs if name == "logits"]
    later = [value for name, value in outputs if name == "mtp_logits"]
    found: list[DraftModule] = []

    def cut(value: Value | None, count: int, *kinds: str) -> Op | None:
        """The first operator that takes so many tokens away from a value."""
        ops = (op for op in uses.get(value, ()) if op.kind in kinds) if value else ()
        return next((op for op in ops if op.attrs == {"dim": "seq", "count": count}), None)

    for depth, (before, logits) in enumerate(zip([*scores, *later], later, strict=False), 1):
        head = made.get(before)
        if head is None or head.kind != "linear":
            break
        same = _equal_results(program, made.get(head.operands[0]), head.operands[0])
        state = next((op for value in same if (op := cut(value, 1, "drop_last"))), None)
        tokens = cut(args.get("tokens"), depth, "drop_first")
        position = cut(args.get("position"), depth, "drop_first", "drop_last")
        if state is None or tokens is None or position is None:
            break
        found.append(DraftModule(state, tokens, position, logits))
    return found


def _equal_results(program: Program, made: Op | None, value: Value) -> list[Value]:
    """Those results of a call that are the same value inside as one of them, this included."""
    if made is None or not made.callee:
        return [value]
    results = program.graphs[made.callee].results
    inner = results[made.results.index(value)]
    return [own for own, one in zip(made.results, results, strict=True) if one is inner]


def _keep(depth: int) -> Callable[[Program, Description], Sequence[Miss]]:
    def cut(program: Program, description: Description) -> Sequence[Miss]:
        main = program.main
        module = modules(program)[depth]
        main.result_names = ("logits",)
        main.ops[-1].operands = [module.logits]
        SIMPLIFY.run(program, description)  # what is left has fewer tokens than its arguments
        (tokens,) = module.tokens.operands
        (whole,) = module.state.operands
        batch_and_seq, width = tokens.type.dims, whole.type.dims[-1]
        state = Builder(main, program.graphs).value(
            "state", whole.type.with_dims(*batch_and_seq, width)
        )
        main.replace_uses(module.state.result, state)
        for op in (module.tokens, module.position):
            main.replace_uses(op.result, op.operands[0])
        main.args = [state, *main.args]
        SIMPLIFY.run(program, description)
        retype(main, program)
        return ()

    return cut


def cut_draft(depth: int) -> Pass:
    """Keeps MTP module `depth` of `modules`, from 0."""
    return Pass(
        "cut_draft",
        "keep one MTP module: its states and tokens are arguments",
        _keep(depth),
        requires="an MTP module that reads the states that the head before it reads",
        ensures="arguments state, tokens, position; no output but the module's logits",
        essential=True,
    )
