"""Products in FP8 by cuBLAS, which since CUDA 12.9 knows scales of 128 numbers and of 128 x 128."""

from __future__ import annotations

from backends.triton.kernel import Case
from backends.triton.libraries import Library
from backends.triton.tiles import GROUP_SIZE

ALIGNED = 16
"""Sizes of FP8 matrices that torch takes are multiples of this."""

SCALES = 4
"""Scales of a weight come in rows of a multiple of so many, along what is summed over. Others
would have to be padded at each call."""


def _fits(case: Case) -> bool:
    """The rules of `torch.nn.functional.scaled_mm` in torch 2.11 to 2.13."""
    if case.function == "linear_weight_grad":
        dq, _, q, _ = case.arguments
        return bool(dq.shape[1] % ALIGNED == 0 and q.shape[1] % ALIGNED == 0)
    out, width = case.arguments[2].shape
    summed, made = (width, out) if case.function == "linear" else (out, width)
    parts = case.keywords.get("parts", ())
    whole = all(part % GROUP_SIZE == 0 for part in parts[:-1])
    return bool(whole and summed % (SCALES * GROUP_SIZE) == 0 and made % ALIGNED == 0)


LIBRARY = Library(
    name="fp8_cublas",
    title="cuBLAS",
    serves={
        path: "float8_e4m3fn"
        for path in ("fp8.linear", "fp8.linear_input_grad", "fp8.linear_weight_grad")
    },
    targets=("sm_90",),
    asked="products",
    fits=_fits,
)
