"""`dslc passes`: what the compiler does to a graph, in order."""

from __future__ import annotations

EXAMPLES = """
\b
Examples:
  dslc passes                                                what runs for which program
  dslc graph deepseek_v3 --program decode --after absorb     the graph after a pass
"""


def run() -> None:
    """List the passes of each program, what they need and what they ensure."""
    from compiler.pipeline import PIPELINES

    for program, passes in PIPELINES.items():
        print(f"{program}: lower, {', '.join(one.name for one in passes)}")
    known = {one.name: one for passes in PIPELINES.values() for one in passes}
    for one in known.values():
        print(f"\n{one.name}: {one.purpose}")
        print(f"  requires: {one.requires}")
        print(f"  ensures:  {one.ensures}")
