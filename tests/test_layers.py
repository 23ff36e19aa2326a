"""The rules of docs/architecture.md on who may import what, read from the source."""

from __future__ import annotations

import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from tests.support.layers import LIBRARIES, MAY_IMPORT, dependencies, imports, ruled, sources
from tests.support.places import ROOT

# Building V3 must start and end before importing any of these would have.
HEAVY = ("torch", "triton", "numpy", "networkx", "sympy", "transformers", "pandas", "scipy")


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_the_stages_before_it(folder: str) -> None:
    assert ruled(folder), f"{folder}/ holds no Python: this test would pass on nothing"
    allowed = MAY_IMPORT[folder] | LIBRARIES[folder] | set(sys.stdlib_module_names)
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in ruled(folder)
        for line, level, module in imports(path)
        if level == 0 and module.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_runtime_imports_itself_only_relatively_and_never_leaves_its_folder() -> None:
    """runtime/ is copied into every build under another name."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line} leaves runtime/"
        for path in sources("runtime")
        for line, level, _ in imports(path)
        if level > len(path.relative_to(ROOT / "runtime").parts)
    ]
    assert not wrong, "\n".join(wrong)
    assert not imports(ROOT / "runtime" / "__init__.py"), "locating the folder would load torch"


@pytest.mark.slow
def test_only_generation_imports_the_engine_and_no_library_of_a_server() -> None:
    """A build that is not served needs none; training renders chats as a server does."""
    found = set()
    for path in ruled("runtime"):
        parts = path.relative_to(ROOT).parts
        for _, level, module in imports(path):
            name = ".".join((*parts[: len(parts) - level], module)) if level else module
            if name.startswith("runtime.serve"):
                found.add((path.name, name.rpartition(".")[2]))
    assert found == {
        *(("generate.py", name) for name in ("engine", "options", "request")),
        *(("prepare.py", name) for name in ("chat", "text")),
    }
    served = {"fastapi", "jinja2", "llguidance", "prometheus_client", "starlette", "tokenizers"}
    assert not served & loaded_by("import runtime.generate, runtime.train.prepare")


@pytest.mark.slow
def test_no_files_import_one_another_in_a_circle() -> None:
    """A file can be read with those that it imports alone."""
    found = dependencies()
    assert "compiler.lower.state" in found["compiler.lower.frame"]
    assert "runtime.serve.engine" in found["runtime.generate"]
    TopologicalSorter(found).prepare()  # raises `CycleError` with the circle


def test_no_file_is_a_drawer_for_leftovers() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    found = [path for folder in MAY_IMPORT for path in sources(folder) if path.stem in drawers]
    assert not found


def loaded_by(statement: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter holds after `statement`."""
    program = f"{statement}\nimport sys\nprint(*sys.modules, sep='\\n')"
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.splitlines()}


def every_module(*folders: str) -> str:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for folder in folders
        for path in sources(folder)
        if path.stem != "__main__"
    ]
    return "import " + ", ".join(names)


@pytest.mark.slow
def test_no_module_of_the_compile_path_loads_a_heavy_library() -> None:
    loaded = loaded_by(every_module("dsl", "compiler", "backends", "specs", "dslc"))
    assert "typer" in loaded and "dslc" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.slow
def test_tests_import_only_what_they_share() -> None:
    """Helpers are in tests/support, the interpreter of graphs in tests/interpret."""
    modules = [path for path in sources("tests") if path.stem.startswith(("test_", "conftest"))]
    shared = ("tests.support.", "tests.interpret")
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in modules
        for line, level, module in imports(path)
        if level or (module.split(".")[0] == "tests" and not module.startswith(shared))
    ]
    assert modules and not wrong
    shared_tests = [path for path in modules if path.parent.name in ("support", "interpret")]
    assert not shared_tests
