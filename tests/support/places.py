"""Where things lie in the repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
SPECS = ROOT / "specs"
TINY = SPECS / "deepseek_v3_tiny.yaml"
TEXT = ROOT / "data" / "tinyshakespeare.txt"
GOLDEN = ROOT / "tests" / "golden"
