"""FP8 against a definition of its own: every number by itself, exact sums, no torch arithmetic."""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from runtime import fp8

# ---- the plain definition -------------------------------------------------------------------

# Magnitudes of E4M3 by their 7 bits: 4 of exponent (bias 7), 3 of mantissa; 127 is the NaN.
MAGNITUDES = [
    (code & 7) / 8 * 2.0**-6 if code < 8 else (1 + (code & 7) / 8) * 2.0 ** ((code >> 3) - 7)
    for code in range(127)
]


def f32(value: float) -> float:
    """Rounded to float32. Python's float64 operations on float32 numbers, rounded again, are those
    of float32: 53 bits are more than twice 24 and two."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def e4m3(value: float) -> float:
    """The nearest of all numbers that there are; of two equally near ones that with an even bit."""
    if math.isnan(value) or math.isinf(value):
        return math.nan
    above = min(bisect_left(MAGNITUDES, abs(value)), 126)
    below = max(above - 1, 0)
    middle = (MAGNITUDES[below] + MAGNITUDES[above]) / 2  # exactly
    even = below if below % 2 == 0 else above
    code = even if abs(value) == middle else below if abs(value) < middle else above
    return math.copysign(MAGNITUDES[code], value)


def scale_of(numbers: Sequence[float], form: str) -> float:
    magnitudes = [abs(n) for n in numbers]
    amax = math.nan if any(map(math.isnan, magnitudes)) else max([1e-4, *magnitudes])
    s = f32(f32(amax) / 448)
    if form == "fp32" or not math.isfinite(s):
        return s
    power = 2.0**-60
    while power < s:
        power *= 2
    return power


def divide(x: float, s: float) -> float:
    return math.nan if math.isinf(x) and math.isinf(s) else f32(x / s)


def cut(size: int, parts: Sequence[int] = ()) -> list[range]:
    """The runs of a dimension."""
    runs, begin = [], 0
    for part in parts or [size]:
        runs += [range(i, min(i + 128, begin + part)) for i in range(begin, begin + part, 128)]
        begin += part
    return runs


Matrix = list[list[float]]


def quantized(
    x: Matrix, rows: list[range], columns: list[range], form: str
) -> tuple[Matrix, Matrix]:
    """Numbers and scales of the tiles that these rows and columns make."""
    q = [[math.nan] * len(line) for line in x]
    s = [[0.0] * len(columns) for _ in rows]
    for a, some_rows in enumerate(rows):
        for b, some_columns in enumerate(columns):
            tile = [(i, j) for i in some_rows for j in some_columns]
            s[a][b] = scale_of([x[i][j] for i, j in tile], form)
            for i, j in tile:
                q[i][j] = e4m3(divide(x[i][j], s[a][b]))
    return q, s


def each(size: int) -> list[range]:
    return [range(i, i + 1) for i in range(size)]


def product(a: Matrix, a_scale: Matrix, b: Matrix, b_scale: Matrix, runs: list[range]) -> Matrix:
    """sum over runs of (a b) * a_scale * b_scale; scales are [m][run] and [run][n]."""
    result = []
    for i in range(len(a)):
        line = []
        for j in range(len(b[0]) if b else 0):
            total = 0.0
            for r, run in enumerate(runs):
                terms = [a[i][k] * b[k][j] for k in run]
                dot = f32(math.fsum(terms))
                total = f32(total + f32(f32(dot * a_scale[i][r]) * b_scale[r][j]))
            line.append(total)
        result.append(line)
    return result


def across(s: Matrix, runs: list[range]) -> Matrix:
    """Scales of runs of columns as one for each column."""
    return [
        [line[next(r for r, run in enumerate(runs) if j in run)] for j in columns_of(runs)]
        for line in s
    ]


def columns_of(runs: list[range]) -> range:
    return range(runs[-1].stop if runs else 0)


def turned(x: Matrix) -> Matrix:
    return [list(column) for column in zip(*x, strict=True)]


# ---- comparisons ----------------------------------------------------------------------------


def numbers(x: Tensor) -> Matrix:
    return x.double().tolist()  # type: ignore[no-any-return]


def same(found: Tensor, expected: Matrix) -> None:
    want = torch.tensor(expected, dtype=torch.float64).view(found.shape)
    assert torch.equal(found.double().nan_to_num(1e30), want.nan_to_num(1e30))
    zeros = want == 0
    assert torch.equal(found.double()[zeros].signbit(), want[zeros].signbit())


def wild(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of very different sizes, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    x = x * torch.exp(4 * torch.randn(*shape, generator=generator))
    return x.where(torch.rand(*shape, generator=generator) > 0.1, 0.0)


FORMS = ["fp32", "ue8m0"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("size", "parts"), [(128, ()), (256, ()), (1, ()), (130, ()), (200, (40, 160))]
)
def test_rows(form: str, size: int, parts: tuple[int, ...]) -> None:
    x = wild(3, size)
    x[1] = 0  # amax is 1e-4 at least, and 0 / 0 never happens
    q, s = fp8.quantize(x, form, parts)
    expected_q, expected_s = quantized(numbers(x), each(3), cut(size, parts), form)
    assert q.dtype == torch.float8_e4m3fn and s.dtype == torch.float32
    same(q, expected_q)
    same(s, expected_s)
    deep_q, deep_s = fp8.quantize(x.view(1, 3, 1, size), form, parts)
    assert deep_q.shape == (1, 3, 1, size) and torch.equal(deep_s.flatten(0, -2), s)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("rows", "columns", "parts"), [(128, 128, ()), (5, 131, ()), (140, 3, (10, 130))]
)
def test_weights(form: str, rows: int, columns: int, parts: tuple[int, ...]) -> None:
    weight = wild(rows, columns)
    q, s = fp8.quantize_weight(weight, form, parts)
    expected_q, expected_s = quantized(numbers(weight), cut(rows, parts), cut(columns), form)
    same(q, expected_q)
    same(s, expected_s)
    both_q, both_s = fp8.quantize_weight(torch.stack([weight, 2 * weight]), form, parts)
    assert torch.equal(both_q[0].float(), q.float()) and torch.equal(both_s[0], s)


def tiles_of(counts: Sequence[int]) -> list[range]:
    """Runs of the tokens of each expert."""
    begins = [sum(counts[:i]) for i in range(len(counts))]
    return [
        range(b + r.start, b + r.stop) for b, n in zip(begins, counts, strict=True) for r in cut(n)
    ]


def places_of(counts: Sequence[int]) -> list[int]:
    """Which of the tiles that there is room for hold them."""
    begins = [sum(counts[:e]) for e in range(len(counts))]
    return [b // 128 + e + i for e, b in enumerate(begins) for i in range(-(-counts[e] // 128))]


def same_tiles(
    found: fp8.Quantized,
    expected: tuple[Matrix, Matrix],
    own: list[range],
    places: Sequence[int],
    form: str,
) -> None:
    """Tiles [tiles, n, 128] and scales against rows [tokens, n]; zeros where no row is."""
    (q, s), (rows, scales) = found, expected
    columns = s.shape[1]
    want = torch.zeros(len(s), columns, 128, dtype=torch.float64)
    want_s = torch.full(s.shape, scale_of([0.0], form), dtype=torch.float64)
    for place, run, line in zip(places, own, scales, strict=True):
        for j, i in enumerate(run):
            want[place, :, j] = torch.tensor(rows[i], dtype=torch.float64)
        want_s[place] = torch.tensor(line, dtype=torch.float64)
    same(q, want.tolist())
    same(s, want_s.tolist())


@pytest.mark.parametrize("counts", [(130, 0, 1), (0, 0, 0), (128, 127), (0, 128, 0, 256, 1, 255)])
def test_no_two_experts_share_a_tile_and_there_is_room_for_all(counts: tuple[int, ...]) -> None:
    places = places_of(counts)
    assert places == sorted(set(places)) and all(
        p < sum(counts) // 128 + len(counts) for p in places
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("counts", [(130, 0, 1), (0, 0, 0), (128, 127)])
def test_columns_and_from_rows_to_columns(form: str, counts: tuple[int, ...]) -> None:
    tokens = sum(counts)
    x = wild(tokens, 5)
    ends = torch.tensor(counts).cumsum(0).int()
    own, places = tiles_of(counts), places_of(counts)
    expected = quantized(numbers(x), own, each(5), form)
    same_tiles(fp8.quantize_columns(x, ends, scale=form), expected, own, places, form)

    rows_q, rows_s = quantized(numbers(x), each(tokens), cut(5), form)
    back = [[f32(n * line[0]) for n in row] for row, line in zip(rows_q, rows_s, strict=True)]
    again = quantized(back, own, each(5), form)
    found = fp8.requantize(*fp8.quantize(x, form), ends, scale=form)
    same_tiles(found, again, own, places, form)
    if 0 not in counts[:2]:
        whole = cut(tokens)
        expected = quantized(numbers(x), whole, each(5), form)
        found = fp8.quantize_columns(x.view(5, -1, 5), scale=form)
        same_tiles(found, expected, whole, range(len(whole)), form)


@given(st.floats(width=32, allow_subnormal=True), st.integers(0, 1 << 30))
def test_any_number_in_a_run(number: float, seed: int) -> None:
    """Subnormal, huge and infinite numbers and NaNs, beside others."""
    x = wild(1, 7, seed=seed)
    x[0, 3] = number
    for form in FORMS:
        q, s = fp8.quantize(x, form)
        expected_q, expected_s = quantized(numbers(x), each(1), cut(7), form)
        same(q, expected_q)
        same(s, expected_s)


def test_the_largest_number_of_a_run_is_448_and_no_number_is_beyond() -> None:
    for seed in range(50):
        q, s = fp8.quantize(wild(4, 128, seed=seed), "fp32")
        assert (q.float().abs().amax(-1) == 448).all() and s.isfinite().all()
    assert fp8.quantize(torch.full((1, 4), 3e38), "ue8m0")[1].isfinite().all()


class CudaDivision(TorchFunctionMode):
    """Division of a tensor by a number as torch has it on CUDA: times the number's reciprocal."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        divides = getattr(func, "__name__", "") in ("div", "true_divide", "__truediv__")
        if divides and isinstance(args[1], int | float):
            return args[0] * (1 / torch.tensor(args[1], dtype=args[0].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_gives_the_same_scales(form: str) -> None:
    """On an H200 1 number in 850 differed, as long as amax was divided by 448 as a number."""
    x = wild(64, 512)
    with CudaDivision():
        assert not torch.equal(x / 448, x / torch.tensor(448.0))
        found = fp8.quantize_both(x, scale=form)
    for one, other in zip(found, fp8.quantize_both(x, scale=form), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_nothing_that_is_not_finite_is_hidden() -> None:
    weight = fp8.quantize_weight(wild(2, 256))
    for bad in (math.inf, -math.inf, math.nan):
        x = wild(3, 256)
        x[1, 200] = bad
        y = fp8.linear(*fp8.quantize(x), *weight, dtype=torch.float32)
        assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("size", "parts"), [((4, 260, 5), ()), ((2, 3, 150), (20, 130))])
def test_the_three_products(form: str, size: tuple[int, int, int], parts: tuple[int, ...]) -> None:
    tokens, inside, out = size
    x, weight, dy = wild(tokens, inside), wild(out, inside, seed=1), wild(tokens, out, seed=2)
    into, outof, rows = cut(inside), cut(out, parts), each(tokens)
    q, s = quantized(numbers(x), rows, into, form)
    wq, ws = quantized(numbers(weight), outof, into, form)
    dq, ds = quantized(numbers(dy), rows, outof, form)
    ours = fp8.quantize(x, form), fp8.quantize_weight(weight, form, parts)
    gradient = fp8.quantize(dy, form, parts)

    y = fp8.linear(*ours[0], *ours[1], dtype=torch.float32, parts=parts)
    same(y, product(q, s, turned(wq), across(turned(ws), outof), into))
    dx = fp8.linear_input_grad(*gradient, *ours[1], dtype=torch.float32, parts=parts)
    same(dx, product(dq, ds, wq, across(ws, into), outof))

    q, s = quantized(numbers(x), cut(tokens), each(inside), form)
    dq, ds = quantized(numbers(dy), cut(tokens), each(out), form)
    columns = *fp8.quantize_columns(dy, scale=form), *fp8.quantize_columns(x, scale=form)
    dw = fp8.linear_weight_grad(*columns, dtype=torch.float32)
    same(dw, product(turned(dq), turned(ds), q, s, cut(tokens)))


def test_sums_over_more_than_one_run_of_tokens() -> None:
    x, dy = wild(300, 3), wild(300, 2, seed=1)
    q, s = quantized(numbers(x), cut(300), each(3), "fp32")
    dq, ds = quantized(numbers(dy), cut(300), each(2), "fp32")
    columns = *fp8.quantize_columns(dy.view(3, 100, 2)), *fp8.quantize_columns(x.view(3, 100, 3))
    dw = fp8.linear_weight_grad(*columns, dtype=torch.float32)
    same(dw, product(turned(dq), turned(ds), q, s, cut(300)))


@pytest.mark.parametrize("counts", [(3, 0, 131), (0, 0, 0), (128, 5, 1)])
@pytest.mark.parametrize("parts", [(), (2, 3)])
def test_each_expert_is_computed_as_if_alone(
    counts: tuple[int, ...], parts: tuple[int, ...]
) -> None:
    slots = sum(counts)
    x, dy, weight = wild(slots, 130), wild(slots, 5, seed=1), wild(3, 5, 130, seed=2)
    ends = torch.tensor(counts).cumsum(0).int()
    wq, ws = fp8.quantize_weight(weight, "fp32", parts)
    q, s = fp8.quantize(x)
    dq, ds = fp8.quantize(dy, "fp32", parts)
    y = fp8.grouped_linear(q, s, ends, wq, ws, dtype=torch.bfloat16, parts=parts)
    dx = fp8.grouped_linear_input_grad(dq, ds, ends, wq, ws, dtype=torch.bfloat16, parts=parts)
    columns = (*fp8.quantize_columns(dy, ends), *fp8.quantize_columns(x, ends))
    dw = fp8.grouped_linear_weight_grad(*columns, ends, dtype=torch.float32)
    assert (y.shape, dx.shape, dw.shape) == ((slots, 5), (slots, 130), (3, 5, 130))
    for e, (last, count) in enumerate(zip(ends.tolist(), counts, strict=True)):
        own = slice(last - count, last)
        options = {"dtype": torch.bfloat16, "parts": parts}
        alone = fp8.quantize_weight(weight[e], "fp32", parts)
        assert torch.equal(y[own], fp8.linear(q[own], s[own], *alone, **options))  # type: ignore[arg-type]
        assert torch.equal(
            dx[own],
            fp8.linear_input_grad(dq[own], ds[own], *alone, **options),  # type: ignore[arg-type]
        )
        columns = (*fp8.quantize_columns(dy[own]), *fp8.quantize_columns(x[own]))
        assert torch.equal(dw[e], fp8.linear_weight_grad(*columns, dtype=torch.float32))
        assert count or not dw[e].any()


def test_joined_weights_are_each_quantized_by_themselves() -> None:
    a, b, x = wild(40, 60), wild(70, 60, seed=1), wild(9, 60, seed=2)
    q, s = fp8.quantize(x)
    both = fp8.quantize_weight(torch.cat([a, b]), "fp32", (40, 70))
    y = fp8.linear(q, s, *both, dtype=torch.float32, parts=(40, 70))
    alone = [fp8.linear(q, s, *fp8.quantize_weight(w), dtype=torch.float32) for w in (a, b)]
    assert torch.equal(y, torch.cat(alone, -1))


def test_tokens_travel_with_their_scales() -> None:
    x, index = wild(2, 6, 130), torch.randint(4, (2, 6, 2), generator=torch.manual_seed(0))
    q, s = fp8.quantize(x, "ue8m0")
    rows, scales, ends, order = fp8.permute_quantized(q, s, index, 4)
    from runtime import functional

    plain, plain_ends, plain_order = functional.permute(x, index, 4)
    expected_q, expected_s = fp8.quantize(plain, "ue8m0")
    assert torch.equal(rows.float(), expected_q.float()) and torch.equal(scales, expected_s)
    assert torch.equal(ends, plain_ends) and torch.equal(order, plain_order)


def test_the_error_is_what_e4m3_has() -> None:
    """2.57 % for scales in fp32 and 2.65 % for powers of two, of normal numbers."""
    x = torch.randn(2000, 128, generator=torch.manual_seed(0))
    for form, expected in (("fp32", 0.0257), ("ue8m0", 0.0265)):
        error = (fp8.dequantize(*fp8.quantize(x, form)) - x).norm() / x.norm()
        assert error.item() == pytest.approx(expected, abs=1e-4)


def test_autograd_is_refused_rather_than_wrong() -> None:
    x = wild(2, 4).requires_grad_()
    y = fp8.linear(*fp8.quantize(x), *fp8.quantize_weight(wild(3, 4)), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="no gradient of products in FP8"):
        y.sum().backward()


@pytest.mark.parametrize("count", [1, fp8.LITTLE // 254 + 1])
def test_every_e4m3_number_is_widened_exactly(count: int) -> None:
    bits = torch.arange(256, dtype=torch.uint8).repeat(count)
    every = bits.view(torch.float8_e4m3fn)
    finite = bits[~every.float().isnan()].view(torch.float8_e4m3fn)
    assert len(finite) == 254 * count
    wide = fp8._wide(finite) * fp8.WIDE
    assert torch.equal(wide, finite.float().double())
    assert torch.equal(torch.signbit(wide), torch.signbit(finite.float()))
    assert torch.equal(fp8._wide(every).isnan(), every.float().isnan())


def test_few_rows_are_multiplied_as_many_are() -> None:
    x, w = fp8.quantize(wild(40, 512)), fp8.quantize_weight(wild(256, 512))
    many = fp8.linear(*x, *w, dtype=torch.float32)
    for rows in (1, 7, 16):
        few = fp8.linear(x[0][:rows], x[1][:rows], *w, dtype=torch.float32)
        assert torch.equal(few, many[:rows])


@pytest.mark.parametrize("rows", [1, 40])
def test_a_weight_that_is_widened_in_parts_has_the_same_product(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = fp8.quantize(torch.randn(rows, 200, generator=generator))
    weight = fp8.quantize_weight(torch.randn(500, 200, generator=generator))
    whole = fp8.linear(*x, *weight, dtype=torch.float32)
    monkeypatch.setattr(fp8, "AT_ONCE", 1)
    assert torch.equal(fp8.linear(*x, *weight, dtype=torch.float32), whole)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_a_nan_in_a_large_weight_reaches_the_product(byte: int) -> None:
    weight, scales = fp8.quantize_weight(torch.ones(128, 128))
    weight.view(torch.uint8)[5, 7] = byte
    y = fp8.linear(*fp8.quantize(torch.ones(1, 128)), weight, scales, dtype=torch.float32)
    assert y.isnan().nonzero().tolist() == [[0, 5]]
