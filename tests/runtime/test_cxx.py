"""C++ is compiled once for a source, its headers, the flags, the compiler and the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.cxx import NotCompiled, compiled
from tests.support.compiled import needs_compiler

pytestmark = needs_compiler


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "number.h").write_text("constexpr int number = 4;\n")
    path = tmp_path / "a.cpp"
    path.write_text('#include "number.h"\nextern "C" int get() { return number * BY; }\n')
    return path


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


@pytest.mark.slow
def test_it_is_compiled_again_when_anything_changes(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = source.parent / "__pycache__"
    assert compiled(source, {"BY": "2"}).get() == 8
    assert "compiling its step" in capsys.readouterr().err
    first = kept(cache)
    assert compiled(source, {"BY": "2"}).get() == 8 and capsys.readouterr().err == ""
    assert kept(cache) == first and all(name.endswith(".so") for name in first)
    assert compiled(source, {"BY": "3"}).get() == 12
    (source.parent / "number.h").write_text("constexpr int number = 5;\n")
    assert compiled(source, {"BY": "2"}).get() == 10
    assert len(kept(cache)) == 3


@pytest.mark.slow
def test_it_is_kept_for_the_user_where_the_folder_cannot_be_written_to(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (source.parent / "__pycache__").write_text("no folder")
    assert compiled(source, {"BY": "2"}).get() == 8
    assert len(kept(tmp_path / "home" / "dslc")) == 1
    (tmp_path / "elsewhere").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(NotCompiled, match="__pycache__ cannot be written to"):
        compiled(source, {"BY": "2"})
