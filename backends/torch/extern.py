"""The folder `extern/` of a build: copies of user files, and the functions that the model calls."""

from __future__ import annotations

from backends.render import render
from backends.torch.layout import CallText, lay_out
from backends.torch.records import docstring
from backends.torch.sizes import literal
from compiler.graph.core import Op, Program
from dsl.load import Description

FOLDER = "extern"


def extern_files(
    description: Description, lowered: Program, *, spec: str, version: str
) -> dict[str, str]:
    """Texts by path inside the build; none for a model without externs."""
    used: dict[str, Op] = {}
    for graph in lowered.graphs.values():
        for op in graph.walk():
            if op.kind in ("extern", "sequence_extern"):
                used.setdefault(op.text("name"), op)
    if not used:
        return {}
    modules = sorted({op.text("function").split(".")[0] for op in used.values()})
    lines = [line for name, op in used.items() for line in ("", *_assignment(name, op))]
    texts = {f"{FOLDER}/{name}.py": description.user_files[name].text for name in modules}
    texts[f"{FOLDER}/__init__.py"] = render(
        "torch/extern.py.jinja",
        modules=modules,
        lines=lines,
        spec=docstring(spec),
        version=version,
    )
    return texts


def _assignment(name: str, op: Op) -> list[str]:
    items = op.items("numbers")
    pairs = zip(items[::2], items[1::2], strict=True)
    numbers = ", ".join(f"{literal(key)}: {value!r}" for key, value in pairs)
    given: list[tuple[str, CallText | str]] = [
        ("", op.text("function")),
        ("takes=", _texts(op.texts("takes"))),
        ("gives=", _texts(op.texts("gives"))),
        ("numbers=", f"{{{numbers}}}"),
    ]
    if op.text("gradient"):
        given.append(("gradient=", op.text("gradient")))
    return lay_out(f"{name} = ", CallText("Extern(", tuple(given)))


def _texts(texts: tuple[str, ...]) -> CallText:
    items = tuple(("", literal(text)) for text in texts)
    return CallText("(", items, ",)" if len(items) == 1 else ")")
