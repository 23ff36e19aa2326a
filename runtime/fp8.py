"""FP8 on any device, exactly simulated: E4M3 values, scales, products that add in float32.

A quantized tensor is `q` (float8_e4m3fn) and `s`, the float32 scales that multiply it back. Every
128 values have one scale: in a row (1 x 128) for activations and gradients, 128 x 128 for weights,
128 x 1 where tokens are summed over. The last run may be shorter, as if zeros filled it; tiles of
tokens (`quantize_columns`) lie as the sum over tokens reads them, and there zeros do fill it.

Every bit is defined, so that kernels can be held against this (DeepSeek-V3 report, section 3.3):

- amax is the largest magnitude of a run in float32, at least 1e-4; s = amax / 448, or for `ue8m0`
  the next power of two, 2^ceil(log2 s); q = E4M3(x / s), rounded to nearest, ties to even.
- A run with an infinity or a NaN has no finite product; nothing of it is hidden.
- For each 128 of what is summed over, the dot product of the E4M3 values is made exactly and
  rounded to float32; times the scale of the left operand, times that of the right one, it is added
  to the float32 sum, in the order of the runs. Each of these steps is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as torch_f
from torch import Tensor

from . import functional as F
from . import gradients as G
from . import routing

RUN = 128
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
LEAST_AMAX = 1e-4
WIDE = 2.0**8
"""By how much E4M3 values are divided where they are widened."""
LITTLE = 2**13
"""Up to so many elements are converted one by one as fast as all at once."""
AT_ONCE = 2**19
"""Elements of a weight that are widened at once: the copies of more do not fit the caches."""
FEW = 16
"""Rows of a product whose time is that of calls, not of arithmetic."""

Quantized = tuple[Tensor, Tensor]
"""Numbers in E4M3, and the scales that multiply them back."""


def quantize(x: Tensor, scale: str = "fp32", parts: Sequence[int] = ()) -> Quantized:
    """x [.., n] with a scale for each run of 128 in a row: [.., n], [.., runs].

    With `parts`, sizes that add up to n, runs restart in each part.
    """
    x = without_gradient(x).float()
    if parts:
        cut = [quantize(part, scale) for part in x.split(list(parts), dim=-1)]
        return torch.cat([q for q, _ in cut], -1), torch.cat([s for _, s in cut], -1)
    size = x.shape[-1]
    tiles = pad_runs(x, -1).unflatten(-1, (-1, RUN))
    s = scale_of(tiles.abs().amax(-1), scale)
    return (tiles / s.unsqueeze(-1)).flatten(-2)[..., :size].to(E4M3), s


def quantize_columns(x: Tensor, offs: Tensor | None = None, *, scale: str = "fp32") -> Quantized:
    """x [.., n] with a scale for each column of 128 tokens: [tiles, n, 128], [tiles, n].

    The 128 values of a scale are contiguous, as a product that sums over tokens reads
    them; zeros fill the last tile.

    With `offs`, x is [slots, n] and tiles restart with each expert: tile i of expert e is number
    `begin_e // 128 + e + i` of `slots // 128 + experts`, begin_e being its first slot. No two meet,
    and where one is follows from `offs` alone, without waiting for a sum of counts.
    Tiles that hold no slot are those of zeros.
    """
    rows = without_gradient(x).float().flatten(0, -2)
    if offs is None:
        return _columns(rows, scale)
    tiles, n = len(rows) // RUN + len(offs), x.shape[-1]
    s = scale_of(rows.new_zeros(1), scale).expand(tiles, n).clone()
    q = torch.zeros(tiles, n, RUN, dtype=E4M3, device=x.device)
    for slots, own in _experts(offs):
        q[own], s[own] = _columns(rows[slots], scale)
    return q, s


def requantize(q: Tensor, s: Tensor, offs: Tensor | None = None, *, scale: str) -> Quantized:
    """From a scale for each run in a row to one for each run of tokens, as `quantize_columns`."""
    return quantize_columns(dequantize(q, s), offs, scale=scale)


def dequantize(q: Tensor, s: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `quantize` gave, multiplied back: [.., n]."""
    return (q.float() * spread_scales(s, q.shape[-1])).to(dtype)


def quantize_weight(weight: Tensor, scale: str = "fp32", parts: Sequence[int] = ()) -> Quantized:
    """weight [.., out, in] with a scale for each 128 x 128: [.., out, in], [.., blocks, blocks].

    With `parts`, sizes that add up to `out`, blocks restart in each part.
    """
    if parts:
        cut = [quantize_weight(part, scale) for part in weight.split(list(parts), dim=-2)]
        return torch.cat([q for q, _ in cut], -2), torch.cat([s for _, s in cut], -2)
    rows, columns = weight.shape[-2:]
    padded = pad_runs(pad_runs(without_gradient(weight).float(), -1), -2)
    blocks = padded.unflatten(-1, (-1, RUN)).unflatten(-3, (-1, RUN))
    s = scale_of(blocks.abs().amax((-1, -3)), scale)
    q = blocks / s.unsqueeze(-1).unsqueeze(-3)
    return q.flatten(-4, -3).flatten(-2)[..., :rows, :columns].to(E4M3), s


def dequantize_weight(q: Tensor, s: Tensor, parts: Sequence[int] = ()) -> Tensor:
    """What `quantize_weight` gave, multiplied back: float32 [.., out, in]."""
    rows = spread_scales(s, q.shape[-2], parts, -2)
    return q.float() * spread_scales(rows, q.shape[-1])


def quantize_both(
    x: Tensor, offs: Tensor | None = None, *, scale: str = "fp32"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize` and `quantize_columns` of the same x."""
    return *quantize(x, scale), *quantize_columns(x, offs, scale=scale)


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, scale: str = "fp32") -> Quantized:
    """`quantize` of `rms_norm`."""
    return quantize(F.rms_norm(x, weight, eps), scale)


def swiglu_quantize(gate: Tensor, up: Tensor, scale: str = "fp32") -> Quantized:
    """`quantize` of `swiglu`."""
    return quantize(F.swiglu(gate, up), scale)


def swiglu_grad_quantize(
    d: Tensor, gate: Tensor, up: Tensor, offs: Tensor | None = None, *, scale: str = "fp32"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_both` of the concatenated gradients of gate and up [.., n].

    n is a multiple of 128.
    """
    return quantize_both(G.swiglu_grad_joined(d, gate, up), offs, scale=scale)


def linear(
    q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, *, dtype: torch.dtype, parts: Sequence[int] = ()
) -> Tensor:
    """x W^T for quantized x [.., in] and W [out, in], which `parts` of rows make up: [.., out]."""
    scales = spread_scales(ws, wq.shape[0], parts, 0).T
    y = _product(q.flatten(0, -2), s.flatten(0, -2), wq.T, scales)
    return y.to(dtype).view(*q.shape[:-1], wq.shape[0])


def linear_input_grad(
    q: Tensor, s: Tensor, wq: Tensor, ws: Tensor, *, dtype: torch.dtype, parts: Sequence[int] = ()
) -> Tensor:
    """dy W for quantized dy [.., out] and W [out, in]; `parts` of both along `out`: [.., in]."""
    scales = spread_scales(ws, wq.shape[1], (), 1)
    dx = _product(q.flatten(0, -2), s.flatten(0, -2), wq, scales, parts)
    return dx.to(dtype).view(*q.shape[:-1], wq.shape[1])


def linear_weight_grad(
    dq: Tensor, ds: Tensor, q: Tensor, s: Tensor, *, dtype: torch.dtype
) -> Tensor:
    """dy^T x, summed over tokens: [out, in].

    dq [tiles, out, 128], ds [tiles, out] and q [tiles, in, 128], s [tiles, in], both from
    `quantize_columns` or `requantize`.
    """
    dy, x = dq.transpose(0, 1).flatten(1), q.transpose(1, 2).flatten(0, 1)
    return _product(dy, ds.T, x, s).to(dtype)


def grouped_linear(
    q: Tensor,
    s: Tensor,
    offs: Tensor,
    wq: Tensor,
    ws: Tensor,
    *,
    dtype: torch.dtype,
    parts: Sequence[int] = (),
) -> Tensor:
    """`linear` for the slots of each expert: q [slots, in], wq [experts, out, in]."""
    if 0 < len(q) <= FEW:
        return _row_by_row(q, s, offs, wq, ws, parts).to(dtype)
    product = partial(linear, dtype=dtype, parts=parts)
    return _of_each_expert(product, q, s, offs, wq, ws)


def grouped_linear_input_grad(
    q: Tensor,
    s: Tensor,
    offs: Tensor,
    wq: Tensor,
    ws: Tensor,
    *,
    dtype: torch.dtype,
    parts: Sequence[int] = (),
) -> Tensor:
    """`linear_input_grad` for the slots of each expert: q [slots, out], wq [experts, out, in]."""
    product = partial(linear_input_grad, dtype=dtype, parts=parts)
    return _of_each_expert(product, q, s, offs, wq, ws)


def grouped_linear_weight_grad(
    dq: Tensor, ds: Tensor, q: Tensor, s: Tensor, offs: Tensor, *, dtype: torch.dtype
) -> Tensor:
    """`linear_weight_grad` for the slots of each expert: [experts, out, in]; zeros for idle ones.

    dq [tiles, out, 128], q [tiles, in, 128]; `quantize_columns` says which tiles are an expert's.
    """
    tiles = [own for _, own in _experts(offs)]
    groups = [(dq[own], ds[own], q[own], s[own]) for own in tiles]
    return torch.stack([linear_weight_grad(*group, dtype=dtype) for group in groups])


def permute_quantized(
    q: Tensor, s: Tensor, index: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantized tokens q [.., hidden] and their scales as `functional.permute` sorts tokens."""
    return _permuted(F.permute, q, s, index, experts)


def permute_quantized_local(
    q: Tensor, s: Tensor, index: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same as `functional.permute_local` sorts them."""
    return _permuted(F.permute_local, q, s, index, experts)


def _permuted(
    permute: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]],
    q: Tensor,
    s: Tensor,
    index: Tensor,
    experts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if (ranks := routing.current()) is not None:
        (rows, scales), offs, sort_indices = ranks.send((q, s), index)
        return rows, scales, offs, sort_indices
    rows, offs, sort_indices = permute(q, index, experts)
    token = torch.div(sort_indices, index.shape[-1], rounding_mode="floor")
    return rows, s.flatten(0, -2)[token], offs, sort_indices


# ---- parts ----------------------------------------------------------------------------------


def scale_of(amax: Tensor, scale: str, largest: float = E4M3_MAX) -> Tensor:
    """The scale of each run by its largest magnitude, which becomes at most `largest`."""
    # Torch on CUDA divides by a number as it multiplies by the number's reciprocal, with two
    # roundings where IEEE division has one; by a tensor it divides.
    s = amax.clamp(min=LEAST_AMAX) / torch.full((), largest, device=amax.device)
    if scale == "fp32":
        return s
    mantissa, exponent = torch.frexp(s)  # the mantissa is in [0.5, 1)
    power = torch.ldexp(torch.ones_like(s), exponent - (mantissa == 0.5).int())
    return torch.where(s.isfinite(), power, s)


def _columns(x: Tensor, scale: str) -> Quantized:
    """x [tokens, n] with a scale for each column of 128 tokens: [tiles, n, 128], [tiles, n]."""
    tiles = pad_runs(x, 0).unflatten(0, (-1, RUN))
    s = scale_of(tiles.abs().amax(1), scale)
    return (tiles / s.unsqueeze(1)).to(E4M3).transpose(1, 2).contiguous(), s


def _experts(offs: Tensor) -> list[tuple[slice, slice]]:
    """The slots of each expert, and its tiles of 128 of them."""
    cut, begin = [], 0
    for expert, end in enumerate(offs.tolist()):
        first = begin // RUN + expert
        cut.append((slice(begin, end), slice(first, first - (begin - end) // RUN)))
        begin = end
    return cut


def _product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, parts: Sequence[int] = ()
) -> Tensor:
    """a b for E4M3 a [m, k], b [k, n] with scales a_scale [m, runs], b_scale [runs, n]: float32.

    Products of E4M3 values have 8 bits and lie between 2^-18 and 2^18, so that float64 holds any
    sum of 128 of them exactly, in any order of additions.
    """
    wide_a, step = _wide(a), max(RUN, AT_ONCE // max(1, b.shape[0]))
    if b.shape[1] <= step:
        return _wide_product(wide_a, a_scale, b, b_scale, parts)
    # The result's columns do not depend on one another.
    cut = zip(b.split(step, 1), b_scale.split(step, 1), strict=True)
    return torch.cat([_wide_product(wide_a, a_scale, *columns, parts) for columns in cut], 1)


def _wide_product(
    wide_a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, parts: Sequence[int]
) -> Tensor:
    """`_product` with a widened already."""
    # In the order in which it is stored: several times as fast.
    wide_b = _wide(b.T).T if b.stride(0) == 1 else _wide(b)
    total = torch.zeros(len(wide_a), b.shape[1], dtype=torch.float32, device=b.device)
    if len(wide_a) <= FEW and not parts and len(b) % RUN == 0:
        # The same values in fewer calls, which take most of the time of few rows.
        cut = wide_a.unflatten(1, (-1, RUN)).transpose(0, 1), wide_b.unflatten(0, (-1, RUN))
        dots = torch.bmm(*cut).mul_(WIDE**2).float()
        for term in dots.mul_(a_scale.T.unsqueeze(2)).mul_(b_scale.unsqueeze(1)):
            total += term
        return total
    start = 0
    for i, length in enumerate(_lengths(len(b), parts)):
        run = slice(start, start + length)
        dot = (wide_a[:, run] @ wide_b[run]).mul_(WIDE**2).float()
        total += dot * a_scale[:, i, None] * b_scale[i]
        start += length
    return total


def _row_by_row(
    q: Tensor, s: Tensor, offs: Tensor, wq: Tensor, ws: Tensor, parts: Sequence[int]
) -> Tensor:
    """What decoding asks for: few rows, each with the weight of its expert, in few calls."""
    place = torch.arange(len(q), dtype=offs.dtype, device=q.device)
    expert = torch.searchsorted(offs, place, right=True)
    weights = wq.view(torch.uint8).index_select(0, expert).view(E4M3)
    x, w = _wide(q).unsqueeze(1), _wide(weights).mT
    scales = spread_scales(ws[expert], wq.shape[1], parts, 1).mT
    total = torch.zeros(len(q), wq.shape[1], device=q.device)
    for i in range(s.shape[1]):
        run = slice(i * RUN, (i + 1) * RUN)
        dot = torch.bmm(x[..., run], w[:, run]).squeeze(1).mul_(WIDE**2).float()
        total += dot.mul_(s[:, i, None]).mul_(scales[:, i])
    return total


def _wide(q: Tensor) -> Tensor:
    """E4M3 values in float64, divided by `WIDE`: many times as fast as torch converts them.

    The bits of an E4M3 value, shifted by 7, are those of a float16 value 2^8 times as small; the
    NaN alone is another. Torch converts float16 by way of float32 faster than at once.
    """
    if q.numel() < LITTLE or _has_nan(q):
        return q.float().double().div_(WIDE)
    bits = q.view(torch.int8).to(torch.int16)
    bits <<= 7
    bits &= ~0x4000  # where the sign was copied to
    return bits.view(torch.float16).float().double()


def _has_nan(q: Tensor) -> bool:
    """Whether any of at least one E4M3 value is NaN: 0x7F or 0xFF, the largest with and without a
    sign."""
    return q.view(torch.int8).max().item() == 0x7F or q.view(torch.uint8).max().item() == 0xFF


def _lengths(size: int, parts: Sequence[int]) -> list[int]:
    """Lengths of the runs that a dimension is cut in."""
    return [min(RUN, n - start) for n in parts or (size,) for start in range(0, n, RUN)]


def spread_scales(s: Tensor, size: int, parts: Sequence[int] = (), dim: int = -1) -> Tensor:
    """The scale of each element along a dimension, from those of its runs."""
    if not parts:
        return s.repeat_interleave(RUN, dim=dim).narrow(dim, 0, size)
    lengths = torch.tensor(_lengths(size, parts), device=s.device)
    return s.repeat_interleave(lengths, dim=dim, output_size=size)


def pad_runs(x: Tensor, dim: int) -> Tensor:
    """x with zeros up to a whole number of runs along a dimension."""
    missing = -x.shape[dim] % RUN
    if not missing:
        return x
    sides = [0, 0] * (-dim - 1 if dim < 0 else x.dim() - 1 - dim)
    return torch_f.pad(x, (*sides, 0, missing))


def _counts(offs: Tensor) -> list[int]:
    """How many slots each expert has."""
    return offs.diff(prepend=offs.new_zeros(1)).tolist()


def _of_each_expert(
    product: Callable[..., Tensor], q: Tensor, s: Tensor, offs: Tensor, wq: Tensor, ws: Tensor
) -> Tensor:
    """Products of the slots of each expert with its weights; an expert without slots costs none."""
    counts = _counts(offs)
    groups = zip(counts, q.split(counts), s.split(counts), wq, ws, strict=True)
    found = [product(*group) for count, *group in groups if count]
    return torch.cat(found) if found else product(q, s, wq[0], ws[0])


def without_gradient(x: Tensor) -> Tensor:
    """x; asking autograd for a gradient through it is an error instead of a wrong value."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _NoGradient.apply(x)  # type: ignore[no-any-return]
    return x


def refuse_gradient(s: Tensor, weight: Tensor) -> Tensor:
    """The scales of the FP8 copy of a weight; asking for the weight's gradient is an error."""
    if torch.is_grad_enabled() and weight.requires_grad:
        return _NoGradient.apply(s, weight)  # type: ignore[no-any-return]
    return s


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError(
            "autograd has no gradient of products in FP8: train with `loss`, whose backward pass is"
            " generated, or build the model with `precision.policy=bf16`"
        )
