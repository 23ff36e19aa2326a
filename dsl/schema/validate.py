"""Trees to specs, and pydantic's errors to diagnostics at the place where they happen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from dsl import yaml
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.evaluate import Value
from dsl.schema.base import Section
from dsl.schema.sections import VARIANT_KEYS, Spec
from dsl.schema.train import Phase, Schedule
from dsl.schema.values import Loc, Scope
from dsl.source import Source
from dsl.suggest import ABSENT, did_you_mean, nearest

File = TypeVar("File", bound=Section)


def validate(
    root: yaml.Mapping, params: Mapping[str, Value]
) -> tuple[Spec | None, list[Diagnostic]]:
    """The spec that a composed tree says, or what is wrong with it.

    `params` are those that could be evaluated; expressions over others are passed over.
    """
    data = {key: _plain(entry.node) for key, entry in root.entries.items()}
    values = {name: value.value for name, value in params.items()}
    section = yaml.child_of(root, "params")
    failed: frozenset[str] = frozenset()
    if isinstance(section, yaml.Mapping):
        given = [name for name, entry in section.entries.items() if not yaml.is_null(entry.node)]
        failed = frozenset(given) - frozenset(values)
        # Parameters that failed have a diagnostic; their names are still to be checked.
        data["params"] = {name: values.get(name, 0) for name in given}
    return _validated(Spec, data, Scope(values, failed), root)


def validate_file(schema: type[File], root: yaml.Mapping) -> tuple[File | None, list[Diagnostic]]:
    """What a file without parameters says, such as that of a cluster, or what is wrong with it."""
    data = {key: _plain(entry.node) for key, entry in root.entries.items()}
    return _validated(schema, data, Scope({}), root)


def read_validated(schema: type[File], source: Source, what: str) -> File:
    """What such a file says; `what` names it in messages. Raises `DiagnosticError`."""
    root = yaml.parse_yaml(source)
    if not isinstance(root, yaml.Mapping):
        message = f"{what} must be a mapping, not {yaml.kind(root)}"
        raise DiagnosticError([Diagnostic("E302", message, root.span, "expected keys")])
    found, problems = validate_file(schema, root)
    if found is None:
        raise DiagnosticError(problems)
    return found


def _validated(
    schema: type[File], data: Mapping[str, object], scope: Scope, root: yaml.Mapping
) -> tuple[File | None, list[Diagnostic]]:
    try:
        return schema.model_validate(data, context=scope), []
    except ValidationError as error:
        return None, list(_diagnose(error, root, schema))


def _plain(node: yaml.Node) -> object:
    """A tree as pydantic takes it: mappings and lists are Python's, leaves stay nodes."""
    if isinstance(node, yaml.Mapping):
        return {key: _plain(entry.node) for key, entry in node.entries.items()}
    return tuple(_plain(i) for i in node.items) if isinstance(node, yaml.Sequence) else node


_CONTAINERS = {"model_type": "a mapping", "dict_type": "a mapping", "tuple_type": "a list"}


def _diagnose(
    error: ValidationError, root: yaml.Mapping, schema: type[Section]
) -> Iterator[Diagnostic]:
    errors = [(e["type"], e["loc"], e.get("ctx", {})) for e in error.errors()]
    # A misspelt key is one mistake, though its right name is missing then, too.
    misspelt: set[Loc] = set()
    for kind, loc, _ in errors:
        if kind == "missing" and (typo := _typo(loc, root, schema)):
            misspelt.add((*loc[:-1], typo))
            yield _unknown_key((*loc[:-1], typo), root, schema)
        elif kind == "missing":
            yield _missing_key(loc, root, schema)
    for kind, loc, context in errors:
        if kind == "missing" or loc in misspelt:
            continue
        if kind == "too_short" and context["actual_length"] < _length(root, loc):
            # Items that are wrong do not count for pydantic; each has an error of its own.
            continue
        if kind == "extra_forbidden":
            yield _unknown_key(loc, root, schema)
        elif kind == "diagnostics":
            yield from context["diagnostics"]
        else:
            yield _misfit(kind, loc, context, root)


def _length(root: yaml.Mapping, loc: Loc) -> int:
    node = yaml.nearest_node(root, loc)
    return len(node.items) if isinstance(node, yaml.Sequence) else 0


def _misfit(kind: str, loc: Loc, context: Mapping[str, Any], root: yaml.Mapping) -> Diagnostic:
    """A value that is no leaf, or that only does not fit its neighbours."""
    node = yaml.nearest_node(root, loc)
    name = ".".join(map(str, loc))
    if kind == "param_name":
        message = f"`{loc[-2]}` cannot name a parameter: {context['problem']}"
        return Diagnostic("E304", message, yaml.key_span(root, loc[:-1]), "not a name")
    if kind == "schedule":
        message = f"the schedule `{name}`: {context['message']}"
        return Diagnostic("E308", message, node.span, "this schedule", help=context["help"])
    if kind == "too_short":
        return Diagnostic("E303", f"`{name}` is empty", node.span, "needs at least one item")
    wanted = context.get("wanted") or _CONTAINERS[kind]
    if isinstance(node, yaml.Scalar) and not node.value:
        return Diagnostic("E317", f"`{name}` has no value", node.span, f"expected {wanted}")
    message = f"`{name}` must be {wanted}, not {yaml.kind(node)}"
    return Diagnostic("E302", message, node.span, f"expected {wanted}")


def _fields(loc: Loc, schema: type[Section]) -> dict[str, Any]:
    """The fields of the section that is found at `loc`."""
    section: Any = schema
    for part in loc:
        if section is Schedule:  # its items
            section = Phase
        elif isinstance(part, int):
            section = get_args(section)[0]
        else:
            section = _required(section.model_fields[part].annotation)
    fields: dict[str, Any] = section.model_fields
    return fields


def _required(annotation: Any) -> Any:
    """The section that `Section | None` may hold; other types are what they are."""
    options = get_args(annotation)
    return options[0] if options and options[-1] is type(None) else annotation


def _typo(loc: Loc, root: yaml.Mapping, schema: type[Section]) -> str | None:
    """The unknown key that was most likely meant to be the missing one."""
    mapping = yaml.nearest_node(root, loc[:-1])
    if not isinstance(mapping, yaml.Mapping):
        return None
    known = _fields(loc[:-1], schema)
    unknown = [key for key in mapping.entries if key not in known]
    return next((key for key in unknown if nearest(key, known) == loc[-1]), None)


def _missing_key(loc: Loc, root: yaml.Mapping, schema: type[Section]) -> Diagnostic:
    node = yaml.nearest_node(root, loc[:-1])
    about = _fields(loc[:-1], schema)[str(loc[-1])].description
    name = ".".join(map(str, loc))
    unset = yaml.child_of(node, loc[-1])
    if unset is not None:
        message, help = f"`{name}` cannot be left out", f"give it a value ({about})"
        return Diagnostic("E301", message, unset.span, "needs a value", help=help)
    message = f"`{name}` is missing"
    help = f"add `{loc[-1]}: ...` ({about})"
    return Diagnostic("E301", message, node.span, f"has no key `{loc[-1]}`", help=help)


def _unknown_key(loc: Loc, root: yaml.Mapping, schema: type[Section]) -> Diagnostic:
    key = str(loc[-1])
    extra = VARIANT_KEYS if len(loc) == 1 and schema is Spec else ()
    known = [*_fields(loc[:-1], schema), *extra]
    paths: dict[str, str] = {}
    for path in _paths(schema):
        paths.setdefault(path[-1], ".".join(path))
    params = yaml.child_of(root, "params")
    if isinstance(params, yaml.Mapping):
        paths |= {name: f"params.{name}" for name in params.entries}
    # Right name, wrong place: `hidden_size` next to `params` instead of in it.
    help = f"did you mean `{paths[key]}`?" if key in paths else did_you_mean(key, known)
    help = help or ABSENT.get(key, "")
    if not help:
        near = nearest(key, paths, cutoff=0.8)
        help = f"did you mean `{paths[near]}`?" if near else f"known are {', '.join(known)}"
    message = f"unknown key `{'.'.join(map(str, loc))}`"
    return Diagnostic("E300", message, yaml.key_span(root, loc), "unknown", help=help)


def _paths(section: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for name, about in section.model_fields.items():
        yield (name,)
        inner = _required(about.annotation)
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from ((name, *path) for path in _paths(inner))
