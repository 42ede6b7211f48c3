"""Tile decoders of vector codebooks: a gather of entries from memory, where caches hold the books.

A run of 16 columns is 16 / v indices, which lie in natural order in the words of a row
(`lath.formats.vectors`), and as many entries of v numbers. Books are fp16, one behind the other;
with a residual one the two entries are added in fp32 and rounded once to the type of the dot.

FORM: (v, entries of the first book).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _entries(
    plane,
    book,
    rows,
    RUN: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The entries of a run in one book: fp16 [rows, 16]. WIDTH: bits per weight of its plane."""
    COUNT: tl.constexpr = 16 // VECTOR
    BITS: tl.constexpr = VECTOR * WIDTH
    WORDS: tl.constexpr = max(WIDTH // 2, 1)
    if COUNT // WORDS >= 4:
        # Indices that share a word are cut out of one load of it. A load for each would be copied
        # ahead for each, and the copies of a word take instructions and shared memory.
        FIRST: tl.constexpr = 16 * WIDTH * RUN
        at = FIRST // 32 + tl.arange(0, WORDS)
        bit = FIRST % 32 + tl.arange(0, COUNT // WORDS) * BITS
        words = tl.load(plane + rows[:, None] * (4 * WIDTH) + at[None, :])
        fields = words.to(tl.uint32, bitcast=True)[:, :, None] >> bit[None, None, :]
        index = tl.reshape(fields & ((1 << BITS) - 1), (rows.shape[0], COUNT))
    else:
        bit = (RUN * COUNT + tl.arange(0, COUNT)) * BITS
        words = tl.load(plane + rows[:, None] * (4 * WIDTH) + (bit // 32)[None, :])
        index = (words.to(tl.uint32, bitcast=True) >> (bit % 32)[None, :]) & ((1 << BITS) - 1)
    offsets = (index * VECTOR)[:, :, None] + tl.arange(0, VECTOR)[None, None, :]
    return tl.reshape(tl.load(book + offsets), (rows.shape[0], 16))


@triton.jit
def _numbers(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """A run of 16 columns: fp16 [rows, 16] of one book, the sum in fp32 of two."""
    first = _entries(planes[0], planes[3], rows, RUN, FORM[0], WIDTHS[0])
    if WIDTHS[1] == 0:
        return first
    else:
        residual = planes[3] + FORM[0] * FORM[1]
        second = _entries(planes[1], residual, rows, RUN, FORM[0], WIDTHS[1])
        return first.to(tl.float32) + second.to(tl.float32)


@triton.jit
def vectors_fp16(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block: fp16 [rows, 16]."""
    return _numbers(planes, rows, RUN, FORM, WIDTHS).to(tl.float16)


@triton.jit
def vectors_bf16(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block: bf16 [rows, 16]."""
    return _numbers(planes, rows, RUN, FORM, WIDTHS).to(tl.bfloat16)


@triton.jit
def vectors_fp32(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block: fp32 [rows, 16]."""
    return _numbers(planes, rows, RUN, FORM, WIDTHS).to(tl.float32)
