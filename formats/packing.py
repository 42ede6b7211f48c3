"""The packed layout of codes: planes of words, the same for every device (drawing in DESIGN.md, 2).

Codes `[N, K]` are padded with code 0 to 16 rows (a panel) and 128 columns (a block) and split into
planes of w = 8, 4, 2 or 1 bits. A plane is int32 `[N/16, K/128, 16, 4w]`. Inside a block, column

    q = 32*run + 16*s + 2*v + h        run 0..3, s 0..1, v 0..7, h 0..1;    u = 8*run + v
    word c = u % 4w,   slot j = u // 4w,   bit = 16*h + 8*s + w*j

so a word reads as two 16-bit lanes (columns k, k + 1), as four bytes (k, k + 16, k + 1, k + 17) or
as one 32-bit lane of its row, and no bit ever moves. Bytes are little-endian, as everywhere torch
runs. The definition that this is tested against stands in `lath.reference.codecs`.

"base3" packs ternary codes t as a plane of 2 bits does, but with five slots in a byte and so 160
columns in a block. Slots t0 .. t4 of a byte make the number v = 81 t0 + 27 t1 + 9 t2 + 3 t3 + t4,
and the byte is c = floor(256 v / 243) + 1: as a fraction, c / 256 lies inside (v, v + 1) / 243, so
the digits of c / 256 in base 3 begin with the slots, and tripling it brings one after another over
the point. A code is two multiplications and no table; what stays behind the point is never 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lath.formats.codec import Codec, PlanesCodec

PANEL = 16  # rows side by side: one 512-bit register of words on a CPU, one MMA row tile on a GPU
BLOCK = 128  # columns that make a whole number of words for every plane width
TRITS = 5  # ternary codes in a byte: 3**5 = 243 <= 256
TRIT_BLOCK = 32 * TRITS  # columns of eight words of such bytes


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def is_base3(codec: object) -> bool:
    """Whether a codec packs five ternary codes in a byte."""
    return isinstance(codec, Codec) and codec.packing == "base3"


def block_of(codec: object) -> int:
    """Columns of a block, to whole ones of which K is padded."""
    return TRIT_BLOCK if is_base3(codec) else BLOCK


def plane_shapes(codec: PlanesCodec, shape: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Shape `[N/16, K/block, 16, 4w]` of each int32 plane of a weight of logical `shape` [N, K]."""
    panels, blocks = -(-shape[0] // PANEL), -(-shape[1] // block_of(codec))
    return [(panels, blocks, PANEL, 4 * width) for width in codec.plane_widths]


def code_bytes(codec: PlanesCodec, shape: tuple[int, int]) -> int:
    """Bytes of the packed codes of a weight of logical `shape` [N, K], padding included."""
    return sum(4 * a * b * c * d for a, b, c, d in plane_shapes(codec, shape))


def pack(codes: Tensor, codec: Codec) -> Tensor:
    """uint8 codes [N, K] → int32 1-D: the planes one after another, padding included."""
    block = block_of(codec)
    padded = _pad(codes, block)
    panels, blocks = padded.shape[0] // PANEL, padded.shape[1] // block
    if is_base3(codec):
        return _pack_trits(padded.reshape(panels, PANEL, blocks, TRITS, 2, 8, 2))
    # axes: panel, row, block, run, s, v, h → panel, block, row, run, v, h, s
    axes = padded.reshape(panels, PANEL, blocks, 4, 2, 8, 2).permute(0, 2, 1, 3, 5, 6, 4)
    planes, low = [], 0
    for width in codec.plane_widths:
        slots = axes.reshape(panels, blocks, PANEL, 8 // width, 4 * width, 2, 2)
        fields = (slots >> low) & ((1 << width) - 1)
        word_bytes = fields[:, :, :, 0].clone()
        for slot in range(1, 8 // width):
            word_bytes |= fields[:, :, :, slot] << (width * slot)
        planes.append(word_bytes.contiguous().reshape(-1).view(torch.int32))
        low += width
    return torch.cat(planes)


def split_planes(packed: Tensor, codec: PlanesCodec, shape: tuple[int, int]) -> list[Tensor]:
    """Views of the planes inside the flat packed tensor."""
    planes, start = [], 0
    for dims in plane_shapes(codec, shape):
        size = dims[0] * dims[1] * dims[2] * dims[3]
        planes.append(packed[start : start + size].view(dims))
        start += size
    return planes


def unpack(packed: Tensor, codec: Codec, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack`: int32 1-D → uint8 codes [N, K], padding dropped."""
    if is_base3(codec):
        return _unpack_trits(split_planes(packed, codec, shape)[0], shape)
    codes: Tensor | None = None
    low = 0
    for width, plane in zip(codec.plane_widths, split_planes(packed, codec, shape), strict=True):
        panels, blocks = plane.shape[:2]
        word_bytes = plane.contiguous().view(torch.uint8)
        word_bytes = word_bytes.reshape(panels, blocks, PANEL, 4 * width, 2, 2)
        fields = torch.stack(
            [(word_bytes >> (width * j)) & ((1 << width) - 1) for j in range(8 // width)], dim=3
        )
        fields = fields.reshape(panels, blocks, PANEL, 4, 8, 2, 2)  # run, v, h, s
        fields = fields.permute(0, 2, 1, 3, 6, 4, 5).reshape(panels * PANEL, blocks * BLOCK)
        codes = fields if codes is None else codes | (fields << low)
        low += width
    assert codes is not None  # every codec has at least one plane
    return codes[: shape[0], : shape[1]].contiguous()


def _pack_trits(codes: Tensor) -> Tensor:
    """[panels, row, blocks, slot, s, v, h] codes → int32 1-D."""
    slots = codes.permute(3, 0, 2, 1, 5, 6, 4)
    number = torch.zeros(slots.shape[1:], dtype=torch.int32, device=codes.device)
    for slot in range(TRITS):
        number = 3 * number + slots[slot]
    word_bytes: Tensor = ((number << 8) // 3**TRITS + 1).to(torch.uint8)
    return word_bytes.reshape(-1).view(torch.int32)


def _unpack_trits(plane: Tensor, shape: tuple[int, int]) -> Tensor:
    panels, blocks = plane.shape[:2]
    rest = plane.contiguous().view(torch.uint8).reshape(panels, blocks, PANEL, 8, 2, 2).int()
    slots = []
    for _ in range(TRITS):
        tripled = 3 * rest
        slots.append((tripled >> 8).to(torch.uint8))
        rest = tripled & 0xFF
    codes = torch.stack(slots, dim=3)  # panel, block, row, slot, v, h, s
    codes = codes.permute(0, 2, 1, 3, 6, 4, 5).reshape(panels * PANEL, blocks * TRIT_BLOCK)
    return codes[: shape[0], : shape[1]].contiguous()


def _pad(codes: Tensor, block: int) -> Tensor:
    rows, columns = codes.shape
    pad_rows, pad_columns = -rows % PANEL, -columns % block
    return torch.nn.functional.pad(codes, (0, pad_columns, 0, pad_rows))
