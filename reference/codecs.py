"""The definition of every codec, in NumPy: quantise, place a code in a word, read it back.

Written element by element from the formulas of DESIGN.md, section 2; the fast torch code in
`lath.formats.packing` and `lath.kernels.quantize` must agree with it bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lath.formats import values as value_tables
from lath.formats.codec import Codec
from lath.reference import floats, ternary
from lath.reference.scales import (
    SCALE_DTYPES,
    Floats,
    Side,
    effective_scales,
    in_dtype,
    scale_in_dtype,
    store_scales,
)

PANEL, BLOCK = 16, 128
# Fractions of the full range that `search` tries; 1 first, so that a tie keeps the widest range.
SEARCH_RATIOS = [(64 - i) / 64 for i in range(33)]
# A power of two cannot be shrunk to a fraction: the one below and the one above.
POWER_RATIOS = [1.0, 2.0, 0.5]
# What `search` multiplies the scale of a row by, below which those of its groups are 8-bit whole
# numbers, and how far from the nearest one it takes those: what stands without it first.
ROW_RATIOS = [1.0, *(i / 16 for i in range(12, 25) if i != 16)]
INNER_STEPS = [0, -1, 1]
LLOYD_ROUNDS = 200  # of the k-means that finds a learned table

Codes = NDArray[np.uint8]


class Quantised(NamedTuple):
    """What `lath.formats.qtensor.QTensor` holds, without padding: codes [N, K], scales and zeros
    [G, N], outer [N] or [1], table [levels]."""

    codes: Codes
    scales: Side
    zeros: Side | None = None
    outer: Side | None = None
    table: Floats | None = None


def quantize(
    weight: Floats, codec: Codec, search: bool = False, table: Floats | None = None
) -> Quantised:
    """Round-to-nearest quantisation of a weight [N, K] fp32.

    With L = 2**bits levels, for each (row, group), all in fp32:

        none      scale = max|w| / (L/2 - 1/2)     code = rint(w / scale) + L/2
        integer   scale = (hi - lo) / (L - 1)      zero = rint(-lo / scale),
                  lo = min(w, 0), hi = max(w, 0)   code = rint(w / scale) + zero
        float     scale = (hi - lo) / (L - 1)      minimum = lo,
                  lo = min(w), hi = max(w)         code = rint((w - minimum) / scale)
        one bit, none: scale = 2 * mean|w|, code = (w >= 0): the least-squares scale of a sign
        nested    scale = max|w| / (L/2)           code = floor(w / scale) + L/2
        ternary   scale = mean|w| (of the tensor without groups: BitNet b1.58, 2402.17764)
                                                   code = clip(rint(w / scale), -1, 1) + 1
        a table   scale = max|w| / its largest     code = that of the nearest entry to w / scale

    Codes are clipped to 0..L-1; scale and minimum are rounded to their stored dtype before the
    codes are computed; rint rounds half to even, and of two nearest entries of a table the one with
    the even code is taken. A group that is all zero has scale 1, zero 0 and the codes of 0 (one
    bit, none, and nested: scale 0). L/2 - 1/2 puts ±max|w| half a step outside the outer codes, so
    that |error| <= scale/2 everywhere, clipping included (up to the scale's rounding).

    Scales of 8 bits: see `lath.reference.scales`. table: the entries of a learned codec, ascending;
    None: found by `learn_table`.

    search: try the range shrunk to 64/64, 63/64, ... 32/64 (around 0; around the middle for
    "float"; powers of two: itself, twice, half of it) and keep, per group, the first with the least
    sum of squared errors (float64), below an outer scale with scales before they are stored; of
    integers with int8 scales in groups, then `search_rows`.

    Raises ValueError if the weight has NaN or infinity, or a scale or minimum overflows its dtype.
    """
    if not np.isfinite(weight).all():
        raise ValueError("weight must be finite: it has NaN or infinity")
    if codec.values != "integer" or codec.scale_dtype not in SCALE_DTYPES:
        return _quantize_in_steps(weight, codec, search, table)
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
    return Quantised(codes, scales, None if codec.zero == "none" else zeros)


def _quantize_in_steps(
    weight: Floats, codec: Codec, search: bool, table: Floats | None
) -> Quantised:
    """Exact scales of all groups, then the scales that are stored, then codes."""
    rows, columns = weight.shape
    size, groups = codec.group_size(columns), codec.num_groups(columns)
    if codec.values == "learned" and table is None:
        table = learn_table(weight, codec)
    entries = entries_of(codec, table)
    exact = np.zeros((groups, rows), np.float32)
    for g in range(groups):
        block = weight[:, g * size : (g + 1) * size].astype(np.float32)
        best_loss = np.full(rows, np.inf)
        ratios = POWER_RATIOS if codec.scale_dtype == "e8m0" else SEARCH_RATIOS
        for ratio in ratios if search else ratios[:1]:
            scale = exact_scale(block, codec, entries) * np.float32(ratio)
            safe = np.where(scale == 0, np.float32(1), scale)
            if codec.scale_dtype in ("fp16", "fp32", "e8m0"):
                stored, _ = store_scales(scale[None], codec)
                safe = effective_scales(stored, None, codec)[0].astype(np.float32)
            q, z = nearest(block, safe, codec, entries)
            error = _decode(q, safe[:, None], z[:, None], codec, entries) - block
            loss = (error**2).sum(axis=1)
            better = loss < best_loss
            best_loss = np.where(better, loss, best_loss)
            exact[g, better] = scale[better]
    if codec.values == "ternary" and codec.group is None:
        exact[:] = np.float32(np.abs(weight.astype(np.float64)).mean()) if weight.size else 0
    scales, outer = store_scales(exact, codec)
    if search and codec.has_row_search and outer is not None:
        scales, outer = search_rows(weight, codec, exact, outer)
    effective = effective_scales(scales, outer, codec).astype(np.float32)
    codes = np.zeros((rows, columns), np.uint8)
    zeros = np.zeros((groups, rows), np.uint8)
    for g in range(groups):
        block = weight[:, g * size : (g + 1) * size].astype(np.float32)
        q, z = nearest(block, effective[g], codec, entries)
        codes[:, g * size : (g + 1) * size], zeros[g] = q, z
    if codec.values == "nested":
        scales[exact == 0] = 0
    kept = zeros if codec.zero == "integer" else None
    learned = entries if codec.values == "learned" else None
    return Quantised(codes, scales, kept, outer, learned)


def search_rows(weight: Floats, codec: Codec, exact: Floats, outer: Side) -> tuple[Side, Side]:
    """The second phase of DGQ (2310.04836): the scale of a row and the int8 scales of its groups
    together, by the squared error of the row (float64). exact [G, N]: what the first phase found.

    Each of ROW_RATIOS times the row's scale is stored as fp16; below it each group takes of the
    integer nearest to exact / row and its two neighbours, 1 to `codec.largest_inner_scale` (so that
    |scale * (code - zero)| <= 127), that of the least error. Of equal errors the first is kept,
    and what `store_scales` gives comes first: the error of no row grows.
    """
    groups, rows = exact.shape
    size, entries = codec.group_size(weight.shape[1]), entries_of(codec)
    best_loss, best_row = np.full(rows, np.inf), outer.copy()
    best = np.zeros((groups, rows), np.uint8)
    for ratio in ROW_RATIOS:
        wide = np.clip(outer.astype(np.float32) * np.float32(ratio), 2.0**-24, 65504)
        row = wide.astype(np.float16)
        losses = np.full((groups, rows), np.inf)
        inner = np.zeros((groups, rows), np.uint8)
        for step in INNER_STEPS:
            near = np.rint(exact / row.astype(np.float32)) + step
            byte = np.clip(near, 1, codec.largest_inner_scale).astype(np.uint8)
            scale = effective_scales(byte, row, codec).astype(np.float32)
            for g in range(groups):
                block = weight[:, g * size : (g + 1) * size].astype(np.float32)
                q, z = nearest(block, scale[g], codec, entries)
                error = _decode(q, scale[g][:, None], z[:, None], codec, entries) - block
                loss = (error**2).sum(axis=1)
                better = loss < losses[g]
                losses[g, better], inner[g, better] = loss[better], byte[g, better]
        better = losses.sum(axis=0) < best_loss
        best_loss = np.where(better, losses.sum(axis=0), best_loss)
        best_row[better], best[:, better] = row[better], inner[:, better]
    return best, best_row


def entries_of(codec: Codec, table: Floats | None = None) -> Floats:
    """The number of each code, fp32 [levels]; empty where codes are whole numbers."""
    if not codec.is_table:
        return np.zeros(0, np.float32)
    if codec.values != "learned":
        return np.array(value_tables.table(codec.values), np.float32)
    if table is None or table.shape != (codec.levels,) or not np.isfinite(table).all():
        raise ValueError(f"table of {codec} must be {codec.levels} finite numbers")
    if (np.diff(table) < 0).any() or not table.any():
        raise ValueError(f"table of {codec} must ascend and hold a number that is not 0")
    return table.astype(np.float32)


def exact_scale(block: Floats, codec: Codec, entries: Floats) -> Floats:
    """The scale [N] of a group [N, g] before it is stored; 0 for a group of zeros."""
    amax: Floats = np.abs(block).max(axis=1)
    steps = np.float32(codec.levels / 2 - 0.5)
    if codec.values == "ternary":
        amax, steps = np.abs(block.astype(np.float64)).mean(axis=1), np.float32(1)
    elif codec.values == "nested":
        steps = np.float32(codec.levels // 2)
    elif codec.is_table:
        steps = np.float32(np.abs(entries[np.isfinite(entries)]).max())
    elif codec.zero == "integer":
        amax = np.maximum(block.max(axis=1), 0) - np.minimum(block.min(axis=1), 0)
        steps = np.float32(codec.levels - 1)
    scale: Floats = amax.astype(np.float32) / steps
    return scale


def nearest(
    block: Floats, scale: Floats, codec: Codec, entries: Floats
) -> tuple[Codes, NDArray[np.uint8]]:
    """Codes [N, g] and zero points [N] of a group for scales [N] > 0."""
    scaled = block / scale[:, None]
    zero = np.zeros(len(block), np.uint8)
    if codec.is_table:
        return nearest_entry(scaled, entries), zero
    top = codec.levels - 1
    if codec.values == "nested":
        code = np.floor(scaled) + np.float32(codec.levels // 2)
        return np.clip(code, 0, top).astype(np.uint8), zero
    if codec.zero == "integer":
        low = np.minimum(block.min(axis=1), 0)
        zero = np.clip(np.rint(-low / scale), 0, top).astype(np.uint8)
    offset = zero[:, None] if codec.zero == "integer" else np.float32(codec.zero_code)
    return np.clip(np.rint(scaled) + offset, 0, top).astype(np.uint8), zero


def nearest_entry(x: Floats, entries: Floats) -> Codes:
    """The code of the finite entry nearest to each x; of two that are as near, the even code."""
    codes = np.flatnonzero(np.isfinite(entries))
    distance = np.abs(x[..., None].astype(np.float64) - entries[codes])
    # Of equal numbers (0 and -0 of a float) and of two as near: the even code, then the lower.
    order = np.lexsort((codes, codes % 2))
    best = order[distance[..., order].argmin(axis=-1)]
    nearest_codes: Codes = codes[best].astype(np.uint8)
    return nearest_codes


def learn_table(
    weight: Floats, codec: Codec, importance: NDArray[np.float64] | None = None
) -> Floats:
    """The table of a learned codec: k-means of w / max|w| of each group, each value with the weight
    max|w|², float64, fp32 [levels]. importance: float64 [K], not negative, times that weight: the
    mean square of each input, so that the error of the output counts and not that of the weight.
    The outermost entry is then held at ±1, where scales put the largest number of each group:
    unimportant large numbers would let it sink, and with it the unit of all the others.

    Begins at the quantiles (i + ½) / levels, LLOYD_ROUNDS rounds; a value half way goes to the
    lower entry, an entry that nothing is near stays. Then the entry nearest to 0 becomes 0.
    """
    size = codec.group_size(weight.shape[1])
    parts, weights = [np.zeros(0)], [np.zeros(0)]
    for g in range(codec.num_groups(weight.shape[1])):
        block = weight[:, g * size : (g + 1) * size].astype(np.float64)
        amax = np.abs(block).max(axis=1, keepdims=True)
        parts.append((block / np.where(amax == 0, 1, amax)).ravel())
        own = np.broadcast_to(amax**2, block.shape)
        if importance is not None:
            own = own * importance[g * size : (g + 1) * size]
        weights.append(own.ravel())
    order = np.argsort(np.concatenate(parts), kind="stable")
    values = np.concatenate(parts)[order]
    own = np.concatenate(weights)[order]
    if not own.any():
        raise ValueError(
            f"weight of {codec} must hold a number that is not 0: its table is learned"
        )
    mass, sums = (np.concatenate([[0], np.cumsum(x)]) for x in (own, own * values))
    places = (np.arange(codec.levels) + 0.5) / codec.levels
    centres = values[np.minimum((places * len(values)).astype(int), len(values) - 1)]
    for _ in range(LLOYD_ROUNDS):
        edges = (centres[1:] + centres[:-1]) / 2
        ends = np.concatenate([[0], np.searchsorted(values, edges, side="right"), [len(values)]])
        held = np.diff(mass[ends])
        moved = np.diff(sums[ends]) / np.where(held > 0, held, 1)
        centres = np.where(held > 0, moved, centres)
        if importance is not None:
            outermost = np.abs(centres).argmax()
            centres[outermost] = np.sign(centres[outermost])
    centres[np.abs(centres).argmin()] = 0
    return np.sort(centres).astype(np.float32)


def _quantize_group(block: Floats, codec: Codec, ratio: np.float32) -> tuple[Codes, Side, Side]:
    """One group [N, g] at one fraction of its range → codes [N, g], scales [N], zeros [N]."""
    top = codec.levels - 1
    no_zeros = np.zeros(len(block), np.float32)
    if codec.zero == "none" and codec.bits == 1:
        mean = np.abs(block.astype(np.float64)).mean(axis=1)
        return (
            (block >= 0).astype(np.uint8),
            in_dtype((2 * mean).astype(np.float32), codec),
            no_zeros,
        )
    if codec.zero == "none":
        absmax = np.abs(block).max(axis=1) * ratio
        scale = scale_in_dtype(absmax / np.float32(codec.levels / 2 - 0.5), codec)
        code = np.rint(block / scale[:, None].astype(np.float32)) + np.float32(codec.zero_code)
        return np.clip(code, 0, top).astype(np.uint8), scale, no_zeros
    low, high = block.min(axis=1), block.max(axis=1)
    if codec.zero == "integer":
        low, high = np.minimum(low, 0) * ratio, np.maximum(high, 0) * ratio
        scale = scale_in_dtype((high - low) / np.float32(top), codec)
        zero = np.clip(np.rint(-low / scale.astype(np.float32)), 0, top)
        code = np.rint(block / scale[:, None].astype(np.float32)) + zero[:, None]
        return np.clip(code, 0, top).astype(np.uint8), scale, zero.astype(np.uint8)
    shrink = (high - low) * ((1 - ratio) / 2)
    scale = scale_in_dtype(((high - shrink) - (low + shrink)) / np.float32(top), codec)
    minimum = in_dtype(low + shrink, codec)
    offset = block - minimum[:, None].astype(np.float32)
    code = np.rint(offset / scale[:, None].astype(np.float32))
    return np.clip(code, 0, top).astype(np.uint8), scale, minimum


def _decode(
    codes: Codes, scales: Any, zeros: Any, codec: Codec, entries: Floats | None = None
) -> NDArray[np.float64]:
    """Codes and broadcastable scales and zeros → float64 values."""
    scale = np.asarray(scales).astype(np.float64)
    code: NDArray[np.float64] = codes.astype(np.float64)
    if codec.is_table:
        assert entries is not None
        code = entries.astype(np.float64)[codes]
        return code * scale
    if zeros is None or codec.zero == "none":
        code = (code - codec.zero_code) * scale
    elif codec.zero == "integer":
        code = (code - zeros.astype(np.float64)) * scale
    else:
        code = code * scale + zeros.astype(np.float64)
    return code


def dequantize(
    codes: Codes,
    scales: Side,
    zeros: Side | None,
    codec: Codec,
    outer: Side | None = None,
    table: Floats | None = None,
) -> NDArray[np.float64]:
    """codes [N, K], scales and zeros [G, N] → weight [N, K] float64, exact (two scales: of their
    fp32 product; "fp8": outer * E4M3(scale * (code - zero)))."""
    group = np.arange(codes.shape[1]) // codec.group_size(codes.shape[1])
    if codec.scale_dtype == "fp8":
        assert outer is not None
        inner = floats.decode_e4m3(scales.astype(np.uint8)).T[:, group]
        entries = floats.round_e4m3((codes - codec.zero_code) * inner)
        return entries * outer.astype(np.float64)[:, None]
    wide = effective_scales(scales, outer, codec).T[:, group]
    zero = None if zeros is None else zeros.T[:, group]
    return _decode(codes, wide, zero, codec, entries_of(codec, table))


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
    if codec.packing == "base3":
        return ternary.pack_trits(codes)
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
