"""DeepGEMM for products in FP8, where the spec asks for it: a file that calls the library."""

from __future__ import annotations

from backends.render import render
from backends.triton.instances import OpInstances
from backends.triton.kernel import KernelFile
from backends.triton.target import Target


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/deep_gemm.py`. On sm_100 the library wants scales in a packed form of its own."""
    asked = instances.spec.kernels.products == "deep_gemm" and target.name == "sm_90"
    if not asked or not instances.of("fp8_linear"):
        return None
    text = render("triton/deep_gemm.py.jinja")
    return KernelFile("deep_gemm", text, {"fp8.linear": "float8_e4m3fn"}, ())
