"""Attention by torch's `scaled_dot_product_attention`: cuDNN, where there is a log-sum-exp to save.

There is no gradient here: that of cuDNN, as torch 2.11 to 2.13 call it, adds up in no fixed order,
so that two runs would differ in bits, and flash attention wants values as wide as keys.
"""

from __future__ import annotations

from backends.triton.kernel import Case
from backends.triton.libraries import Library

WIDTHS = (192, 128)
"""Of keys and values: besides equal ones up to 128, the only pair that cuDNN has in torch 2.11."""


def _fits(case: Case) -> bool:
    """As many queries as keys: by torch's causal mask, key i is the last one of query i."""
    q, k, v = (arg.shape for arg in case.arguments[:3])
    widths = q[3], v[3]
    known = widths == WIDTHS or (widths[0] == widths[1] <= 128 and widths[0] % 8 == 0)
    return q[:3] == k[:3] and q[1] > 1 and known and not case.keywords


LIBRARY = Library(
    name="sdpa",
    title="cuDNN",
    serves={path: "bfloat16" for path in ("F.attention", "G.attention_saving")},
    targets=("sm_90",),
    asked="attention",
    fits=_fits,
)
