"""Where the specs, the standard library of blocks and the cluster and traffic files lie."""

from pathlib import Path

SPECS = Path(__file__).parent
BLOCKS = SPECS / "blocks"
CLUSTERS = SPECS / "clusters"
TRAFFIC = SPECS / "traffic"
