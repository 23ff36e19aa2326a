"""docs/architecture.md names what is there: folders, rules, files, programs, builds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from backends.build import build
from backends.triton.target import TARGETS
from compiler.pipeline import PIPELINES
from dsl.load import load
from tests.support.documents import tables
from tests.support.layers import LIBRARIES, MAY_IMPORT, imports, ruled, sources
from tests.support.places import ROOT, TINY

TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_table_of_folders_is_the_rule_that_is_tested() -> None:
    rows = {row[0].strip("`/"): row for row in tables(TEXT, "folder")}
    for folder, allowed in MAY_IMPORT.items():
        named = set(re.findall(r"`(\w+)`", rows[folder][2]))
        assert named == allowed, folder
        assert named or rows[folder][2] == "nothing"
        used = {
            module.split(".")[0]
            for path in ruled(folder)
            for _, level, module in imports(path)
            if level == 0
        }
        libraries = used & LIBRARIES[folder]
        listed = {name.replace(".yaml", "") for name in rows[folder][3].split(", ")} - {"none"}
        # pydantic's own core comes with it.
        assert listed == libraries - {"pydantic_core"}, folder
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"build"}
    assert folders <= rows.keys()


def test_every_file_of_code_is_listed_once_and_exists() -> None:
    listed = [row[0].strip("`") for row in tables(TEXT, "file") if "/" in row[0][:-2]]
    assert len(listed) == len(set(listed))
    assert all((ROOT / path).is_file() for path in listed)
    code = {
        str(path.relative_to(ROOT))
        for folder in ("dsl", "compiler", "backends", "runtime", "dslc")
        for path in sources(folder)
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert {path for path in listed if path.endswith(".py")} == code


def test_programs_and_their_passes_are_those_of_the_pipeline() -> None:
    found = {row[0].strip("`"): re.findall(r"`(\w+)`", row[2]) for row in tables(TEXT, "program")}
    assert found == {name: [one.name for one in passes] for name, passes in PIPELINES.items()}


@pytest.mark.slow
def test_a_build_holds_what_the_table_says(tmp_path: Path) -> None:
    parallel = "parallel={cluster: cpu_2x2, batch: 4, sequence_length: 64}"
    target = TARGETS["sm_90"]
    files = build(load(TINY, sets=[parallel]), tmp_path / "tiny", target=target, cpu=True).files
    tops = {name.split("/")[0] + ("/" if "/" in name else "") for name in files}
    assert {r[0].strip("`") for r in tables(TEXT, "file") if "/" not in r[0][:-2]} == {
        *tops,
        "extern/",  # of models with functions of users: tests/backends/test_extern.py
    }
    package = (tmp_path / "tiny" / "__init__.py").read_text(encoding="utf-8")
    public = set(re.findall(r'"(\w+)"', package.split("__all__")[1].split("]")[0]))
    (row,) = (r for r in tables(TEXT, "file") if r[0] == "`__init__.py`")
    assert set(re.findall(r"`(\w+)`", row[1])) == public


@pytest.mark.slow
def test_methods_of_a_model_are_those_of_its_code(tmp_path: Path) -> None:
    build(load(TINY), tmp_path / "tiny")
    generated = (tmp_path / "tiny" / "model.py").read_text(encoding="utf-8").split("class Model(")
    base = (ROOT / "runtime" / "model.py").read_text(encoding="utf-8").split("class LanguageModel")
    code = generated[1] + base[1]
    listed = re.findall(r"`Model(?:\.(\w+))?\(([^)]*)\)`", TEXT)
    assert len(listed) >= 8
    for method, arguments in listed:
        found = re.search(rf"def {method or '__init__'}\(\s*self,([^)]*)\)", code)
        assert found, method
        names = re.findall(r"(\w+):", found[1])
        given = arguments.removesuffix(", ..").split(", ")
        assert names[: len(given)] == given, method
        assert ".." in arguments or names == given, method
