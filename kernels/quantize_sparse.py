"""Sparse weights in torch, on the device of the weight: prune, round to nearest, pack.

The same steps as `lath.reference.sparse`, which says what they mean; codes agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lath.formats.codec import Codec
from lath.formats.sparse import SparseCodec, SparseTensor, pack
from lath.kernels import quantize as planes

# Rows of which magnitudes are ranked at once: bounds the temporary memory to about 0.3 GB.
_CHUNK_WEIGHTS = 1 << 24


def quantize(
    weight: Tensor, codec: SparseCodec, search: bool = False, table: Tensor | None = None
) -> SparseTensor:
    """weight [N, K] fp16, bf16 or fp32 → SparseTensor; ValueError on NaN, infinity or overflow.

    search: of the ranges of whole numbers; 16-bit floats have none, ValueError. table: None.
    """
    if table is not None:
        raise ValueError(f"table is for 'lut' codecs, got codec {str(codec)!r}")
    if search and codec.is_table:
        raise ValueError(f"search is for codecs with scales, got codec {str(codec)!r}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must be finite: it has NaN or infinity")
    mask = keep(weight, codec.share)
    pruned = torch.where(mask, weight, torch.zeros_like(weight))
    if isinstance(codec.kept, Codec):
        found = planes.quantize(pruned, codec.kept, search)
        # Codes of 8 bits less 128 as int8: the same as the sign bit turned over.
        numbers = (found.unpack_codes().to(torch.int16) - int(codec.kept.zero_code)).to(torch.int8)
        return pack(numbers, mask, codec, found.scales)
    numbers = pruned.to(codec.code_dtype)
    if not bool(torch.isfinite(numbers).all()):
        largest = float(pruned.abs().max())
        raise ValueError(f"weight is too large for {codec}: {largest:.3g} overflows {codec.values}")
    return pack(numbers, mask, codec)


def keep(weight: Tensor, share: int) -> Tensor:
    """bool [N, K]: all but the smallest `share` per cent of each row, and nothing that is zero."""
    rows, columns = weight.shape
    count = columns - columns * share // 100
    if count == columns or count == 0 or rows == 0:
        return weight != 0 if count else torch.zeros_like(weight, dtype=torch.bool)
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    step = max(1, _CHUNK_WEIGHTS // columns)
    for start in range(0, rows, step):
        size = weight[start : start + step].abs().float()
        least = torch.kthvalue(size, columns - count + 1, dim=1, keepdim=True).values
        larger, equal = size > least, size == least
        # Of those as large as the least that is kept, the first.
        wanted = count - larger.sum(dim=1, keepdim=True)
        mask[start : start + step] = larger | (equal & (equal.cumsum(dim=1) <= wanted))
    return mask & (weight != 0)
