"""Products with any number of rows: the kernels that cases at a few sizes do not show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from backends.triton.checks import violations
from backends.triton.compiled import compile_kernels
from backends.triton.kernel import Case, KernelFile
from backends.triton.package import kernels_package
from backends.triton.target import TARGETS
from backends.triton.tiles import BUCKETS
from tests.support.kernels import files_of

FILES = [
    *(("deepseek_v3", "fp8_linear", target) for target in TARGETS),
    *(("deepseek_v3", "fp8_grouped_linear", target) for target in TARGETS),
    # What FP8 products have tiles of, but for their scales; the dearest to compile.
    ("deepseek_v2_lite", "linear", "sm_90"),
    ("deepseek_v2_lite", "grouped_linear", "sm_100"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "name", "target"), FILES)
def test_kernels_for_any_rows_keep_the_rules(spec: str, name: str, target: str) -> None:
    (file,) = (f for f in files_of(spec, target) if f.name == name)
    file = replace(file, cases=tuple(_cases(file)))
    rows = compile_kernels([file], kernels_package([file], TARGETS[target]), TARGETS[target])
    broken = [(row["cases"][0]["name"], violations(row, TARGETS[target])) for row in rows]
    assert rows
    assert not [one for one in broken if one[1]]


def _cases(file: KernelFile) -> Iterator[Case]:
    """Each product for every tile that it can have, and for rows that are no multiples."""
    products = {case.name.rpartition(" m")[0]: case for case in file.cases}
    for name, case in products.items():
        first = case.arguments[0]
        if len(first.shape) == 2:  # tiles of tokens are of one kind, whatever their number
            # Numbers and scales of tokens, or the two sides of a weight gradient.
            count = 2 if first.dtype != "bfloat16" or "weight_grad" in case.function else 1
            for rows in (*BUCKETS, BUCKETS[-1] + 1, 100, 7):
                tokens = [replace(t, shape=(rows, *t.shape[1:])) for t in case.arguments[:count]]
                arguments = (*tokens, *case.arguments[count:])
                yield replace(case, name=f"{name} m{rows}", arguments=arguments)
