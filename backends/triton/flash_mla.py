"""FlashMLA for decoding in the latent space, where the spec asks for it or it was the fastest.

The library's dense decoding is for sm_90 alone.
"""

from __future__ import annotations

from backends.triton.kernel import Case
from backends.triton.libraries import Library

LATENT, ROPE = 512, 64
"""The only sizes that the library has."""


def _fits(case: Case) -> bool:
    q_latent, q_rope, *_ = case.arguments
    return (q_latent.shape[-1], q_rope.shape[-1]) == (LATENT, ROPE)


LIBRARY = Library(
    name="flash_mla",
    title="FlashMLA",
    serves={"F.latent_attention": "bfloat16"},
    targets=("sm_90",),
    asked="attention",
    fits=_fits,
)
