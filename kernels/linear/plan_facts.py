"""What the plans of `linear` and its kernels must agree on: bytes, groups, what a dot holds."""

from __future__ import annotations

import math

import torch

from lath.formats import packing
from lath.formats import values as value_tables
from lath.formats.activations import ActivationFormat
from lath.formats.codec import PlanesCodec
from lath.formats.sparse import SparseCodec

# Entries that a GPU's decoder reads from memory (kernels/linear/triton_tables.py).
LOOKED_UP = ("nf4", "learned", "vectors")
SCALE_BYTES = {"fp16": 2, "fp32": 4, "int8": 1, "e8m0": 1, "e4m3": 1, "fp8": 1}
# A product of an activation code and a weight code (less its zero) is at most 127 * 255.
MOST_INT32_COLUMNS = (2**31 - 1) // (127 * 255)


def weight_bytes(n: int, k: int, codec: PlanesCodec) -> int:
    """Bytes of a packed weight [n, k]: codes, both levels of scales, zeros, padding included.

    Not of a learned table, which is no part of what a longer weight has more of.
    """
    rows = packing.round_up(n, packing.PANEL)
    scale = SCALE_BYTES[codec.scale_dtype]
    zero = {"none": 0, "integer": 1, "float": scale}[codec.zero]
    outer = {"int8": 2 * rows, "fp8": 4 * rows, "e4m3": 4}.get(codec.scale_dtype, 0)
    sides = codec.num_groups(k) * rows * (scale + zero) + outer
    return packing.code_bytes(codec, (n, k)) + sides


def bytes_moved(
    m: int, n: int, k: int, weight: int, activations: ActivationFormat, dtype: torch.dtype
) -> int:
    """Each byte of weight, x and y once; rounded activations are also written and read as codes."""
    size = dtype.itemsize
    x = m * k * (size + (0 if activations.kind == "float" else 2))
    return weight + x + m * n * size


def holds_integers(codec: PlanesCodec | SparseCodec) -> bool:
    """Whether the numbers of a codec are whole numbers of 8 bits times the scale of their group."""
    whole = not codec.is_table or codec.values in value_tables.UNITS
    return whole and codec.scale_dtype != "fp8"


def held_in(codec: PlanesCodec | SparseCodec) -> str:
    """The type of a dot with rounded activations that holds the numbers of a codec as well."""
    return "bf16" if codec.values == "bf16" else "fp16"


def folds_scales(k: int, codec: PlanesCodec | SparseCodec, activations: ActivationFormat) -> bool:
    """Whether codes are multiplied by the 8-bit scales of their groups before the dot, so that one
    dot sums all of K: always where the products are rounded (FireQ), and for int8 dots where
    integers of 8 bits hold them (DGQ) and a token has one scale."""
    if codec.scale_dtype == "fp8":
        return True
    groups = [g for g in (codec.group, activations.group) if g is not None and g < k]
    one_scale = activations.group is None or activations.group >= k
    fits = codec.scale_dtype == "int8" and holds_integers(codec) and k <= MOST_INT32_COLUMNS
    return fits and activations.is_integer and one_scale and all(g % 32 == 0 for g in groups)


def multiplies_float8(
    k: int, codec: PlanesCodec | SparseCodec, activations: ActivationFormat
) -> bool:
    """Whether a dot of 8-bit floats takes x and the weight as they are stored or decoded."""
    if activations.values != "e4m3":
        return False
    of_weight = codec.scale_dtype == "fp8" or codec.values == "e4m3"
    return of_weight and common_group(k, codec, activations) % 32 == 0


def common_group(k: int, codec: PlanesCodec | SparseCodec, activations: ActivationFormat) -> int:
    """Longest run along K that has one weight scale and one activation scale outside the dot."""
    own = None if folds_scales(k, codec, activations) else codec.group
    groups = [g for g in (own, activations.group) if g is not None and g < k]
    return math.gcd(*groups) if groups else packing.round_up(max(k, 1), packing.block_of(codec))


def power_of_two(value: int, low: int, high: int) -> int:
    return max(low, min(high, 1 << max(value - 1, 0).bit_length()))
