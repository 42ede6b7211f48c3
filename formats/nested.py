"""Views of fewer bits of a packed weight: one store, read at 8, 4 or 2 bits (MatQuant).

The definition and the reasons stand in `lath.reference.nested`. A "nested" codec keeps its upper
bits in planes of their own, behind those of the lower ones: the view is the end of the same tensor
of codes, and scales that are a power of two larger. Ordinary 8-bit codes are rounded and packed
anew.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lath.formats import packing
from lath.formats.codec import Codec
from lath.formats.qtensor import QTensor


def nested_view(weight: QTensor, bits: int) -> QTensor:
    """`weight` in `bits` bits; see `QTensor.nested`."""
    codec = weight.codec
    if type(bits) is not int or not 1 <= bits <= codec.bits:
        raise ValueError(f"bits must be an integer from 1 to {codec.bits}, got {bits!r}")
    if bits == codec.bits:
        return weight
    if codec.values == "nested":
        fewer = dataclasses.replace(codec, bits=bits)
        size = sum(a * b * c * d for a, b, c, d in packing.plane_shapes(fewer, weight.shape))
        codes = weight.codes[len(weight.codes) - size :]
    elif codec.values == "integer" and codec.zero != "integer" and _is_plain(codec):
        fewer = dataclasses.replace(codec, bits=bits)
        codes = packing.pack(_sliced(weight.unpack_codes(), codec.bits, bits), fewer)
    else:
        raise ValueError(
            "nested needs a codec of whole numbers that is symmetric, '-fzero' or '-nested', with "
            f"scales in fp16 or fp32, got {str(codec)!r}"
        )
    return QTensor(fewer, weight.shape, codes, _scaled(weight, 2 ** (codec.bits - bits)),
                   weight.zeros)  # fmt: skip


def _is_plain(codec: Codec) -> bool:
    """Not one bit, whose two levels have no zero between them, nor scales below scales."""
    return codec.bits > 1 and codec.scale_dtype in ("fp16", "fp32")


def _sliced(codes: Tensor, bits: int, fewer: int) -> Tensor:
    """clamp(round(q / 2**(bits - fewer))), half up."""
    dropped = bits - fewer
    rounded = (codes.int() + (1 << (dropped - 1))) >> dropped
    return rounded.clamp_(max=(1 << fewer) - 1).to(torch.uint8)


def _scaled(weight: QTensor, factor: int) -> Tensor:
    scales = (weight.scales.float() * factor).to(weight.scales.dtype)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(f"scales of {weight.codec} times {factor} overflow; use '-s32'")
    return scales
