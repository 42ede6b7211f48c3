"""What a code stands for before its scale: whole numbers, or the entries of a table. Pure data.

    integer     code - zero (`lath.formats.codec`)
    nested      code - (levels - 1) / 2: the upper bits of a code are the nearest code of fewer bits
    ternary     code - 1, codes 0, 1, 2
    nf4         the 16 quantiles of a normal distribution of QLoRA (2305.14314), 0 among them
    fp4         E2M1 of the OCP microscaling formats: 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives
    e2m3, e3m2  6-bit floats of the same; e4m3, e5m2: 8-bit floats (E4M3 without infinities)
    learned     a table of the weight's own (`QTensor.table`)
    vectors     runs of the entries of a book (`lath.formats.vectors`)

Entries are exact in fp32. A code of a float is its bit pattern: sign, exponent, mantissa.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

Values = Literal[
    "integer", "nested", "ternary", "nf4", "fp4", "e2m3", "e3m2", "e4m3", "e5m2", "learned",
    "vectors",
]  # fmt: skip

# Of the published 16, each the fp32 number nearest to a quantile of N(0, 1) over the largest.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# Exponent bits, mantissa bits of the float formats.
FLOATS: dict[str, tuple[int, int]] = {
    "fp4": (2, 1), "e2m3": (2, 3), "e3m2": (3, 2), "e4m3": (4, 3), "e5m2": (5, 2),
}  # fmt: skip
BITS: dict[str, int] = {"ternary": 2, "nf4": 4} | {n: 1 + e + m for n, (e, m) in FLOATS.items()}
# Tables whose entries are whole numbers of a unit, which fit a byte: an int8 dot is exact.
UNITS: dict[str, float] = {"ternary": 1.0, "fp4": 0.5, "e2m3": 0.125}


@functools.cache
def table(values: Values) -> tuple[float, ...]:
    """The number of each code; NaN for codes that stand for none. ValueError for "integer",
    "learned" and "vectors", which have no table of their own."""
    if values == "ternary":
        return (-1.0, 0.0, 1.0, math.nan)
    if values == "nf4":
        return _NF4
    if values in FLOATS:
        exponent, mantissa = FLOATS[values]
        return tuple(_float(code, values, exponent, mantissa) for code in range(1 << BITS[values]))
    raise ValueError(f"values {values!r} have no table of their own")


def _float(code: int, name: str, exponent_bits: int, mantissa_bits: int) -> float:
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    last = (1 << exponent_bits) - 1
    if name == "e4m3" and exponent == last and mantissa == 7:
        return math.nan
    if name == "e5m2" and exponent == last:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)


@functools.cache
def largest(values: Values) -> float:
    """The largest finite entry of a table."""
    return max(entry for entry in table(values) if math.isfinite(entry))
