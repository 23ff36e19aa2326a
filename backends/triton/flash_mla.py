"""FlashMLA for decoding in the latent space, where the spec asks for it."""

from __future__ import annotations

from backends.render import render
from backends.triton.instances import OpInstance, OpInstances, attentions
from backends.triton.kernel import KernelFile
from backends.triton.target import Target

LATENT, ROPE, PAGE = 512, 64, 64
"""The only sizes that the library has."""


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/flash_mla.py`. The library's dense decoding is for sm_90 alone."""
    asked = instances.spec.kernels.attention == "flash_mla" and target.name == "sm_90"
    decoders = [one for one in attentions(instances, "latent_attention") if _fits(one)]
    if not asked or not decoders:
        return None
    text = render("triton/flash_mla.py.jinja", latent=LATENT, rope=ROPE, page=PAGE)
    return KernelFile("flash_mla", text, {"F.latent_attention": "bfloat16"}, ())


def _fits(instance: OpInstance) -> bool:
    return (instance.size(0), instance.size(1)) == (LATENT, ROPE)
