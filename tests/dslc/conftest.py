"""Running commands in this process: as the shell would, but in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dslc.cli import main

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def dslc(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    """`dslc("check", spec)` runs in an empty folder; its status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DSLC_DEBUG", raising=False)

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr("sys.argv", ["dslc", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return Outcome(int(stop.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    """A spec with two mistakes: an unknown key and a wrong type."""
    path = tmp_path / "wrong.yaml"
    tiny = (ROOT / "specs" / "deepseek_v3_tiny.yaml").read_text(encoding="utf-8")
    path.write_text(tiny + "\nprecison: {policy: bf16}\n", encoding="utf-8")
    text = path.read_text(encoding="utf-8").replace("params:\n", "params:\n  odd_one: [1, 2]\n", 1)
    path.write_text(text, encoding="utf-8")
    return path
