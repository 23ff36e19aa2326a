"""DeepGEMM for products in FP8, where the spec asks for it or it was measured to be the fastest.

On sm_100 the library wants scales in a packed form of its own.
"""

from __future__ import annotations

from backends.triton.kernel import Case
from backends.triton.libraries import Library
from backends.triton.tiles import GROUP_SIZE


def _fits(case: Case) -> bool:
    return all(part % GROUP_SIZE == 0 for part in case.keywords.get("parts", ())[:-1])


LIBRARY = Library(
    name="deep_gemm",
    title="DeepGEMM",
    serves={"fp8.linear": "float8_e4m3fn"},
    targets=("sm_90",),
    asked="products",
    fits=_fits,
)
