"""Where the specs and the standard library of blocks lie."""

from pathlib import Path

SPECS = Path(__file__).parent
BLOCKS = SPECS / "blocks"
