"""Exact conversions between fp32 and the float formats NumPy does not have.

Triton's interpreter keeps bf16 in uint16 arrays and fp8 in uint8 arrays. These functions turn such
storage into fp32 values and back, rounding to nearest even; fp8 saturates to the largest finite
value, as `cvt.rn.satfinite` does. NaN stays NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl

Array = npt.NDArray[Any]

_FP8 = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
_FP8_VALUES: dict[Any, Array] = {
    kind: torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    for kind, dtype in _FP8.items()
}
NARROW_FLOATS = frozenset(_FP8) | {tl.bfloat16}


def bfloat16_to_float32(bits: Array) -> Array:
    """uint16 bit patterns of any shape -> their fp32 values (exact)."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def float32_to_bfloat16(values: Array) -> Array:
    """fp32 values of any shape -> uint16 bit patterns, round to nearest even, NaN to 0x7FC0."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def decode(data: Array, kind: Any) -> Array:
    """Storage of Triton type `kind` -> fp32 values if `kind` is narrow, otherwise `data` itself."""
    if kind == tl.bfloat16:
        return bfloat16_to_float32(data)
    if kind in _FP8:
        return _FP8_VALUES[kind][data]
    return data


def encode(values: Any, kind: Any) -> Array:
    """fp32 values -> storage of the narrow Triton type `kind`, correctly rounded."""
    values = np.asarray(values)
    if kind == tl.bfloat16:
        return float32_to_bfloat16(values).reshape(values.shape)
    dtype = _FP8[kind]
    largest = torch.finfo(dtype).max
    # np.clip keeps NaN; infinities become the largest finite value.
    clipped = np.clip(np.ascontiguousarray(values, dtype=np.float32), -largest, largest)
    return torch.from_numpy(clipped).to(dtype).view(torch.uint8).numpy().reshape(values.shape)


def spoiling_value(data: Array, kind: Any) -> Any:
    """A value of Triton type `kind`, stored as in `data`, that spoils any result that uses it.

    NaN for float types, the bytes 0x5A5A...5A for integers and pointers.
    """
    if kind == tl.bfloat16:
        return np.uint16(0x7FC1).astype(data.dtype)
    if kind in _FP8:
        return np.uint8(0x80 if kind in (tl.float8e4b8, tl.float8e5b16) else 0x7F)
    if data.dtype.kind == "f":
        return np.array(np.nan, dtype=data.dtype)
    return np.array(0x5A5A5A5A5A5A5A5A).astype(data.dtype)
