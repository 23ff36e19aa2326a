"""What each folder may import, and what it does import."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.support.places import ROOT

# Data flows one way: a folder imports only what stands before it. `specs` is data.
MAY_IMPORT = {
    "dsl": {"dsl", "specs"},
    "compiler": {"dsl", "compiler"},
    # `runtime` is located there, to be copied into builds; importing it runs nothing (see below).
    "backends": {"dsl", "compiler", "backends", "runtime"},
    "dslc": {"dsl", "compiler", "backends", "runtime", "specs", "dslc"},
    "runtime": set[str](),
    # Imported by nothing but `serve.py` of a build and the command that serves.
    "runtime/serve": set[str](),
    "specs": {"specs"},
}


# Libraries beside the standard one.
LIBRARIES = {
    "dsl": {"lark", "pydantic", "pydantic_core", "ruamel"},
    "compiler": {"lark", "networkx"},
    # torch and triton only inside the functions of the program that compiles kernels.
    "backends": {"jinja2", "torch", "triton"},
    "dslc": {"typer", "matplotlib", "scipy"},
    "runtime": {"torch", "safetensors", "tokenizers"},
    "runtime/serve": {
        "torch",
        "fastapi",
        "starlette",
        "uvicorn",
        "pydantic",
        "pydantic_core",
        "jinja2",
        "prometheus_client",
        "llguidance",
        "tokenizers",
    },
    "specs": set[str](),
}


def sources(folder: str) -> list[Path]:
    """Without functions of users in `specs/examples`, which builds copy and nothing imports."""
    found = (ROOT / folder).rglob("*.py")
    return sorted(path for path in found if path.parent != ROOT / "specs" / "examples")


def ruled(folder: str) -> list[Path]:
    """The files that the rules of a folder hold for: not those of a folder within with its own."""
    inner = [ROOT / other for other in MAY_IMPORT if other.startswith(f"{folder}/")]
    return [p for p in sources(folder) if not any(p.is_relative_to(other) for other in inner)]


def imports(path: Path) -> list[tuple[int, int, str]]:
    """(line, level, module) of every import in a file, also those inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, 0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.level, node.module or ""))
    return found


def dependencies() -> dict[str, set[str]]:
    """Which modules of ours each module names, in functions and for types only, too."""
    every = {path for folder in MAY_IMPORT for path in sources(folder)}
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in every}
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        package = name.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                inner = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*inner, *([node.module] if node.module else [])])
                # A name that is no file is defined in the package itself.
                wanted = (f"{module}.{alias.name}" for alias in node.names)
                named = {w if w in files else module for w in wanted}
                found[name] |= {m if m in files else f"{m}.__init__" for m in named} & files.keys()
    return found
