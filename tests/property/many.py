"""Many random specs, each of which must build and run or be refused: see CONTRIBUTING.md.

    python -m tests.property.many --count 10000 --seed 0

prints how many ran and how many were refused, and ends with the first that did neither.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from tests.support.random_runs import runs_or_is_refused
from tests.support.random_specs import specs

STEP = 20  # specs between two lines of progress


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="how many specs")
    parser.add_argument("--seed", type=int, default=0, help="what they follow from")
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()

    @seed(options.seed)
    @settings(
        max_examples=options.count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    @given(specs())
    def one(spec: dict[str, Any]) -> None:
        try:
            outcomes["ran" if runs_or_is_refused(spec) else "refused"] += 1
        except BaseException:
            print(f"neither ran nor was refused, after {outcomes}:\n{spec}", file=sys.stderr)
            for block in [*spec["blocks"], spec["wild"]]:
                print(block, file=sys.stderr)
            raise
        if outcomes.total() % STEP == 0:
            print(
                f"{outcomes.total()}: {outcomes['ran']} ran, {outcomes['refused']} refused",
                flush=True,
            )

    one()
    print(f"{outcomes.total()} specs: {outcomes['ran']} ran, {outcomes['refused']} were refused")


if __name__ == "__main__":
    main()
