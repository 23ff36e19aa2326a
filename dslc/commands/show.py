"""`dslc show`: parameters, FLOPs and cache of a model, without building it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from dslc.options import Format, FormatOption, SetOption, SpecArgument, VariantOption

if TYPE_CHECKING:
    from compiler.analysis import Module, Summary
    from compiler.pipeline import Compiled
    from dsl.load import Description

EXAMPLES = """
\b
Examples:
  dslc show specs/deepseek_v3.yaml
  dslc show deepseek_v3 --seq 32768 --context 131072
  dslc show deepseek_v3 --set params.n_routed_experts=128 --format json
  dslc show my_model.yaml --variant small --resolved    every value and its origin
"""

OUTLINE = (
    "A line of the first table counts all the modules or tensors that its name and the names around"
    " it denote: experts.{0..255} in layers.{3..60} are 58 times 256."
)
# A longer cell shifts only its own row, not the whole column.
MAX_WIDTH = 48
Row = tuple[str, ...]


def run(
    spec: SpecArgument,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print every value of the spec and its origin.")
    ] = False,
    seq: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens in a training sequence.")
    ] = 4096,
    context: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens that a decoding step attends to.")
    ] = 4096,
    sets: SetOption = None,
    variants: VariantOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Show modules, parameters, FLOPs and cache of a model."""
    from compiler.pipeline import compile
    from dslc.report import print_json, reporting
    from dslc.specs import read

    as_json = format is Format.json
    with reporting(as_json):
        description = read(spec, sets, variants)
        if resolved:
            print_resolved(description, as_json)
            return
        compiled = compile(description)
        facts = summarized(compiled, seq, context)
        if as_json:
            print_json({**facts.to_json(), "saved_bytes_per_token": saved_json(compiled)})
        else:
            print(as_text(facts, description.spec.about, saved(compiled)))


def summarized(compiled: Compiled, seq: int, context: int) -> Summary:
    from compiler.analysis import summary

    decode = compiled.programs["decode"]
    return summary(compiled.lowered, decode, sequence_length=seq, context_length=context)


def print_resolved(description: Description, as_json: bool) -> None:
    from dslc.report import print_json

    values = description.resolved()
    if as_json:
        print_json([{"path": v.path, "value": v.value, "origin": v.origin} for v in values])
    else:
        rows = ((v.path, v.value, v.origin) for v in values)
        print("\n".join(table(rows, "<<<")))


def as_text(facts: Summary, about: str, saved: list[Row]) -> str:
    from compiler.analysis import CONVENTIONS

    parts = [
        [f"{facts.name}: {about}" if about else facts.name],
        table([("module", "block or shape", "parameters", "active"), *tree(facts)], "<<>>"),
        table(shares(facts), "<>>>>"),
        table(saved, "<>><") if saved else [],
        table(totals(facts), "<><"),
        ["How this is counted:", *wrapped((OUTLINE, *CONVENTIONS))],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def wrapped(sentences: Iterable[str]) -> list[str]:
    from textwrap import fill

    return [fill(text, 98, initial_indent="- ", subsequent_indent="  ") for text in sentences]


def tree(facts: Summary) -> Iterator[Row]:
    """The modules as an outline, those of multi-token prediction last."""
    yield from below(facts.model, facts.model.block, "", 1, 1)
    if facts.mtp.parameters:
        yield from below(facts.mtp, "multi-token prediction, not in the total", "", 1, 1)


def below(module: Module, name: str, indent: str, count: int, active: int) -> Iterator[Row]:
    block = module.block if name != module.block and indent else ""
    yield row(indent + name, block, count * module.parameters, active * module.activated)
    indent += "  "
    for tensor in module.tensors:
        shape = f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}]"
        parameters, activated = count * tensor.parameters, active * tensor.activated
        yield row(indent + tensor.name, shape, parameters, activated)
    for part in module.parts:
        inside = (count * part.count, active * part.active)
        yield from below(part.module, part.name, indent, *inside)


def row(name: str, what: str, parameters: int, activated: int) -> Row:
    from dsl.units import format_count

    return (name, what, format_count(parameters), format_count(activated))


def shares(facts: Summary) -> Iterator[Row]:
    """Parameters and FLOPs by kind of work."""
    from compiler.analysis import Work
    from dsl.units import format_count

    columns = (
        facts.model.elements,
        facts.model.active_elements,
        facts.training_flops,
        facts.decoding_flops,
    )
    yield ("kind", "parameters", "active", "training FLOPs", "decoding FLOPs")
    for work in Work:
        if any(column.get(work) for column in columns):
            yield (work.words, *(format_count(column.get(work, 0)) for column in columns))


def totals(facts: Summary) -> Iterator[Row]:
    from compiler.analysis import total

    training, decoding = total(facts.training_flops), total(facts.decoding_flops)
    yield ("parameters", f"{facts.parameters:,}", "the model without multi-token prediction")
    yield ("active", f"{facts.activated:,}", "parameters per token")
    stored = f"in {facts.tensor_count:,} tensors of {facts.stored_bytes:,} bytes"
    yield ("stored", f"{facts.stored:,}", f"{stored}, with multi-token prediction")
    length = f"per token, in sequences of {facts.sequence_length:,} tokens"
    yield ("training FLOPs", f"{training:,}", length)
    if mtp := total(facts.mtp_training_flops):
        yield ("", f"+ {mtp:,}", "for multi-token prediction")
    if facts.model.fp8_elements:
        share = 100 * facts.fp8_flops / facts.product_flops
        weights = 100 * facts.model.fp8_elements / facts.parameters
        parts = f"of the training FLOPs of GEMMs with weights, {weights:.2f} % of the parameters"
        yield ("in FP8", f"{share:.2f} %", parts)
    context = f"per token, in a context of {facts.context_length:,} tokens"
    yield ("decoding FLOPs", f"{decoding:,}", context)
    with_mtp = f"; {facts.cache_bytes_with_mtp:,} with multi-token prediction"
    more = with_mtp if facts.cache_bytes_with_mtp != facts.cache_bytes else ""
    yield ("cache bytes", f"{facts.cache_bytes:,}", f"per token{more}")


def saved(compiled: Compiled) -> list[Row]:
    """The activations that each block saves for the backward pass, and what it recomputes."""
    from compiler.analysis.saved import saved_blocks

    train = compiled.programs["train"]
    if not train.backward:
        return []
    rows: list[Row] = [("saved for the backward pass", "times", "bytes per token", "recomputed")]
    for one in saved_blocks(train):
        recomputed = ", ".join(f"{kind} {n}" for kind, n in one.recomputed.items())
        rows.append((one.block, str(one.runs), f"{one.bytes:,}", recomputed))
    numbers = saved_json(compiled)
    without = f"{numbers['all']:,} without recomputation"
    return [*rows, ("total", "", f"{numbers['saved']:,}", without)]


def saved_json(compiled: Compiled) -> dict[str, int]:
    """Bytes per token: saved for the backward pass, and saved without recomputation."""
    from compiler.analysis.saved import saved_bytes_per_token

    steps = {step.name: step.program for step in compiled.steps_of("train")}
    programs = {"saved": compiled.programs["train"], "all": steps.get("differentiate")}
    return {n: round(saved_bytes_per_token(p)) for n, p in programs.items() if p and p.backward}


def table(rows: Iterable[Row], align: str) -> list[str]:
    """Rows as lines; `align` has `<` or `>` for each column."""
    rows = list(rows)
    columns = zip(*rows, strict=True)
    widths = [max(len(cell) for cell in (*c, "") if len(cell) <= MAX_WIDTH) for c in columns]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(line, align, widths, strict=True)
        ).rstrip()
        for line in rows
    ]
