"""Codes of fewer bits inside codes of more, in NumPy (MatQuant, 2502.06786).

    slice_codes     clamp(round(q / 2**(b - r)), 0, 2**r - 1), half up: what b-bit codes q become in
                    r bits, where they stand for scale * (q - zero) with a whole zero
    upper_bits      q >> (b - r): the same of "nested" codes, which stand for scale * (q - (2**b -
                    1) / 2)

In both the number is then 2**(b - r) * scale times an r-bit one. Rounding to multiples of 2**(b-r)
needs a clamp (q >= 248 would become 16 in 4 bits) and the bit below the cut, so that no r bits of q
hold the answer: 24 of 256 codes share the last 4-bit code and 8 the first, where 4 more bits can
tell 16 apart. Half a step aside every cut is at a multiple of 2**(b - r): the upper bits are the
nearest code, for every r at once, and what a view reads is what it needs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]


def slice_codes(codes: Codes, bits: int, fewer: int) -> Codes:
    """uint8 codes of `bits` bits -> those of `fewer` bits, by rounding."""
    half_up = np.floor(codes.astype(np.float64) / 2.0 ** (bits - fewer) + 0.5)
    return np.clip(half_up, 0, 2**fewer - 1).astype(np.uint8)


def upper_bits(codes: Codes, bits: int, fewer: int) -> Codes:
    """uint8 codes of `bits` bits -> their `fewer` upper bits."""
    return (codes // np.uint8(2 ** (bits - fewer))).astype(np.uint8)
