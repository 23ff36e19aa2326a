"""Settings of a spec without effect, and effects without a setting: slips that cause no error."""

from __future__ import annotations

from collections.abc import Iterator, Set

from compiler.graph.core import Program
from dsl import ast, yaml
from dsl.diagnostic import Diagnostic, Label
from dsl.load import Description
from dsl.parse import parse_expression
from dsl.source import Span
from dsl.suggest import nearest, synonym


def silent_losses(description: Description, program: Program) -> Iterator[Diagnostic]:
    """A loss that the model has, and whose weight is not set, would have no effect."""
    loss = description.spec.train.loss
    place = description.span("train", "loss")
    inner = [g for name, g in program.graphs.items() if name != program.root]
    collects = any("balance" in graph.result_names for graph in inner)
    if collects and not description.sets("train", "loss", "balance_alpha"):
        yield Diagnostic(
            "E408",
            "the experts have a balance loss, and nothing sets its weight balance_alpha",
            place,
            "balance_alpha is missing here",
            help="add `train: {loss: {balance_alpha: 1e-4}}`, or 0 to leave the loss out",
        )
    if "mtp" in program.main.result_names and not any(p.value for p in loss.mtp_weight.root):
        yield Diagnostic(
            "E409",
            "the MTP modules are never trained: their weight mtp_weight is always 0",
            description.span("train", "loss", "mtp_weight"),
            "mtp_weight is 0",
            help="raise mtp_weight, or set architecture.mtp.depth to 0",
        )


def unused_params(description: Description, used: Set[str]) -> Iterator[Diagnostic]:
    """Parameters that neither a block (`used`) nor another number of the spec reads."""
    read = used | {name for span in _expressions(description) for name in _names(span)}
    wanted = {p.name.value for block in description.blocks.values() for p in block.params}
    for name, value in description.params.items():
        if name not in read:
            near = nearest(name, wanted - description.params.keys()) or synonym(name, wanted)
            yield Diagnostic(
                "E407",
                f"no block of this model uses {name}",
                value.span,
                "has no effect",
                help=f"did you mean {near}?" if near else "remove it",
            )


def unused_blocks(description: Description) -> Iterator[Diagnostic]:
    """Layers or MTP modules that the outermost block has no place for."""
    architecture = description.spec.architecture
    root = description.blocks[architecture.block.name]
    known = {slot.name.value for slot in root.slots}
    given = {"layers": len(architecture.layers), "mtp": architecture.mtp.depth}
    for name, count in given.items():
        if count and name not in known:
            yield Diagnostic(
                "E307",
                f"{root.name.value} has no place for {name}",
                description.span("architecture", name),
                "would be left out of the model",
                (Label(root.name.span, "the outermost block"),),
                f"declare `slots {name}` there, or remove it here",
            )


def unknown_mask(description: Description) -> Iterator[Diagnostic]:
    """A mask between documents where MTP modules get positions that do not know of it."""
    architecture = description.spec.architecture
    root = description.blocks[architecture.block.name]
    known = any(param.name.value == "document_mask" for param in root.params)
    if description.spec.train.document_mask and architecture.mtp.depth and not known:
        yield Diagnostic(
            "E416",
            f"{root.name.value} does not tell its MTP modules where documents end",
            description.span("train", "document_mask"),
            "asks for a mask between documents",
            (Label(root.name.span, "the outermost block"),),
            "declare `params document_mask = false` there; if it is true, give a module the"
            " positions of the tokens whose states it takes, as specs/blocks/causal_lm.dsl does",
        )


def _names(span: Span) -> list[str]:
    """Names that the expression at `span` reads; quoted text reads none."""
    if not span.text or span.text.startswith(("'", '"', "|", ">")):
        return []
    return ast.names_in(parse_expression(span.source, span.start, span.end))


def _expressions(description: Description) -> Iterator[Span]:
    """Where a spec may use its parameters."""
    architecture, root = description.spec.architecture, description.composed.root
    yield from (value.span for value in description.params.values())
    uses = [architecture.block, architecture.mtp.block, *architecture.mtp.slots.values()]
    for group in architecture.layers:
        uses += [group.block, *group.slots.values()]
    yield from (value.span for use in uses for value in use.arguments.values())
    numbers: list[tuple[str | int, ...]] = [("architecture", "mtp", "depth")]
    numbers += [("architecture", "layers", i, "repeat") for i in range(len(architecture.layers))]
    for path in [*numbers, ("sequence",), ("train",)]:
        if description.sets(*path):
            yield from _scalars(yaml.nearest_node(root, path))


def _scalars(node: yaml.Node) -> Iterator[Span]:
    match node:
        case yaml.Scalar():
            yield node.span
        case yaml.Mapping():
            for entry in node.entries.values():
                yield from _scalars(entry.node)
        case yaml.Sequence():
            for item in node.items:
                yield from _scalars(item)
