"""A build is whole or not there, never over what is not its own, and the same bytes each time."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from backends.build import MANIFEST, build
from dsl.diagnostic import DiagnosticError
from dsl.load import load
from tests.support.places import ROOT, TINY


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def refused(out: Path, code: str, *sets: str) -> str:
    """The message of the refusal; what stood at `out` must be untouched."""
    with pytest.raises(DiagnosticError) as error:
        build(load(TINY, sets=sets), out)
    (diagnostic,) = error.value.diagnostics
    assert diagnostic.code == code and diagnostic.help
    assert list(out.parent.iterdir()) == [out], "litter"
    return diagnostic.message


@pytest.mark.slow
def test_the_package_holds_what_the_manifest_says(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    result = build(load(TINY), out)
    files = contents(out)
    manifest = json.loads(files.pop(MANIFEST))
    assert manifest["outputs"] == {n: hashlib.sha256(d).hexdigest() for n, d in files.items()}
    assert {"__init__.py", "model.py", "config.py", "report.html"} <= set(files)
    assert {f"runtime/{p.name}" for p in (ROOT / "runtime").glob("*.py")} <= set(files)
    assert {f"graph/{p}.graph" for p in ("forward", "train", "prefill", "decode")} <= set(files)
    inputs = {i["name"]: i["sha256"] for i in manifest["inputs"]}
    assert inputs[TINY.name] == hashlib.sha256(TINY.read_bytes()).hexdigest()
    assert set(result.files) == {*files, MANIFEST}
    assert list(tmp_path.iterdir()) == [out], "nothing is left beside it"


@pytest.mark.slow
def test_the_same_bytes_whatever_the_hash_seed_and_the_folder(tmp_path: Path) -> None:
    build(load(TINY), tmp_path / "here")
    for seed, folder in (("1", tmp_path), ("2", ROOT)):
        command = "import sys; from pathlib import Path; from dsl.load import load; "
        command += "from backends.build import build; build(load(sys.argv[1]), Path(sys.argv[2]))"
        out = tmp_path / f"there{seed}"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, "-c", command, str(TINY), str(out)],
            env=environment, cwd=folder, check=True,
        )  # fmt: skip
        assert contents(out) == contents(tmp_path / "here")


@pytest.mark.slow
def test_again_changes_nothing_and_another_spec_replaces_all(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    assert build(load(TINY), out).changed
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert not build(load(TINY), out).changed
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert build(load(TINY, sets=["architecture.mtp.depth=0"]), out).changed
    assert "class MTP" not in (out / "model.py").read_text()


@pytest.mark.slow
def test_what_a_build_did_not_write_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    assert "not overwritten" in refused(out, "E602")
    assert contents(out) == {"thesis.tex": b"mine"}
    (out / MANIFEST).write_text('{"generator": "something else", "outputs": {}}')
    refused(out, "E602")


@pytest.mark.slow
@pytest.mark.parametrize("change", ["edited", "added"])
def test_a_build_that_somebody_works_in_is_left_alone(tmp_path: Path, change: str) -> None:
    out = tmp_path / "tiny"
    build(load(TINY), out)
    path = out / ("model.py" if change == "edited" else "notes.txt")
    with path.open("a") as file:
        file.write("# mine\n")
    before = contents(out)
    assert path.name in refused(out, "E602", "architecture.mtp.depth=0")
    assert contents(out) == before


@pytest.mark.slow
def test_a_file_or_a_link_is_no_place_for_a_build(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    out = folder / "tiny"
    out.write_text("a file")
    refused(out, "E602")
    out.unlink()
    out.symlink_to(tmp_path)
    refused(out, "E602")


@pytest.mark.slow
def test_a_failed_write_leaves_the_old_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tiny"
    build(load(TINY), out)
    before = contents(out)
    written = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "model.py":
            raise OSError(28, "No space left on device")
        return written(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left" in refused(out, "E601", "architecture.mtp.depth=0")
    assert contents(out) == before


@pytest.mark.slow
def test_a_failed_rename_leaves_the_old_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tiny"
    build(load(TINY), out)
    before = contents(out)
    rename = Path.rename

    def broken(path: Path, target: Path) -> Path:
        if path.name.endswith(".new"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    refused(out, "E601", "architecture.mtp.depth=0")
    assert contents(out) == before
