"""The definition of sparse weights in NumPy: which weights are kept, how they are stored, decoded.

The form is that of Flash-LLM (Xia et al., VLDB 2023), load what is kept and multiply a dense tile,
with a bit for each weight in place of an index for each kept one (SparAMX, Abouelhamayed et al.,
2025). Everything here is a plain loop over tiles of 16 rows and 128 columns; the layout is that of
`lath.formats.sparse`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lath.formats.codec import Codec
from lath.formats.packing import BLOCK, PANEL
from lath.formats.sparse import SparseCodec
from lath.reference import codecs

Floats = NDArray[np.float32]


class Sparse(NamedTuple):
    """bitmap: uint32 [N/16, K/128, 16, 4]. offsets: int64 [tiles + 1]. kept: the kept numbers in
    order, int64, or float64 where they are 16-bit floats. scales: [G, N] or None."""

    bitmap: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    kept: NDArray[Any]
    scales: NDArray[Any] | None


def keep(weight: Floats, share: int) -> NDArray[np.bool_]:
    """Which weights [N, K] are kept: bool [N, K].

    Of each row the floor(K * share / 100) smallest by magnitude become zero, of equal ones those of
    higher columns first; so rows are equally long, and the choice is one of many that a pruning
    method could make: prune before, and share 0 keeps exactly what is not zero. What is zero
    already counts among the smallest and is never kept.
    """
    rows, columns = weight.shape
    count = columns - columns * share // 100
    order = np.argsort(-np.abs(weight), axis=1, kind="stable")
    mask = np.zeros((rows, columns), bool)
    np.put_along_axis(mask, order[:, :count], True, axis=1)
    kept: NDArray[np.bool_] = mask & (weight != 0)
    return kept


def quantize(weight: Floats, codec: SparseCodec, search: bool = False) -> Sparse:
    """weight [N, K] fp32 → its bitmap and kept numbers.

    Scales are those that the codec of the kept numbers has for the pruned weight, where zeros are
    exact and count for nothing. 16-bit floats are the weight rounded once. ValueError for NaN or
    infinity, or numbers too large.
    """
    if not np.isfinite(weight).all():
        raise ValueError("weight must be finite: it has NaN or infinity")
    mask = keep(weight, codec.share)
    pruned = np.where(mask, weight, np.float32(0))
    if isinstance(codec.kept, Codec):
        found = codecs.quantize(pruned, codec.kept, search)
        numbers: NDArray[Any] = found.codes.astype(np.int64) - int(codec.kept.zero_code)
        return Sparse(*pack(numbers, mask), found.scales)
    with np.errstate(over="ignore"):
        numbers = _round(pruned, codec.values)
    if not np.isfinite(numbers).all():
        largest = float(np.abs(pruned).max())
        raise ValueError(f"weight is too large for {codec}: {largest:.3g} overflows {codec.values}")
    return Sparse(*pack(numbers, mask), None)


def pack(
    numbers: NDArray[Any], mask: NDArray[np.bool_]
) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[Any]]:
    """numbers, mask [N, K] → bitmap, offsets, kept."""
    rows, columns = mask.shape
    panels, blocks = -(-rows // PANEL), -(-columns // BLOCK)
    bitmap = np.zeros((panels, blocks, PANEL, BLOCK // 32), np.uint32)
    offsets, kept = [0], []
    for panel in range(panels):
        for block in range(blocks):
            for row in range(panel * PANEL, min(rows, (panel + 1) * PANEL)):
                for column in range(block * BLOCK, min(columns, (block + 1) * BLOCK)):
                    if mask[row, column]:
                        word = column % BLOCK // 32
                        bitmap[panel, block, row % PANEL, word] |= np.uint32(1 << column % 32)
                        kept.append(numbers[row, column])
            offsets.append(len(kept))
    return bitmap, np.array(offsets, np.int64), np.array(kept, numbers.dtype)


def unpack(sparse: Sparse, shape: tuple[int, int]) -> NDArray[Any]:
    """The numbers [N, K] before their scales, 0 where none is kept."""
    rows, columns = shape
    panels, blocks = sparse.bitmap.shape[:2]
    dense = np.zeros((panels * PANEL, blocks * BLOCK), sparse.kept.dtype)
    for panel in range(panels):
        for block in range(blocks):
            position = int(sparse.offsets[panel * blocks + block])
            for row in range(PANEL):
                for column in range(BLOCK):
                    word = int(sparse.bitmap[panel, block, row, column // 32])
                    if word >> column % 32 & 1:
                        place = panel * PANEL + row, block * BLOCK + column
                        dense[place] = sparse.kept[position]
                        position += 1
    return dense[:rows, :columns]


def dequantize(sparse: Sparse, codec: SparseCodec, shape: tuple[int, int]) -> NDArray[np.float64]:
    """The weight [N, K] that is stored, float64."""
    numbers = unpack(sparse, shape).astype(np.float64)
    if sparse.scales is None:
        return numbers
    group = np.arange(shape[1]) // codec.group_size(shape[1])
    return numbers * sparse.scales.astype(np.float64).T[:, group]


def _round(numbers: Floats, values: str) -> NDArray[np.float64]:
    """fp32 rounded once, ties to even, to "fp16" or "bf16"."""
    if values == "fp16":
        return numbers.astype(np.float16).astype(np.float64)
    bits = numbers.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)
