"""What a decoder remembers: forgotten where whole sequences are computed, kept where one grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compiler.graph.build import Builder, infer
from compiler.graph.core import CacheType, Graph, Op, Program, Value, copy_program
from compiler.graph.types import Dim, Type
from compiler.ops import OPS, TypeMismatch
from compiler.ops.attention import scores_of
from compiler.passes.base import Pass
from compiler.passes.simplify import SIMPLIFY
from compiler.rewrite import Miss, Rewriter, rewrite
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.load import Description


def _drop(program: Program, description: Description) -> Sequence[Miss]:
    return rewrite(program, "cache_entry", lambda at: at.op.operands)


DROP_CACHE = Pass(
    "drop_cache",
    "nothing is remembered when whole sequences are computed",
    _drop,
    ensures="no cache_entry",
    essential=True,
)


def _insert(program: Program, description: Description) -> Sequence[Miss]:
    rewrite(program, "document_attention", _of_one_document)
    rewrite(program, "cache_entry", _append)
    for graph in program.graphs.values():
        retype(graph, program)
        for op in graph.walk():
            if op.kind == "sequence_extern":
                _need_memory(op)
    _need_tokens(program, description)
    _only_last(program)
    return ()


INSERT_CACHE = Pass(
    "insert_cache",
    "keep latents and keys of earlier tokens; score only the last position",
    _insert,
    requires="simplify: no output but logits, nothing that only other outputs need",
    ensures="cache_append for every cache_entry; keys and values run over context",
    essential=True,
)


def _of_one_document(at: Rewriter) -> Sequence[Value]:
    """A decoder continues one document."""
    op = at.op
    operands = [*op.operands[:3], *op.operands[4:]]
    return at.add("attention", operands, names=[op.result.name], **scores_of(op))


def _append(at: Rewriter) -> Sequence[Value]:
    op, caches = at.op, at.builder.graph.caches
    for name, value in zip(op.texts("entries"), op.operands, strict=True):
        caches[name] = CacheType(value.type)
    names, entries = [v.name for v in op.results], op.attrs["entries"]
    return at.add("cache_append", op.operands, names=names, entries=entries)


def _need_memory(op: Op) -> None:
    """Refuses a function that reads earlier tokens, where a decoder does not have them."""
    name, takes = op.text("name"), op.texts("takes")
    over = [formal.split("[")[1].startswith("batch, context") for formal in takes]
    given = [Dim("context") in v.type.dims for v in op.operands]
    if any(over) and over == given:
        return
    forgotten = [v.name for v, x, y in zip(op.operands, over, given, strict=True) if x and not y]
    why = (
        f"{name} reads {' and '.join(forgotten)} of earlier tokens, which `cache(..)` did not keep"
        if forgotten
        else f"{name} reads several tokens of a sequence, and a decoder has the new ones only"
    )
    raise _refusal(
        op,
        why,
        "remembered and new tokens meet here",
        help="let it take what it reads of earlier tokens over `context`, and give it what"
        ' `cache(..)` gives; or write `per = "token"` if it treats each token by itself',
    )


def _need_tokens(program: Program, description: Description) -> None:
    """Refuses what scores depend on and what is over all tokens, as a sum: a decoder has the new
    ones only."""
    if not any(map(_is_over_tokens, _operators(program))):
        return
    needed = copy_program(program)  # `--skip simplify` leaves losses in
    SIMPLIFY.run(needed, description)
    for op in filter(_is_over_tokens, _operators(needed)):
        raise _refusal(
            op,
            f"{op.kind} is over all tokens of a batch, and a decoder has the new ones only",
            "scores depend on it",
            help="use it for losses, or on what has no tokens, as parameters",
        )


def _refusal(op: Op, why: str, label: str, help: str) -> DiagnosticError:
    span = op.spans[0] if op.spans else None
    why = f"a decoder cannot compute this: {why}"
    return DiagnosticError([Diagnostic("E412", why, span, label, help=help)])


def _operators(program: Program) -> Iterator[Op]:
    return (op for graph in program.graphs.values() for op in graph.walk())


def _is_over_tokens(op: Op) -> bool:
    """Whether it gives a number for tokens of any number; a call does what its operators do."""
    read = any(dim.size is None for v in op.operands for dim in v.type.dims)
    made = any(dim.size is None for v in op.results for dim in v.type.dims)
    return read and bool(op.results) and not made and not op.callee


def retype(graph: Graph, program: Program) -> None:
    """Types again from the operands on, where dimensions of some have changed."""

    def again(ops: list[Op]) -> None:
        for op in ops:
            for region in op.regions:
                again(region.ops)
            if op.results:
                types = _types(op, graph, program)
                for value, type in zip(op.results, types, strict=True):
                    value.type = type

    again(graph.ops)


def _types(op: Op, graph: Graph, program: Program) -> tuple[Type, ...]:
    try:
        return infer(op, graph, program.graphs)
    except TypeMismatch as error:
        if op.kind == "sequence_extern":
            _need_memory(op)
        raise DiagnosticError(
            [
                Diagnostic(
                    "E412",
                    f"a decoder cannot compute this: {error.message}",
                    op.spans[0] if op.spans else graph.span,
                    "remembered and new tokens meet here",
                    help="use what `cache(..)` gives only as keys and values of an attention",
                )
            ]
        ) from None


def _head(main: Graph, logits: Value) -> int:
    """The operator that makes the scores, before a bias, a cap and the like; by number."""
    producers = {v: i for i, op in enumerate(main.ops) for v in op.results}
    made = at = producers[logits]
    while OPS[main.ops[at].kind].rowwise:
        # A weight of one dimension meets scores of one position as those of all.
        whole = [v for v in main.ops[at].operands if len(v.type.dims) > 1]
        if len(whole) != 1 or whole[0] not in producers:
            return made
        at = producers[whole[0]]
    return at if main.ops[at].kind == "linear" else made


def _only_last(program: Program) -> None:
    """A decoder asks for the token after the last one: the head needs no other position."""
    main = program.main
    (logits,) = main.results
    made = _head(main, logits)
    # Before the head where it comes last; else after the operator that makes the scores.
    head = main.ops[made].kind == "linear"
    reader = main.ops[made if head else -1]
    (x,) = reader.operands
    dims = [d for d in x.type.dims if d != Dim("seq")]
    last = Builder(main, program.graphs).value(f"last_{x.name}", x.type.with_dims(*dims))
    at = made if head else len(main.ops) - 1
    main.ops.insert(at, Op("last_entry", [x], results=[last], spans=main.ops[made].spans))
    reader.operands = [last]
    retype(main, program)
