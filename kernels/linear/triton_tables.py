"""Tile decoders of codes that stand for the entries of a table, and the E4M3 numbers of scales.

What comes out is the number D with entry = unit * D (`triton_decode.encoding`):

    8-, 6- and 4-bit floats  the bits of the code put where fp16, bf16 or fp32 has its own, times a
                             power of two that makes up for the other bias: exact, subnormals too
    fp4, e2m3 as int8        entry / unit, four at once in a word: exact
    nf4, learned             looked up in a table in memory (`table_for`): in a 16-bit dot the entry
                             rounded once to its type, a relative error of 2**-11 or 2**-8 at most

FORM of a float format: (exponent bits, mantissa bits, that power of two, what its last exponent
holds: 0 numbers alone, 1 NaN as its last code, 2 infinity and NaN).

fp16 reaches from 2**-24 to 65504. A learned table is therefore stored times a power of two that
brings its largest entry to 2**14 .. 2**15, and the scales are multiplied by the inverse.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lath.formats import values as value_tables
from lath.formats.codec import PlanesCodec
from lath.formats.qtensor import QTensor
from lath.formats.vectors import VectorCodec, VectorTensor
from lath.kernels.linear.plan_facts import LOOKED_UP
from lath.kernels.linear.triton_decode import (
    HALVES,
    QUARTERS,
    eight_words,
    halves,
    quarter_words,
    quarters,
)

# Exponent and mantissa bits of the types of a dot.
_TYPES = {"fp16": (5, 10), "bf16": (8, 7), "fp32": (8, 23)}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Up to this many bits the table holds every pair of entries: one load serves two columns.
_MOST_PAIRED_BITS = 4
# The exponent that the largest entry of a learned table is brought to (see above).
_LARGEST_EXPONENT = 15
# Which codes of a float format are no numbers; see FORM above.
_NO_NUMBERS = {"e4m3": 1, "e5m2": 2}

Form = tuple[float, ...] | float


@dataclass(frozen=True)
class Lookup:
    """entries: what a decoder looks codes up in. outer: the fp32 scale of scales that goes with
    them, or None where that of the weight itself does. nbytes: for `QTensor.view_nbytes`."""

    entries: Tensor
    outer: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.entries.nbytes + (0 if self.outer is None else self.outer.nbytes)


def form_of(codec: PlanesCodec, dot: str) -> Form:
    """FORM of the decoder of a codec with a table, for a dot in "fp16", "bf16", "fp32", "int8"."""
    if isinstance(codec, VectorCodec):
        return (codec.vector, codec.entries)
    if codec.values not in value_tables.FLOATS:
        return 0.0
    exponent, mantissa = value_tables.FLOATS[codec.values]
    if dot == "int8":
        return (exponent, mantissa)
    bias = (1 << (_TYPES[dot][0] - 1)) - (1 << (exponent - 1))
    return (exponent, mantissa, 2.0**bias, _NO_NUMBERS.get(codec.values, 0))


def is_looked_up(codec: PlanesCodec) -> bool:
    """Whether the entries of a codec are read from memory."""
    return codec.values in LOOKED_UP


def is_scaled(codec: PlanesCodec, dot: str) -> bool:
    """Whether its table is stored times a power of two, which an outer scale then undoes."""
    return codec.values == "learned" and dot in ("fp16", "bf16")


def table_for(weight: QTensor | VectorTensor, dot: str) -> Lookup | None:
    """What a decoder of `weight` looks up, made on first use and kept; None if it looks up none."""
    if isinstance(weight, VectorTensor):
        return Lookup(weight.books, None)
    if not is_looked_up(weight.codec):
        return None
    if weight.codec.values == "nf4":
        return Lookup(_fixed_table(dot, weight.device), None)
    if dot == "fp32":
        return Lookup(weight.entries(), None)
    return weight.view(f"triton table {dot}", lambda: _learned_table(weight, dot))


@functools.cache
def _fixed_table(dot: str, device: torch.device) -> Tensor:
    return _stored(torch.tensor(value_tables.table("nf4"), device=device), dot)


def _learned_table(weight: QTensor, dot: str) -> Lookup:
    entries = weight.entries()
    exponent = _LARGEST_EXPONENT - torch.frexp(entries.abs().max()).exponent
    factor = torch.exp2(exponent.double())  # fp32 may not hold it
    unit = (1 / factor).float().reshape(1)
    outer = unit if weight.outer is None else unit * weight.outer.float()
    return Lookup(_stored((entries.double() * factor).float(), dot), outer)


def _stored(entries: Tensor, dot: str) -> Tensor:
    """The entries in the type of the dot; every pair of them in an int32, where they are few."""
    rounded = entries.to(_DTYPES[dot])
    if dot == "fp32" or len(rounded) > 1 << _MOST_PAIRED_BITS:
        return rounded
    levels = len(rounded)
    first = rounded.repeat(levels)
    second = rounded.repeat_interleave(levels)
    return torch.stack([first, second], dim=1).view(torch.int32).reshape(-1)


@triton.jit
def _float_words(
    planes,
    rows,
    RUN: tl.constexpr,
    HALF: tl.constexpr,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    LANES: tl.constexpr,
    FORM: tl.constexpr,
    WIDTHS: tl.constexpr,
):
    """A run of floats in a type of EXPONENT and MANTISSA bits, but for the bias: uint32 [rows, 8].

    The bits of a code go to the top of the mantissa and the bottom of the exponent, its sign to the
    sign. Where the last exponent holds no numbers, that of the type is filled up: NaN or infinity.
    """
    TO: tl.constexpr = MANTISSA - FORM[1]
    SIGN: tl.constexpr = MANTISSA + FORM[0]
    codes = eight_words(planes, rows, RUN, HALF, TO, LANES, WIDTHS)
    if FORM[0] == EXPONENT:
        return codes
    else:
        words = codes & ((((1 << (FORM[0] + FORM[1])) - 1) << TO) * LANES)
        if FORM[3] != 0:
            ONE: tl.constexpr = TO if FORM[3] == 1 else MANTISSA
            over = (words + (LANES << ONE)) & (LANES << SIGN)
            words |= over * ((1 << (EXPONENT - FORM[0])) - 1)
        return words | ((codes << (EXPONENT - FORM[0])) & (LANES << (EXPONENT + MANTISSA)))


@triton.jit
def float_fp16(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block of small floats: fp16 [rows, 16]."""
    words = _float_words(planes, rows, RUN, 0, 5, 10, HALVES, FORM, WIDTHS)
    numbers = halves(words).to(tl.float16, bitcast=True)
    if FORM[2] != 1:
        numbers = numbers * tl.full((1, 1), FORM[2], tl.float16)
    return numbers


@triton.jit
def float_bf16(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block of small floats: bf16 [rows, 16]."""
    words = _float_words(planes, rows, RUN, 0, 8, 7, HALVES, FORM, WIDTHS)
    return halves(words).to(tl.bfloat16, bitcast=True) * tl.full((1, 1), FORM[2], tl.bfloat16)


@triton.jit
def float_fp32(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block of small floats: fp32 [rows, 16]."""
    low = _float_words(planes, rows, RUN, 0, 8, 23, 1, FORM, WIDTHS)
    high = _float_words(planes, rows, RUN, 1, 8, 23, 1, FORM, WIDTHS)
    both = tl.reshape(tl.join(low, high), (low.shape[0], 16))
    return both.to(tl.float32, bitcast=True) * FORM[2]


@triton.jit
def float_int8(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (32 columns) of E2M1 or E2M3 in its unit: int8 [rows, 32], as `decode_int8`.

    With c the code without sign, t = c mod 2**(m+1) and u = c mod 2**m, the number is c below
    2**(m+1), c + t below 3 * 2**m, c + t + 2u above. Each byte of a word stays below 256.
    """
    codes = quarter_words(planes, rows, RUN, WIDTHS)
    M: tl.constexpr = FORM[1]
    LARGEST: tl.constexpr = (1 << (2 + M)) - 1
    size = codes & (LARGEST * QUARTERS)
    upper = size & (((size >> (M + 1)) & QUARTERS) * ((2 << M) - 1))
    last = upper & (((upper >> M) & QUARTERS) * ((1 << M) - 1))
    number = size + upper + (last << 1)
    # -0 counts as 0: ~0 + 1 would carry into the next byte.
    negative = ((codes & (size + LARGEST * QUARTERS)) >> (M + 2)) & QUARTERS
    return quarters((number ^ (negative * 255)) + negative)


@triton.jit
def _look_up(planes, codes, WIDTHS: tl.constexpr):
    """Entries of the two codes in each word of `codes`: uint16 [rows, 16]."""
    BITS: tl.constexpr = WIDTHS[0] + WIDTHS[1] + WIDTHS[2]
    if BITS <= 4:
        pair = (codes | (codes >> (16 - BITS))) & ((1 << (2 * BITS)) - 1)
        return halves(tl.load(planes[3] + pair).to(tl.uint32, bitcast=True))
    else:
        low = tl.load(planes[3] + (codes & 0xFFFF))
        high = tl.load(planes[3] + (codes >> 16))
        both = tl.reshape(tl.join(low, high), (low.shape[0], 16))
        return both.to(tl.uint16, bitcast=True)


@triton.jit
def table_fp16(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block: the fp16 entries [rows, 16] of its codes."""
    codes = eight_words(planes, rows, RUN, 0, 0, HALVES, WIDTHS)
    return _look_up(planes, codes, WIDTHS).to(tl.float16, bitcast=True)


@triton.jit
def table_bf16(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block: the bf16 entries [rows, 16] of its codes."""
    codes = eight_words(planes, rows, RUN, 0, 0, HALVES, WIDTHS)
    return _look_up(planes, codes, WIDTHS).to(tl.bfloat16, bitcast=True)


@triton.jit
def table_fp32(planes, rows, RUN: tl.constexpr, FORM: tl.constexpr, WIDTHS: tl.constexpr):
    """Run RUN (16 columns) of a block: the fp32 entries [rows, 16] of its codes."""
    low = tl.load(planes[3] + eight_words(planes, rows, RUN, 0, 0, 1, WIDTHS))
    high = tl.load(planes[3] + eight_words(planes, rows, RUN, 1, 0, 1, WIDTHS))
    return tl.reshape(tl.join(low, high), (low.shape[0], 16))


@triton.jit
def e4m3_to_fp32(byte):
    """The numbers of E4M3 bytes, fp32: by their bits, as not every target has the type."""
    code = byte.to(tl.uint32)
    size = (code & 127) << 20
    size |= ((size + (1 << 20)) & (1 << 27)) * 15  # 127 is NaN
    return (size | ((code & 128) << 24)).to(tl.float32, bitcast=True) * 2.0**120
