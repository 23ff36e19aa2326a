"""Triton's interpreter, repaired: as shipped (3.7.1) it is wrong about small floats, silently.

- Casts to bfloat16 cut bits off, casts to FP8 lose carries and wrap beyond the largest number. Here
  torch casts: to the nearest, ties to even, FP8 saturating, which is what the hardware does.
- `fma` rounds the product, too.
- `/` of float32 is exact, where a GPU has `div.full.f32`, up to 2 ulp off. Here it is 1 ulp off:
  a kernel whose bits depend on a division fails unless it asks for `tl.div_rn`.
- bfloat16 is kept as its bit pattern, and arithmetic on it computes with the pattern. Products of
  matrices are mended; any other arithmetic on bfloat16 is an error that tells to cast first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

FLOATS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
ARITHMETIC = (
    *("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_frem", "create_fneg"),
    *("create_maxnumf", "create_minnumf", "create_maximumf", "create_minimumf", "create_fma"),
    *("create_exp", "create_exp2", "create_log", "create_log2", "create_sqrt", "create_rsqrt"),
    *("create_fabs", "create_sin", "create_cos", "create_precise_divf", "create_precise_sqrt"),
    *("create_fcmpOLT", "create_fcmpOGT", "create_fcmpOLE", "create_fcmpOGE", "create_fcmpOEQ"),
)


def repair() -> None:
    """Puts the mended functions in place, once."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "repaired", False):
        return
    shipped = interpreter._convert_float
    interpreter._convert_float = lambda *arguments: _converted(shipped, *arguments)
    builder.create_dot = _dot(builder.create_dot)
    builder.create_fma = _fma
    builder.create_fdiv = _fdiv(builder.create_fdiv)
    for name in ARITHMETIC:
        if hasattr(builder, name):
            setattr(builder, name, _guarded(name, getattr(builder, name)))
    builder.repaired = True


def _converted(shipped: Callable[..., Any], data: Any, source: Any, to: Any, mode: Any) -> Any:
    before, after = FLOATS.get(str(source.scalar)), FLOATS.get(str(to.scalar))
    if before is None or after is None or mode == interpreter._ir.ROUNDING_MODE.RTZ:
        return shipped(data, source, to, mode)
    raw = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8).copy())
    cast = raw.view(before).to(after)
    # 0-d arrays have come with a dimension more.
    return cast.view(torch.uint8).numpy().view(BITS[after.itemsize]).reshape(data.shape)


def _wide(handle: Any) -> Any:
    """The numbers of a bfloat16 handle in float32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _dot(shipped: Callable[..., Any]) -> Callable[..., Any]:
    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return shipped(self, a, b, d, precision, imprecise)
        product = np.matmul(_wide(a), _wide(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    return dot


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z rounded once: float64 holds the product of two float32 numbers exactly."""
    wide = np.float64 if x.data.dtype == np.float32 else x.data.dtype
    exact = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
    return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def _fdiv(shipped: Callable[..., Any]) -> Callable[..., Any]:
    def fdiv(self: Any, x: Any, y: Any) -> Any:
        if y.dtype.scalar != tl.float32:
            return shipped(self, x, y)
        exact = shipped(self, x, y)
        off = np.nextafter(exact.data, np.float32(0))
        off = np.where(np.isfinite(exact.data) & (np.frexp(y.data)[0] != 0.5), off, exact.data)
        return interpreter.TensorHandle(off, exact.dtype)

    return fdiv


def _guarded(name: str, shipped: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: Any, *handles: Any) -> Any:
        for handle in handles:
            if isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16:
                raise TypeError(f"{name} on bfloat16: cast to float32 in the kernel first")
        return shipped(self, *handles)

    return guarded
