"""Products in bfloat16 by torch, which calls cuBLAS on NVIDIA GPUs, and CUTLASS for experts."""

from __future__ import annotations

from backends.triton.kernel import Case
from backends.triton.libraries import Library

ALIGNED = 8
"""Numbers of a row that 16 bytes hold: grouped products want rows that begin at such a place."""


def _fits(case: Case) -> bool:
    if not case.function.startswith("grouped"):
        return True
    _, _, weight = case.arguments
    return all(size % ALIGNED == 0 for size in weight.shape[1:])


LIBRARY = Library(
    name="cublas",
    title="cuBLAS",
    serves={
        path: "bfloat16"
        for path in (
            "F.linear",
            "G.linear_input_grad",
            "G.linear_weight_grad",
            "F.grouped_linear",
            "G.grouped_linear_input_grad",
        )
    },
    targets=("sm_90", "sm_100"),
    asked="products",
    fits=_fits,
)
