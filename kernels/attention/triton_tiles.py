"""Tiles of a page: where its codes lie in a record, and how they become operands of a dot.

A side of a page (keys or values) is described by a constexpr tuple, its *layout*:

    (kind, parts, low, width, block, at, low_at)

kind: "float", "int8", "e4m3" (multiplied as such), "e4m3-fp16" (decoded to fp16) or "narrow"
(words of 2- or 4-bit codes). parts: dots per tile, each over the channels of one slot of a byte.
low: whether a second plane of four bits follows. width: bytes of a token's row in one plane
(elements where kind is "float"). block: channels per dot, `width` rounded up to a power of two.
at, low_at: where the planes begin in the record, counted in elements of the pointer that reads it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lath.kernels.pages.triton_numbers import bytes_of, decode_e4m3


@triton.jit
def key_unit(token, byte, WIDTH: tl.constexpr):
    """Offset of byte `byte` of a token's row of keys in a plane [4, WIDTH/16, 16 tokens, 16]."""
    return token // 16 * (16 * WIDTH) + byte // 16 * 256 + token % 16 * 16 + byte % 16


@triton.jit
def value_unit(token, byte, WIDTH: tl.constexpr):
    """Offset of byte `byte` of a token's row of values in a plane [4, WIDTH, 16 tokens]."""
    return token // 16 * (16 * WIDTH) + byte * 16 + token % 16


@triton.jit
def read_subpages(tokens):
    """int32: bit s is set where any of the bits 16 s .. 16 s + 15 of an int64 is."""
    low, high = tokens.to(tl.int32), (tokens >> 32).to(tl.int32)
    first = ((low & 0xFFFF) != 0).to(tl.int32) + ((low >> 16) != 0).to(tl.int32) * 2
    return first + ((high & 0xFFFF) != 0).to(tl.int32) * 4 + ((high >> 16) != 0).to(tl.int32) * 8


@triton.jit
def is_read(subpage, subpages):
    """Whether a sub-page is; subpages: of `read_subpages`."""
    return ((subpages >> subpage) & 1) != 0


@triton.jit
def _load(pointers, inside, MASKED: tl.constexpr):
    """A mask costs nothing where there is none."""
    if MASKED:
        return tl.load(pointers, mask=inside, other=0)
    else:
        return tl.load(pointers)


@triton.jit
def _load_floats(pointers, inside, MASKED: tl.constexpr):
    """As `_load`, for pointers to floats (an integer 0 is no fp8 number)."""
    if MASKED:
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _words(pointer, subpages, LAYOUT: tl.constexpr, VALUES: tl.constexpr, SOME: tl.constexpr):
    """uint32 words of a plane: keys [64, block/4] along channels, values [block, 16] along tokens.

    pointer: int32*, at the plane. subpages, SOME: as in `load_planes`.
    """
    WIDTH: tl.constexpr = LAYOUT[3]
    if VALUES:
        channel, word = tl.arange(0, LAYOUT[4])[:, None], tl.arange(0, 16)[None, :]
        offsets = word // 4 * (4 * WIDTH) + channel * 4 + word % 4
        inside = (channel < WIDTH) & (word < 16)
        if SOME:
            inside &= is_read(word // 4, subpages)
    else:
        token, word = tl.arange(0, 64)[:, None], tl.arange(0, LAYOUT[4] // 4)[None, :]
        offsets = token // 16 * (4 * WIDTH) + word // 4 * 64 + token % 16 * 4 + word % 4
        inside = token < 64
        if LAYOUT[4] != WIDTH:  # a condition that always holds still hides runs of 16 bytes
            inside &= word * 4 < WIDTH
        if SOME:
            inside &= is_read(token // 16, subpages)
    loaded = _load(pointer + offsets, inside, SOME or LAYOUT[4] != WIDTH)
    return loaded.to(tl.uint32, bitcast=True)


@triton.jit
def _narrow(words, low, PART: tl.constexpr, PARTS: tl.constexpr, LOW: tl.constexpr):
    """The int8 codes of one slot of each byte: uint32 [R, C] -> int8 [R, 4C].

    A code of b bits fills the upper bits; the middle of what is below stands for it, or the lower
    plane's four bits do.
    """
    BITS: tl.constexpr = 8 // PARTS
    EVERY_BYTE: tl.constexpr = 0x01010101
    upper = (words << (8 - BITS - BITS * PART)) & ((256 - 2 ** (8 - BITS)) * EVERY_BYTE)
    if LOW:
        return bytes_of(upper | ((low >> (4 * PART)) & (15 * EVERY_BYTE)))
    else:
        return bytes_of(upper | (2 ** (7 - BITS) * EVERY_BYTE))


@triton.jit
def load_planes(
    pointer,
    LAYOUT: tl.constexpr,
    VALUES: tl.constexpr,
    subpages=15,
    SOME: tl.constexpr = False,
):
    """What a tile needs of a record before `operand`: a pair of words, or of the loaded codes.

    pointer: at the record, of the type that the layout is read with. SOME: only of the sub-pages
    whose bits are set in `subpages` (`read_subpages`); of others 0.
    """
    WIDTH: tl.constexpr = LAYOUT[3]
    MASKED: tl.constexpr = SOME or LAYOUT[3] != LAYOUT[4]
    if LAYOUT[0] == "narrow":
        upper = _words(pointer + LAYOUT[5], subpages, LAYOUT, VALUES, SOME)
        if LAYOUT[2]:
            return upper, _words(pointer + LAYOUT[6], subpages, LAYOUT, VALUES, SOME)
        else:
            return upper, upper
    else:
        if VALUES:
            token, channel = tl.arange(0, 64)[:, None], tl.arange(0, LAYOUT[4])[None, :]
            offsets = value_unit(token, channel, WIDTH)
        else:
            token, channel = tl.arange(0, 64)[None, :], tl.arange(0, LAYOUT[4])[:, None]
            offsets = key_unit(token, channel, WIDTH)
        inside = (channel < WIDTH) & (token < 64)
        if SOME:
            inside &= is_read(token // 16, subpages)
        if LAYOUT[0] == "e4m3":
            codes = _load_floats(pointer + LAYOUT[5] + offsets, inside, MASKED)
        else:
            codes = _load(pointer + LAYOUT[5] + offsets, inside, MASKED)
        return codes, codes


@triton.jit
def operand(planes, LAYOUT: tl.constexpr, PART: tl.constexpr, VALUES: tl.constexpr):
    """Codes of part PART: keys [block, 64], values [64, block]; int8, fp8 or fp16."""
    if LAYOUT[0] == "narrow":
        return tl.trans(_narrow(planes[0], planes[1], PART, LAYOUT[1], LAYOUT[2]))
    elif LAYOUT[0] == "e4m3-fp16":
        return decode_e4m3(planes[0])
    else:
        return planes[0]


@triton.jit
def float_keys(
    pointer, stride, channels, count, BLOCK: tl.constexpr, subpages=15, SOME: tl.constexpr = False
):
    """[BLOCK, 64] of keys [64, channels] whose first `count` tokens may be read; subpages, SOME: as
    in `load_planes`."""
    token, channel = tl.arange(0, 64)[None, :], tl.arange(0, BLOCK)[:, None]
    inside = (token < count) & (channel < channels)
    if SOME:
        inside &= is_read(token // 16, subpages)
    return tl.load(pointer + token * stride + channel, mask=inside, other=0.0)


@triton.jit
def float_values(
    pointer, stride, channels, count, BLOCK: tl.constexpr, subpages=15, SOME: tl.constexpr = False
):
    """[64, BLOCK] of values [64, channels] whose first `count` tokens may be read; subpages, SOME:
    as in `load_planes`."""
    token, channel = tl.arange(0, 64)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (token < count) & (channel < channels)
    if SOME:
        inside &= is_read(token // 16, subpages)
    return tl.load(pointer + token * stride + channel, mask=inside, other=0.0)
