"""Scales as a codec stores them, in NumPy: fp16, fp32, or 8 bits below a second scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lath.formats import values as value_tables
from lath.formats.codec import Codec
from lath.reference import floats

SCALE_DTYPES = {"fp16": np.float16, "fp32": np.float32}
# The smallest scales that are stored: fp16 keeps subnormals everywhere, fp32 ones may be flushed.
SMALLEST_SCALE = {"fp16": np.float32(2.0**-24), "fp32": np.float32(2.0**-126)}

Side = NDArray[np.float16] | NDArray[np.float32] | NDArray[np.uint8]
Floats = NDArray[np.float32]


def store_scales(exact: Floats, codec: Codec) -> tuple[Side, Side | None]:
    """Exact scales [G, N] → stored scales and the outer ones.

        e8m0   byte = clip(e, -127, 127) + 127, 2**e the largest power of two not above scale * (the
               mantissa of the table's largest entry): the OCP rule, floor(log2 amax) - emax
        e4m3   outer = max scale / 448, byte = E4M3(scale / outer), not below its smallest
        int8   outer = fp16(max scale of the row / cap), byte = clip(rint(scale / outer), 1, cap),
               cap = `codec.largest_inner_scale`
        fp8    outer = fp32(max scale of the row / cap), byte = E4M3(scale / outer), not below its
               smallest

    Scales 0 (groups of zeros) are stored as 1, or as the smallest byte below an outer scale.
    """
    kind = codec.scale_dtype
    if kind in SCALE_DTYPES:
        return scale_in_dtype(exact, codec), None
    if kind == "e8m0":
        mantissa = np.float32(np.frexp(np.float32(value_tables.largest(codec.values)))[0] * 2)
        with np.errstate(divide="ignore"):
            exponent = np.frexp(np.where(exact == 0, np.float32(1), exact) * mantissa)[1] - 1
        exponent = np.where(exact == 0, 0, exponent)
        return (np.clip(exponent, -127, 127) + 127).astype(np.uint8), None
    if kind == "e4m3":
        most = exact.max(initial=0)
        outer = np.float32(most / np.float32(448)) if most > 0 else np.float32(1)
        outer = np.maximum(outer, SMALLEST_SCALE["fp32"])
        inner = np.maximum(floats.round_e4m3(exact / outer), 2.0**-9)
        return floats.encode_e4m3(inner), np.array([outer], np.float32)
    most = exact.max(axis=0, initial=0)
    if kind == "fp8":
        row = scale_in_dtype(
            most / np.float32(codec.largest_inner_scale), Codec(8, scale_dtype="fp32")
        )
        inner = np.clip(floats.round_e4m3(exact / row), 2.0**-9, codec.largest_inner_scale)
        return floats.encode_e4m3(inner), row
    wide = most / np.float32(codec.largest_inner_scale)
    row = scale_in_dtype(wide, Codec(8))
    byte = np.rint(exact / row.astype(np.float32))
    return np.clip(byte, 1, codec.largest_inner_scale).astype(np.uint8), row


def effective_scales(scales: Side, outer: Side | None, codec: Codec) -> NDArray[np.float64]:
    """What codes are multiplied by, [G, N]: exact, but one fp32 product below an outer scale
    ("fp8": before the products are rounded)."""
    if codec.scale_dtype == "e8m0":
        power: NDArray[np.float64] = np.ldexp(1.0, scales.astype(np.int64) - 127)
        return power
    if outer is None:
        exact: NDArray[np.float64] = scales.astype(np.float64)
        return exact
    inner = scales.astype(np.float32)
    if codec.scale_dtype in ("e4m3", "fp8"):
        inner = floats.decode_e4m3(scales.astype(np.uint8)).astype(np.float32)
    product: NDArray[np.float64] = (inner * outer.astype(np.float32)).astype(np.float64)
    return product


def scale_in_dtype(exact: Floats, codec: Codec) -> Side:
    """A positive scale in its stored dtype; 1 where the group has no range."""
    floor = SMALLEST_SCALE[codec.scale_dtype]
    return in_dtype(np.where(exact == 0, np.float32(1), np.maximum(exact, floor)), codec)


def in_dtype(exact: Floats, codec: Codec) -> Side:
    with np.errstate(over="ignore"):
        stored: Side = exact.astype(SCALE_DTYPES[codec.scale_dtype])
    if not np.isfinite(stored).all():
        raise ValueError(
            f"weight is too large for {codec}: a scale or minimum of {np.abs(exact).max():.3g} "
            f"overflows {codec.scale_dtype}; use '-s32' or scale the weight"
        )
    return stored
