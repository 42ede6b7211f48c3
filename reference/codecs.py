"""The definition of every codec, in NumPy: quantise, place a code in a word, read it back.

Written element by element from the formulas of DESIGN.md, section 2; the fast torch code in
`lath.formats.packing` and `lath.kernels.quantize` must agree with it bit for bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lath.formats.codec import Codec

PANEL, BLOCK = 16, 128
SCALE_DTYPES = {"fp16": np.float16, "fp32": np.float32}
# The smallest scales that are stored: fp16 keeps subnormals everywhere, fp32 ones may be flushed.
SMALLEST_SCALE = {"fp16": np.float32(2.0**-24), "fp32": np.float32(2.0**-126)}
# Fractions of the full range that `search` tries; 1 first, so that a tie keeps the widest range.
SEARCH_RATIOS = [(64 - i) / 64 for i in range(33)]

Codes = NDArray[np.uint8]
Side = NDArray[np.float16] | NDArray[np.float32] | NDArray[np.uint8]
Floats = NDArray[np.float32]


def quantize(weight: Floats, codec: Codec, search: bool = False) -> tuple[Codes, Side, Side | None]:
    """Round-to-nearest quantisation of a weight [N, K] fp32.

    Returns codes uint8 [N, K], scales [G, N] and zeros [G, N] (uint8 zero points, or minima in the
    scale's dtype) or None. With L = 2**bits levels, for each (row, group), all in fp32:

        none      scale = max|w| / (L/2 - 1/2)     code = rint(w / scale) + L/2
        integer   scale = (hi - lo) / (L - 1)      zero = rint(-lo / scale),
                  lo = min(w, 0), hi = max(w, 0)   code = rint(w / scale) + zero
        float     scale = (hi - lo) / (L - 1)      minimum = lo,
                  lo = min(w), hi = max(w)         code = rint((w - minimum) / scale)
        one bit, none: scale = 2 * mean|w|, code = (w >= 0): the least-squares scale of a sign

    Codes are clipped to 0..L-1; scale and minimum are rounded to their stored dtype before the
    codes are computed; rint rounds half to even. A group that is all zero has scale 1, zero 0 and
    the codes of 0 (one bit, none: scale 0). L/2 - 1/2 puts ±max|w| half a step outside the outer
    codes, so that |error| <= scale/2 everywhere, clipping included (up to the scale's rounding).

    search: try the range shrunk to 64/64, 63/64, ... 32/64 (around 0; around the middle for
    "float") and keep, per group, the first with the least sum of squared errors (float64).

    Raises ValueError if the weight has NaN or infinity, or a scale or minimum overflows its dtype.
    """
    if not np.isfinite(weight).all():
        raise ValueError("weight must be finite: it has NaN or infinity")
    rows, columns = weight.shape
    size, groups = codec.group_size(columns), codec.num_groups(columns)
    dtype = SCALE_DTYPES[codec.scale_dtype]
    codes = np.zeros((rows, columns), np.uint8)
    scales = np.zeros((groups, rows), dtype)
    zeros = np.zeros((groups, rows), np.uint8 if codec.zero == "integer" else dtype)
    for g in range(groups):
        block = weight[:, g * size : (g + 1) * size].astype(np.float32)
        best_loss = np.full(rows, np.inf)
        for ratio in SEARCH_RATIOS if search else SEARCH_RATIOS[:1]:
            q, s, z = _quantize_group(block, codec, np.float32(ratio))
            error = _decode(q, s[:, None], z[:, None], codec) - block
            loss = (error**2).sum(axis=1)
            better = loss < best_loss
            best_loss = np.where(better, loss, best_loss)
            codes[:, g * size : (g + 1) * size][better] = q[better]
            scales[g, better], zeros[g, better] = s[better], z[better]
    return codes, scales, None if codec.zero == "none" else zeros


def _quantize_group(block: Floats, codec: Codec, ratio: np.float32) -> tuple[Codes, Side, Side]:
    """One group [N, g] at one fraction of its range → codes [N, g], scales [N], zeros [N]."""
    top = codec.levels - 1
    no_zeros = np.zeros(len(block), np.float32)
    if codec.zero == "none" and codec.bits == 1:
        mean = np.abs(block.astype(np.float64)).mean(axis=1)
        return (block >= 0).astype(np.uint8), _store((2 * mean).astype(np.float32), codec), no_zeros
    if codec.zero == "none":
        absmax = np.abs(block).max(axis=1) * ratio
        scale = _scale(absmax / np.float32(codec.levels / 2 - 0.5), codec)
        code = np.rint(block / scale[:, None].astype(np.float32)) + np.float32(codec.zero_code)
        return np.clip(code, 0, top).astype(np.uint8), scale, no_zeros
    low, high = block.min(axis=1), block.max(axis=1)
    if codec.zero == "integer":
        low, high = np.minimum(low, 0) * ratio, np.maximum(high, 0) * ratio
        scale = _scale((high - low) / np.float32(top), codec)
        zero = np.clip(np.rint(-low / scale.astype(np.float32)), 0, top)
        code = np.rint(block / scale[:, None].astype(np.float32)) + zero[:, None]
        return np.clip(code, 0, top).astype(np.uint8), scale, zero.astype(np.uint8)
    shrink = (high - low) * ((1 - ratio) / 2)
    scale = _scale(((high - shrink) - (low + shrink)) / np.float32(top), codec)
    minimum = _store(low + shrink, codec)
    offset = block - minimum[:, None].astype(np.float32)
    code = np.rint(offset / scale[:, None].astype(np.float32))
    return np.clip(code, 0, top).astype(np.uint8), scale, minimum


def _scale(exact: Floats, codec: Codec) -> Side:
    """A positive scale in its stored dtype; 1 where the group has no range."""
    floor = SMALLEST_SCALE[codec.scale_dtype]
    return _store(np.where(exact == 0, np.float32(1), np.maximum(exact, floor)), codec)


def _store(exact: Floats, codec: Codec) -> Side:
    with np.errstate(over="ignore"):
        stored: Side = exact.astype(SCALE_DTYPES[codec.scale_dtype])
    if not np.isfinite(stored).all():
        raise ValueError(
            f"weight is too large for {codec}: a scale or minimum of {np.abs(exact).max():.3g} "
            f"overflows {codec.scale_dtype}; use '-s32' or scale the weight"
        )
    return stored


def _decode(codes: Codes, scales: Side, zeros: Side | None, codec: Codec) -> NDArray[np.float64]:
    """Codes and broadcastable scales and zeros → float64 values."""
    code, scale = codes.astype(np.float64), scales.astype(np.float64)
    if zeros is None or codec.zero == "none":
        return (code - codec.zero_code) * scale
    if codec.zero == "integer":
        return (code - zeros.astype(np.float64)) * scale
    return code * scale + zeros.astype(np.float64)


def dequantize(codes: Codes, scales: Side, zeros: Side | None, codec: Codec) -> NDArray[np.float64]:
    """codes [N, K], scales and zeros [G, N] → weight [N, K] float64, exact."""
    group = np.arange(codes.shape[1]) // codec.group_size(codes.shape[1])
    return _decode(codes, scales.T[:, group], None if zeros is None else zeros.T[:, group], codec)


def place(n: int, k: int, width: int, columns: int) -> tuple[int, int]:
    """Word index in the flat plane of `width` bits, and bit in the word, of weight (n, k)."""
    blocks = -(-columns // BLOCK)
    q = k % BLOCK
    h, s = q & 1, (q >> 4) & 1
    u = 8 * (q >> 5) + ((q >> 1) & 7)
    word = (((n // PANEL) * blocks + k // BLOCK) * PANEL + n % PANEL) * 4 * width + u % (4 * width)
    return word, 16 * h + 8 * s + width * (u // (4 * width))


def pack(codes: Codes, codec: Codec) -> NDArray[np.uint32]:
    """uint8 codes [N, K] → uint32 1-D, the planes one after another, one code at a time."""
    rows, columns = codes.shape
    planes, low = [], 0
    for width in codec.plane_widths:
        words = np.zeros(-(-rows // PANEL) * -(-columns // BLOCK) * PANEL * 4 * width, np.uint32)
        for n in range(rows):
            for k in range(columns):
                word, bit = place(n, k, width, columns)
                field = (int(codes[n, k]) >> low) & ((1 << width) - 1)
                words[word] |= np.uint32(field << bit)
        planes.append(words)
        low += width
    return np.concatenate(planes)
