"""Where the specs, the standard library of blocks and the cluster files lie."""

from pathlib import Path

SPECS = Path(__file__).parent
BLOCKS = SPECS / "blocks"
CLUSTERS = SPECS / "clusters"
