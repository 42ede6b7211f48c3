"""The mended interpreter computes what torch does; the stock one still does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tools import interpreter, narrow_floats
from tools.interpreter_probe import (
    arithmetic_kernel,
    cast_kernel,
    defects,
    dot_kernel,
    larger,
    sum_kernel,
)

NARROW = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@triton.jit
def extremes_kernel(source, largest, smallest, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    values = tl.load(source + row[:, None] * COLUMNS + column[None, :])
    tl.store(largest + row, tl.max(values, axis=1))
    tl.store(smallest + row, tl.min(values, axis=1))


@triton.jit
def reduce_kernel(
    source,
    target,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AXIS: tl.constexpr,
    KEEP: tl.constexpr,
):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    values = tl.load(source + row[:, None] * COLUMNS + column[None, :])
    reduced = tl.reduce(values, AXIS, larger, keep_dims=KEEP)
    size: tl.constexpr = COLUMNS if AXIS == 0 else ROWS
    tl.store(target + tl.arange(0, size), tl.reshape(reduced, (size,)))


@triton.jit
def reduce_all_kernel(source, target, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    values = tl.load(source + row[:, None] * COLUMNS + column[None, :])
    tl.store(target, tl.reduce(values, None, larger))


@triton.jit
def scan_kernel(source, target, ROWS: tl.constexpr, COLUMNS: tl.constexpr, REVERSE: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    where = row[:, None] * COLUMNS + column[None, :]
    values = tl.load(source + where)
    tl.store(target + where, tl.associative_scan(values, 1, larger, reverse=REVERSE))


@triton.jit
def compare_kernel(left, right, target, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(left + i), tl.load(right + i)
    tl.store(target + i, tl.where(a < b, a, -b))


@triton.jit
def multiply_kernel(left, right, target):
    tl.store(target, tl.load(left) * tl.load(right))


@triton.jit
def integer_dot_kernel(left, right, product, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    row, depth = tl.arange(0, SIZE), tl.arange(0, DEPTH)
    a = tl.load(left + row[:, None] * DEPTH + depth[None, :])
    b = tl.load(right + depth[:, None] * SIZE + row[None, :])
    tl.store(product + row[:, None] * SIZE + row[None, :], tl.dot(a, b, out_dtype=tl.int32))


def test_triton_still_has_the_defects_that_are_mended_here() -> None:
    found = interpreter.stock_defects()
    mended = [name for name, present in found.items() if not present]
    assert not mended, f"Triton mended {mended}: drop these patches from tools.interpreter"


def test_no_defect_is_left() -> None:
    assert not any(defects().values())


@pytest.mark.parametrize("dtype", NARROW)
def test_casts_round_to_nearest_even(dtype: torch.dtype) -> None:
    every_half = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    source = every_half.float()
    source[source.isinf()] = torch.finfo(torch.float16).max
    largest = torch.finfo(dtype).max
    target = torch.zeros(source.shape, dtype=dtype)
    cast_kernel[(1,)](source, target, BLOCK=source.numel())
    expected = source.clamp(-largest, largest).to(dtype).float()
    assert torch.equal(target.float().nan_to_num(1e9), expected.nan_to_num(1e9))


@pytest.mark.parametrize("dtype", NARROW)
def test_casts_to_fp32_are_exact(dtype: torch.dtype) -> None:
    bits = torch.arange(256 if dtype.itemsize == 1 else 1 << 16, dtype=torch.int32)
    source = bits.to(torch.uint8 if dtype.itemsize == 1 else torch.int16).view(dtype)
    target = torch.zeros(source.shape)
    cast_kernel[(1,)](source, target, BLOCK=source.numel())
    assert torch.equal(target.nan_to_num(1e39), source.float().nan_to_num(1e39))


def test_fp8_saturates_and_keeps_nan() -> None:
    source = torch.tensor([500.0, -1e9, float("inf"), float("nan")])
    target = torch.zeros(4, dtype=torch.float8_e4m3fn)
    cast_kernel[(1,)](source, target, BLOCK=4)
    assert target.float()[:3].tolist() == [448.0, -448.0, 448.0]
    assert target.float()[3].isnan()


def test_bfloat16_arithmetic_rounds_after_each_operation() -> None:
    left, right = torch.randn(512).bfloat16(), torch.randn(512).bfloat16()
    total = torch.zeros_like(left)
    arithmetic_kernel[(1,)](left, right, total, BLOCK=512)
    assert torch.equal(total, left * 2 + right)


def test_bfloat16_comparison_and_negation() -> None:
    left, right = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    target = torch.zeros_like(left)
    compare_kernel[(1,)](left, right, target, BLOCK=64)
    assert torch.equal(target, torch.where(left < right, left, -right))


def test_bfloat16_extremes_and_sum() -> None:
    source = torch.randn(8, 32).bfloat16() - 3  # negative: bit patterns sort the other way
    largest, smallest = torch.zeros(8).bfloat16(), torch.zeros(8).bfloat16()
    extremes_kernel[(1,)](source, largest, smallest, ROWS=8, COLUMNS=32)
    assert torch.equal(largest, source.amax(1))
    assert torch.equal(smallest, source.amin(1))
    total = torch.zeros(1).bfloat16()
    sum_kernel[(1,)](source, total, BLOCK=256)
    assert total.item() == source.float().sum().bfloat16().item()


@pytest.mark.parametrize("dtype", [*NARROW, torch.float16, torch.float32])
def test_dot_of_small_integers_is_exact(dtype: torch.dtype) -> None:
    left, right = torch.randint(-4, 5, (16, 64)).to(dtype), torch.randint(-4, 5, (64, 16)).to(dtype)
    product = torch.zeros(16, 16)
    dot_kernel[(1,)](left, right, product, SIZE=16, DEPTH=64)
    assert torch.equal(product, left.float() @ right.float())


def test_bfloat16_dot_equals_torch() -> None:
    left, right = torch.randn(32, 64).bfloat16(), torch.randn(64, 32).bfloat16()
    product = torch.zeros(32, 32)
    dot_kernel[(1,)](left, right, product, SIZE=32, DEPTH=64)
    torch.testing.assert_close(product, left.float() @ right.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [32, 2048])  # summed in fp32, and in fp64
def test_integer_dot_is_exact(depth: int) -> None:
    left = torch.randint(-128, 128, (16, depth), dtype=torch.int8)
    right = torch.randint(-128, 128, (depth, 16), dtype=torch.int8)
    left[0], right[:, 0] = -128, -128  # the largest possible sum
    product = torch.zeros(16, 16, dtype=torch.int32)
    integer_dot_kernel[(1,)](left, right, product, SIZE=16, DEPTH=depth)
    assert torch.equal(product.long(), left.long() @ right.long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("keep", [False, True])
def test_reduce_with_a_function(dtype: torch.dtype, axis: int, keep: bool) -> None:
    source = (torch.randn(8, 16) * 100).to(dtype)
    target = torch.zeros(16 if axis == 0 else 8, dtype=dtype)
    reduce_kernel[(1,)](source, target, ROWS=8, COLUMNS=16, AXIS=axis, KEEP=keep)
    assert torch.equal(target, source.amax(axis))


def test_reduce_over_all_axes() -> None:
    source, target = torch.randn(8, 16), torch.zeros(1)
    reduce_all_kernel[(1,)](source, target, ROWS=8, COLUMNS=16)
    assert target[0] == source.max()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scan_with_a_function(dtype: torch.dtype, reverse: bool) -> None:
    source = torch.randn(4, 16).to(dtype)
    target = torch.zeros_like(source)
    scan_kernel[(1,)](source, target, ROWS=4, COLUMNS=16, REVERSE=reverse)
    expected = source.flip(1).cummax(1)[0].flip(1) if reverse else source.cummax(1)[0]
    assert torch.equal(target, expected)


def test_overflow_raises_on_request() -> None:
    left, right = (torch.tensor([value], dtype=torch.int32) for value in (70000, 40000))
    target = torch.zeros(1, dtype=torch.int32)
    multiply_kernel[(1,)](left, right, target)
    try:
        interpreter.install(sanitize_overflow=True)
        with pytest.raises(InterpreterError, match="int32 overflow detected"):
            multiply_kernel[(1,)](left, right, target)
    finally:
        interpreter.install()


def test_a_launch_leaves_the_language_as_it_was() -> None:
    before = {name: getattr(tl, name) for name in ("load", "range", "reduce", "static_assert")}
    test_reduce_with_a_function(torch.float32, 0, False)
    assert {name: getattr(tl, name) for name in before} == before


def test_an_unknown_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    with pytest.raises(RuntimeError, match=r"knows Triton 3\.9\.x, got 3\.10\.0"):
        interpreter.install()


def test_narrow_floats_round_trip() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = narrow_floats.bfloat16_to_float32(bits)
    number = ~np.isnan(values)
    assert np.array_equal(narrow_floats.float32_to_bfloat16(values)[number], bits[number])
