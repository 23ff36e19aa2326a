"""The front door: a spec file to a checked description of a model."""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import BaseModel

from dsl import ast, yaml
from dsl.cluster import read_cluster
from dsl.compose import Composed, compose
from dsl.diagnostic import Diagnostic, DiagnosticError, Diagnostics, Label
from dsl.evaluate import Value, evaluate_params
from dsl.extern import UserFiles
from dsl.parse import parse_blocks
from dsl.read import read_source
from dsl.schema import (
    MTP,
    SIZES,
    BlockUse,
    Cluster,
    LayerGroup,
    Loc,
    Phase,
    Schedule,
    Spec,
    text_of,
    validate,
)
from dsl.source import Source, Span
from dsl.suggest import did_you_mean, nearest
from specs import BLOCKS

__all__ = ["BlockUse", "Description", "Resolved", "Spec", "Value", "load"]


@dataclass(frozen=True)
class Resolved:
    """One value of a spec, as text, and where it was written: `file:line:column`, or `default`."""

    path: str
    value: str
    origin: str


@dataclass(frozen=True)
class Description:
    """A model as written: the spec with its parameters evaluated, and the blocks it uses.

    Whether parameters, slots and dimensions fit the blocks is for the lowering to check.
    `sources` are all files that were read, in reading order, `user_files` those of externs among
    them, by the module that each becomes in a build.
    """

    spec: Spec
    params: Mapping[str, Value]
    blocks: Mapping[str, ast.Block]
    sources: tuple[Source, ...]
    composed: Composed = field(repr=False)
    cluster: Cluster | None = None  # that of `parallel`
    user_files: Mapping[str, Source] = field(default_factory=dict)

    def span(self, *path: str | int) -> Span:
        """The place of `path`, such as ("architecture", "layers", 1, "repeat"), or the nearest."""
        return yaml.nearest_node(self.composed.root, path).span

    def sets(self, *path: str | int) -> bool:
        """Whether the spec, a variant or `--set` gives `path`, rather than leaving the default."""
        node: yaml.Node | None = self.composed.root
        for part in path:
            node = yaml.child_of(node, part) if node is not None else None
        return node is not None and not yaml.is_null(node)

    def resolved(self) -> list[Resolved]:
        """Every value of the model with its origin, in the order of the schema."""
        return [
            Resolved(".".join(map(str, path)), value, self._origin(path))
            for path, value in _leaves((), self.spec)
        ]

    def _origin(self, path: Loc) -> str:
        node: yaml.Node | None = self.composed.root
        for part in path:
            node = yaml.child_of(node, part) if node is not None else None
        if node is None or yaml.is_null(node):
            return "default"
        label = self.composed.label(path)
        if label == "--set":
            return label
        return f"{node.span.location} ({label})" if label else node.span.location


def load(
    path: str | Path, *, sets: Sequence[str] = (), variants: Sequence[str] = ()
) -> Description:
    """Reads the spec at `path`, with the changes of `variants` and of `sets` ("path=value").

    Raises `DiagnosticError` with every problem of the stage that could not go on: reading and
    composing YAML (E1xx), then values (E3xx) together with block files (E1xx, E2xx).
    """
    composed = compose(Path(path), str(path), sets, variants)
    problems = Diagnostics()
    params: dict[str, Value] = {}
    section = yaml.child_of(composed.root, "params")
    if isinstance(section, yaml.Mapping):
        given = {k: e for k, e in section.entries.items() if not yaml.is_null(e.node)}
        params = evaluate_params(given, problems)
    _share_sizes(composed.root)
    spec, found = validate(composed.root, params)
    problems.extend(found)
    library = _Library(problems)
    listed = yaml.child_of(composed.root, "blocks")
    if isinstance(listed, yaml.Sequence):
        for item in listed.items:
            if isinstance(item, yaml.Scalar) and item.value:
                library.add(item)
    if spec is not None and library.complete:
        problems.extend(_misused_blocks(spec, composed.root, library.blocks))
    if spec is not None:
        problems.extend(_disagreements(spec, composed.root))
    cluster, cluster_sources = _cluster(composed.root, problems)
    problems.raise_if_any()
    assert spec is not None
    if cluster is None and spec.parallel is not None:
        ranks = spec.parallel.pipeline * spec.parallel.expert
        cluster = Cluster.model_construct(cluster="one_node", nodes=1, gpus_per_node=ranks)
    user_files = library.user_files.sources
    read = (*composed.sources, *library.sources, *user_files.values(), *cluster_sources)
    return Description(spec, params, library.blocks, read, composed, cluster, user_files)


def _share_sizes(root: yaml.Mapping) -> None:
    """Gives `parallel` the sizes of `train` that it leaves out, with their places there.

    A batch that changes on the way is none: `parallel` has to say for which of its sizes to plan.
    """
    train, parallel = (yaml.child_of(root, name) for name in ("train", "parallel"))
    if isinstance(train, yaml.Mapping) and isinstance(parallel, yaml.Mapping):
        for name in SIZES:
            given, planned = (yaml.child_of(one, name) for one in (train, parallel))
            if not isinstance(given, yaml.Scalar) or yaml.is_null(given):
                continue
            if planned is None or yaml.is_null(planned):
                parallel.entries[name] = train.entries[name]


def _cluster(root: yaml.Mapping, problems: Diagnostics) -> tuple[Cluster | None, list[Source]]:
    """The cluster that `parallel` names, and its file."""
    section = yaml.child_of(root, "parallel")
    named = yaml.child_of(section, "cluster") if section is not None else None
    if isinstance(named, yaml.Scalar) and named.value and not yaml.is_null(named):
        try:
            cluster, source = read_cluster(named)
            return cluster, [source]
        except DiagnosticError as error:
            problems.extend(error.diagnostics)
    return None, []


class _Library:
    """The blocks of the files that a spec lists."""

    def __init__(self, problems: Diagnostics) -> None:
        self.blocks: dict[str, ast.Block] = {}
        self.sources: list[Source] = []
        self.user_files = UserFiles()
        self.complete = True
        self._problems = problems
        self._listed: dict[Path, Span] = {}

    def add(self, item: yaml.Scalar) -> None:
        """Reads the file that `item` names: a bare name of the library, or a path."""
        try:
            path, name = _block_file(item)
            source = read_source(path, name, item.span)
            first = self._listed.setdefault(path.resolve(), item.span)
            if first is not item.span:
                self._twice(f"the file `{item.value}` is listed", item.span, first)
                return
            self.sources.append(source)
            for block in parse_blocks(source):
                block = self._with_function(block)
                known = self.blocks.setdefault(block.name.value, block)
                if known is not block:
                    message = f"the block `{block.name.value}` is defined"
                    self._twice(message, block.name.span, known.name.span)
        except DiagnosticError as error:
            self.complete = False
            self._problems.extend(error.diagnostics)

    def _with_function(self, block: ast.Block) -> ast.Block:
        """The block itself; an extern with its function."""
        try:
            if block.settings:
                return replace(block, function=self.user_files.function(block))
        except DiagnosticError as error:
            self.complete = False
            self._problems.extend(error.diagnostics)
        return block

    def _twice(self, what: str, again: Span, first: Span) -> None:
        related, help = [Label(first, "the first time")], "keep one of the two"
        self._problems.error("E117", f"{what} twice", again, "again", related, help)


def _block_file(item: yaml.Scalar) -> tuple[Path, str]:
    """The file of a listed block file, and its name in messages."""
    name, source = item.value, item.span.source
    if "/" in name or name.endswith(".dsl"):
        # A path is relative to the file that lists it, or to the current folder for `--set`.
        base = source.path.parent if source.path else Path()
        shown = os.path.join(os.path.dirname(source.name), name)
        return base / name, os.path.normpath(shown)
    known = sorted(file.stem for file in BLOCKS.glob("*.dsl"))
    if name not in known:
        help = did_you_mean(name, known) or f"known are {', '.join(known)}; a path ends in .dsl"
        message = f"there is no block file `{name}` in the standard library"
        raise DiagnosticError([Diagnostic("E116", message, item.span, "unknown", help=help)])
    # The same on every machine, wherever dslc is installed.
    return BLOCKS / f"{name}.dsl", f"specs/blocks/{name}.dsl"


def _misused_blocks(
    spec: Spec, root: yaml.Mapping, blocks: Mapping[str, ast.Block]
) -> Iterator[Diagnostic]:
    """Blocks that no listed file defines, and slots that their block does not have."""
    architecture = spec.architecture
    groups: list[tuple[Loc, LayerGroup | MTP]] = [
        (("architecture", "layers", i), group) for i, group in enumerate(architecture.layers)
    ]
    if architecture.mtp.depth > 0:
        groups.append((("architecture", "mtp"), architecture.mtp))
    uses: list[tuple[Loc, BlockUse]] = [(("architecture", "block"), architecture.block)]
    for path, group in groups:
        uses.append(((*path, "block"), group.block))
        uses.extend(((*path, slot), use) for slot, use in group.slots.items())
        if group.block.name in blocks:
            yield from _unknown_slots(path, group, root, blocks[group.block.name])
    for path, use in uses:
        if use.name not in blocks:
            yield _unknown_block(use, yaml.nearest_node(root, path).span, blocks)


def _unknown_slots(
    path: Loc, group: LayerGroup | MTP, root: yaml.Mapping, block: ast.Block
) -> Iterator[Diagnostic]:
    known = [slot.name.value for slot in block.slots]
    for slot in group.slots:
        if slot not in known:
            help = did_you_mean(slot, [*known, *type(group).model_fields])
            help = help or f"its slots are {', '.join(known)}"
            message = f"the block `{block.name.value}` has no slot `{slot}`"
            span = yaml.key_span(root, (*path, slot))
            yield Diagnostic("E307", message, span, "no such slot", help=help)


def _unknown_block(use: BlockUse, at: Span, blocks: Mapping[str, ast.Block]) -> Diagnostic:
    span = use.span.source.span(use.span.start, use.span.start + len(use.name)) if use.span else at
    files = {file.stem.replace("_", ""): file.stem for file in BLOCKS.glob("*.dsl")}
    near = nearest(use.name, blocks)
    help = f"did you mean `{near}`?" if near else f"known are {', '.join(blocks)}"
    if use.name.lower() in files and (near or "").lower() != use.name.lower():
        help = f"add `{files[use.name.lower()]}` to `blocks`"
    label = "no listed file defines it"
    return Diagnostic("E306", f"unknown block `{use.name}`", span, label, help=help)


def _disagreements(spec: Spec, root: yaml.Mapping) -> Iterator[Diagnostic]:
    """Values of one section that do not go with those of another."""
    if spec.train.document_mask and spec.sequence.eos_token_id is None:
        message = "nothing ends a document: `train.document_mask` needs `sequence.eos_token_id`"
        span = yaml.nearest_node(root, ("train", "document_mask")).span
        label = "documents are separated by the token at their end"
        help = "add `eos_token_id: ..` under `sequence`"
        yield Diagnostic("E309", message, span, label, help=help)
    yield from _two_sizes(spec, root)
    yield from _lengths(spec, root)


def _lengths(spec: Spec, root: yaml.Mapping) -> Iterator[Diagnostic]:
    """Sequences that are too short for MTP, or longer than the model has positions."""
    depth, most = spec.architecture.mtp.depth, spec.sequence.max_position_embeddings
    for section in ("train", "parallel"):
        length = getattr(getattr(spec, section), "sequence_length", None)
        if length is None:
            continue
        span = yaml.nearest_node(root, (section, "sequence_length")).span
        name = f"`{section}.sequence_length`"
        if length <= depth:
            message = f"{name} is {length}, and MTP of depth {depth} predicts nothing in it"
            help = f"make it at least {depth + 1}, or lower `architecture.mtp.depth`"
            yield Diagnostic("E319", message, span, "too short", help=help)
        elif most is not None and length > most and section == "train":  # else the plan says why
            message = f"{name} is {length:,}, more than the {most:,} positions of the model"
            help = "raise `sequence.max_position_embeddings`, or train on shorter sequences"
            yield Diagnostic("E319", message, span, "too long", help=help)


def _two_sizes(spec: Spec, root: yaml.Mapping) -> Iterator[Diagnostic]:
    """Sizes that `train` and `parallel` both give, and give differently.

    A batch that changes on the way is none: `parallel` says for which of its sizes to plan.
    """
    if spec.parallel is None:
        return
    for name in SIZES:
        if name not in spec.train.model_fields_set & spec.parallel.model_fields_set:
            continue
        trained, planned = getattr(spec.train, name), getattr(spec.parallel, name)
        if isinstance(trained, Schedule):
            if len(trained.root) > 1:
                continue
            trained = trained.value_at(0)
        if trained != planned:
            message = f"`train.{name}` is {trained:,.12g}, but `parallel.{name}` is {planned:,}"
            here, there = (yaml.nearest_node(root, (s, name)).span for s in ("parallel", "train"))
            yield Diagnostic(
                "E318", message, here, "what is planned", (Label(there, "what is trained"),),
                "keep one of the two: what a section leaves out is as in the other",
            )  # fmt: skip


def _leaves(path: Loc, value: object) -> Iterator[tuple[Loc, str]]:
    match value:
        case None:
            return
        case Schedule(root=(Phase(until=None, until_step=None, value=only),)):
            yield path, text_of(only)
        case Schedule():
            yield from _leaves(path, value.root)
        case BaseModel():
            for name, child in _fields(value):
                yield from _leaves((*path, name), child)
        case tuple():
            for index, child in enumerate(value):
                yield from _leaves((*path, index), child)
        case dict():
            # Parameters, where quotes distinguish text from numbers.
            yield from (((*path, name), text_of(child)) for name, child in value.items())
        case bool():
            yield path, text_of(value)
        case _:
            yield path, str(value)


def _fields(section: BaseModel) -> Iterator[tuple[str, object]]:
    for name, child in section:
        still = isinstance(section, Phase) and section.start is None
        if not (still and name == "shape"):  # the shape of no movement
            yield name, child
