"""The first MTP module alone: what drafts the token after the next one while a model is served.

In training the module sees, at the place of each token, the state that the main model has there and
the embedding of the token that follows. A server has these from its last step: the states of the
tokens that it computed, and the tokens after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compiler.graph.build import Builder
from compiler.graph.core import Graph, Op, Program, Value
from compiler.passes.base import Pass
from compiler.passes.cache import retype
from compiler.passes.simplify import SIMPLIFY
from compiler.rewrite import Miss
from dsl.load import Description


@dataclass(frozen=True)
class Module:
    """Where the outermost block hands over to its first MTP module."""

    state: Op
    """`drop_last` of the states of the main model."""
    tokens: Op
    """`drop_first` of the tokens."""
    position: Op
    """`drop_first` of the positions, or `drop_last` where they are those of the states."""
    logits: Value


def first_module(main: Graph) -> Module | None:
    """None where there is no module, or where it reads other states than the head does.

    The head's are those that a decoder has at hand (`Pages.last`).
    """
    outputs: dict[str, Value] = {}
    for name, value in zip(main.result_names, main.results, strict=True):
        outputs.setdefault(name, value)  # of several modules the first
    logits, scores = outputs.get("mtp_logits"), outputs.get("logits")
    made = {value: op for op in main.ops for value in op.results}
    head = made.get(scores) if scores is not None else None
    if logits is None or head is None or head.kind != "linear":
        return None
    args = {value.name: value for value in main.args}

    def cut(value: Value | None, *kinds: str) -> Op | None:
        """The first operator that takes one token away from a value."""
        ops = (op for op in main.ops if op.kind in kinds and op.operands == [value])
        return next((op for op in ops if op.attrs == {"dim": "seq", "count": 1}), None)

    state = cut(head.operands[0], "drop_last")
    tokens = cut(args.get("tokens"), "drop_first")
    position = cut(args.get("position"), "drop_first", "drop_last")
    if state is None or tokens is None or position is None:
        return None
    return Module(state, tokens, position, logits)


def _cut(program: Program, description: Description) -> Sequence[Miss]:
    main = program.main
    module = first_module(main)
    assert module is not None, "compile() makes this program only where there is a module"
    main.result_names = ("logits",)
    main.ops[-1].operands = [module.logits]
    SIMPLIFY.run(program, description)  # what is left has one token less than its arguments
    (whole,) = module.state.operands
    state = Builder(main, program.graphs).value("state", whole.type)
    main.replace_uses(module.state.result, state)
    for op in (module.tokens, module.position):
        main.replace_uses(op.result, op.operands[0])
    main.args = [state, *main.args]
    SIMPLIFY.run(program, description)
    retype(main, program)
    return ()


CUT_DRAFT = Pass(
    "cut_draft",
    "keep the first MTP module: its states and tokens are arguments",
    _cut,
    requires="an MTP module that reads the states that the head reads",
    ensures="arguments state, tokens, position; no output but the module's logits",
    essential=True,
)
