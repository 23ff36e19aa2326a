"""One spec from many places: `extends` with `set`, variants and `--set` are all overlays.

An overlay is a path and a new value, which replaces the old one whole; `null` leaves the key out.
They are applied in the order base, `set` of each file that extends it, chosen variants, `--set`.
Nodes keep the spans of the files they were read from, so that the result knows where each of its
values came from.
"""

from __future__ import annotations

import itertools
import os.path
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsl import yaml
from dsl.diagnostic import Diagnostic, DiagnosticError, Diagnostics, Label
from dsl.read import read_source
from dsl.schema import VARIANT_KEYS
from dsl.source import Source, Span
from dsl.suggest import did_you_mean


@dataclass(frozen=True)
class Segment:
    """One part of a dotted path: a key, or the index of an item counted from 0."""

    text: str
    span: Span


@dataclass(frozen=True)
class Overlay:
    """A new value for a path; `label` names the variant or option it is from."""

    path: tuple[Segment, ...]
    node: yaml.Node
    label: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(segment.text for segment in self.path)


@dataclass(frozen=True)
class Composed:
    """A spec after all overlays, those that made it, and every YAML source that was read."""

    root: yaml.Mapping
    overlays: tuple[Overlay, ...]
    sources: tuple[Source, ...]

    def label(self, path: Sequence[str | int]) -> str:
        """The label of the overlay that set `path` last; empty where a file's own text did."""
        parts = tuple(map(str, path))
        for overlay in reversed(self.overlays):
            if parts[: len(overlay.path)] == overlay.parts:
                return overlay.label
        return ""


@dataclass(frozen=True)
class _File:
    source: Source
    root: yaml.Mapping

    def entry(self, key: str) -> yaml.Entry | None:
        return self.root.entries.get(key)


def compose(path: Path, name: str, sets: Sequence[str], chosen: Sequence[str]) -> Composed:
    """Reads `path` (called `name` in messages) and what it extends, and applies all overlays.

    Of its variants those that are `chosen` by name, which must not contradict each other.

    Raises `DiagnosticError` (E1xx, and E302 for a value of the wrong kind) with every problem.
    """
    problems = Diagnostics()
    files = _chain(path, name, problems)
    own = [overlay for file in files for overlay in _own_overlays(file, problems)]
    variants = _variants(files, problems)
    options = []
    for text in sets:
        try:
            options.append(_option(text))
        except DiagnosticError as error:
            problems.extend(error.diagnostics)
    for variant in chosen:
        if variant not in variants:
            known = f"the variants are {', '.join(variants)}" if variants else "the spec names none"
            help = did_you_mean(variant, variants) or known
            span = Source("--variant", variant).span(0, len(variant))
            problems.error("E113", f"there is no variant `{variant}`", span, "unknown", help=help)
    combined = [overlay for variant in chosen for overlay in variants.get(variant, ())]
    problems.extend(_contradictions(combined))
    base = files[0].root
    root = yaml.Mapping(base.span, {k: e for k, e in base.entries.items() if k not in VARIANT_KEYS})
    root = _applied(root, own, problems)
    for other in variants.values():
        # Those not chosen are tried, too: their mistakes should not wait for the day of their use.
        _applied(root, other, problems)
    last = [*combined, *options]
    root = _applied(root, last, problems)
    problems.raise_if_any()
    return Composed(root, (*own, *last), tuple(file.source for file in files))


def _contradictions(overlays: Sequence[Overlay]) -> Iterator[Diagnostic]:
    """Values that one variant sets and another one sets differently, or within which it sets one.

    The later one would win, which nobody who combines two variants asks for.
    """
    for a, b in itertools.combinations(overlays, 2):
        depth = min(len(a.path), len(b.path))
        if a.label == b.label or a.parts[:depth] != b.parts[:depth]:
            continue
        if a.parts == b.parts and _written(a.node) == _written(b.node):
            continue
        outer = ".".join(a.parts[:depth])
        one, other = (label.label.removeprefix("variant ") for label in (a, b))
        message = f"the variants `{one}` and `{other}` set `{outer}` differently"
        help = "choose one of the two, or add a variant with the value that is meant"
        related = (Label(a.node.span, f"set by `{one}`"),)
        yield Diagnostic("E120", message, b.node.span, f"set by `{other}`", related, help)


def _written(node: yaml.Node) -> object:
    """A value without its place, for comparison."""
    if isinstance(node, yaml.Mapping):
        return {key: _written(entry.node) for key, entry in node.entries.items()}
    if isinstance(node, yaml.Sequence):
        return [_written(item) for item in node.items]
    return node.value, node.quoted


def _error(code: str, message: str, span: Span, label: str, help: str = "") -> DiagnosticError:
    return DiagnosticError([Diagnostic(code, message, span, label, help=help)])


def _chain(path: Path, name: str, problems: Diagnostics) -> list[_File]:
    """The files from the one that extends nothing to `path`."""
    files: list[_File] = []
    try:
        extends = _read(path, name, None, files)
        while extends is not None:
            node = extends.node
            if not isinstance(node, yaml.Scalar) or not node.value:
                message = "`extends` must be the path of a spec"
                raise _error("E302", message, node.span, "expected a path")
            name = os.path.normpath(os.path.join(os.path.dirname(name), node.value))
            path = path.parent / node.value
            extends = _read(path, name, node.span, files)
    except DiagnosticError as error:
        problems.extend(error.diagnostics)
    problems.raise_if_any()
    return files


def _read(path: Path, name: str, at: Span | None, files: list[_File]) -> yaml.Entry | None:
    """Puts the file at `path` before `files`; its `extends` is the answer."""
    source = read_source(path, name, at)
    above = [file.source for file in reversed(files)]
    same = [i for i, file in enumerate(above) if file.path and file.path.samefile(path)]
    if at is not None and same:
        chain = " -> ".join([*(file.name for file in above[same[0] :]), name])
        help = "one of them must not extend another"
        message = f"these specs extend each other: {chain}"
        raise _error("E112", message, at, "leads back to the first", help)
    file = _File(source, _mapping(yaml.parse_yaml(source), name))
    files.insert(0, file)
    return file.entry("extends")


def _mapping(node: yaml.Node, what: str) -> yaml.Mapping:
    if isinstance(node, yaml.Mapping):
        return node
    message = f"{what} must be a mapping, not {yaml.kind(node)}"
    raise _error("E302", message, node.span, "expected `key: value` pairs")


def _own_overlays(file: _File, problems: Diagnostics) -> Iterator[Overlay]:
    """What a file changes in the one that it extends."""
    changes = file.entry("set")
    if file.entry("extends") is None:
        if changes is not None:
            message = "`set` changes a spec that this one extends, but it extends none"
            span = file.root.entries["set"].key_span
            help = "change the values themselves, or add `extends: FILE.yaml`"
            problems.error("E118", message, span, "nothing to change", help=help)
        return
    for key, entry in file.root.entries.items():
        if key in ("model", "about"):
            yield Overlay((Segment(key, entry.key_span),), entry.node)
        elif key not in VARIANT_KEYS:
            message, label = f"`{key}` cannot be combined with `extends`", "not here"
            help = f"write single changes under `set`, for example `{_first_path(key, entry)}: ...`"
            problems.error("E118", message, entry.key_span, label, help=help)
    if changes is not None:
        yield from _overlays(changes.node, "`set`", "", problems)


def _first_path(key: str, entry: yaml.Entry) -> str:
    path = key
    while isinstance(entry.node, yaml.Mapping) and entry.node.entries:
        key, entry = next(iter(entry.node.entries.items()))
        path = f"{path}.{key}"
    return path


def _variants(files: Sequence[_File], problems: Diagnostics) -> dict[str, list[Overlay]]:
    """Every variant by name; a file's variant replaces one of that name of its base."""
    variants: dict[str, list[Overlay]] = {}
    for file in files:
        entry = file.entry("variants")
        try:
            named = _mapping(entry.node, "`variants`").entries if entry else {}
        except DiagnosticError as error:
            problems.extend(error.diagnostics)
            continue
        for name, changes in named.items():
            what, label = f"the variant `{name}`", f"variant {name}"
            variants[name] = list(_overlays(changes.node, what, label, problems))
    return variants


def _overlays(node: yaml.Node, what: str, label: str, problems: Diagnostics) -> Iterator[Overlay]:
    try:
        entries = _mapping(node, what).entries
    except DiagnosticError as error:
        problems.extend(error.diagnostics)
        return
    for key, entry in entries.items():
        try:
            yield Overlay(_segments(key, entry.key_span), entry.node, label)
        except DiagnosticError as error:
            problems.extend(error.diagnostics)


def _option(text: str) -> Overlay:
    """`path=value` of the command line."""
    source = Source("--set", text)
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        label = "has no path before the `=`" if equals else "has no `=`"
        help = "for example --set params.hidden_size=1024"
        raise _error(
            "E115", "--set needs a path and a value", source.span(0, len(text)), label, help
        )
    start = len(path) - len(path.lstrip())
    segments = _segments(path.strip(), source.span(start, len(path.rstrip())))
    if not value.strip():
        return Overlay(segments, yaml.Scalar("", False, source.span(len(text), len(text))), "--set")
    return Overlay(segments, yaml.parse_yaml(source, len(path) + 1), "--set")


def _segments(path: str, span: Span) -> tuple[Segment, ...]:
    content = yaml.Scalar(path, False, span).content
    segments: list[Segment] = []
    for text in path.split("."):
        place = span
        # A key with escapes has no exact places inside.
        if content is not None:
            start = content.start + sum(len(s.text) + 1 for s in segments)
            place = Span(span.source, start, start + len(text))
        segments.append(Segment(text, place))
    empty = next((s for s in segments if not s.text.strip()), None)
    if empty or len(segments) > yaml.MAX_DEPTH or segments[0].text in VARIANT_KEYS:
        help = "a path is keys and indices with points: architecture.layers.0.repeat"
        at = (empty or segments[0]).span
        raise _error("E114", f"`{path}` is no path of a value", at, "here", help)
    return tuple(segments)


def _applied(
    root: yaml.Mapping, overlays: Sequence[Overlay], problems: Diagnostics
) -> yaml.Mapping:
    for overlay in overlays:
        try:
            changed = _replaced(root, overlay, 0)
        except DiagnosticError as error:
            problems.extend(error.diagnostics)
        else:
            assert isinstance(changed, yaml.Mapping)
            root = changed
    return root


def _replaced(node: yaml.Node, overlay: Overlay, depth: int) -> yaml.Node:
    """`node` with the value of `overlay` in its place; keys that are missing are added."""
    if depth == len(overlay.path):
        return overlay.node
    segment = overlay.path[depth]
    if yaml.is_null(node):
        node = yaml.Mapping(segment.span)  # left out, as if it had never been there
    path = ".".join(overlay.parts[:depth])
    if isinstance(node, yaml.Mapping):
        old = node.entries.get(segment.text)
        if old is None and path == "params" and yaml.is_null(overlay.node):
            message = f"there is no parameter `{segment.text}` to leave out"
            help = did_you_mean(segment.text, node.entries)
            raise _error("E114", message, segment.span, "unknown", help)
        key_span = old.key_span if old else segment.span
        child = old.node if old else yaml.Mapping(segment.span)
        new = yaml.Entry(key_span, _replaced(child, overlay, depth + 1))
        return yaml.Mapping(node.span, {**node.entries, segment.text: new})
    if isinstance(node, yaml.Scalar):
        message, help = f"`{path}` is a single value and has nothing inside", f"set `{path}` itself"
        raise _error("E114", message, segment.span, f"inside `{path}`", help)
    index = int(segment.text) if re.fullmatch("[0-9]{1,9}", segment.text) else len(node.items)
    if index >= len(node.items):
        help = f"its items are 0 to {len(node.items) - 1}" if node.items else "it is empty"
        message = f"`{path}` has no item `{segment.text}`"
        raise _error("E114", message, segment.span, "no such item", help)
    item = _replaced(node.items[index], overlay, depth + 1)
    return yaml.Sequence((*node.items[:index], item, *node.items[index + 1 :]), node.span)
