"""The page writer: 64 tokens of one KV head to a record and an index row.

A side of a page is written in parts: the channels of one slot of a byte each, or where a code is a
byte, neighbouring channels. KEYS and VALUES are constexpr tuples (codec, parts, channels of a part,
the same as a power of two, where codes begin, where the lower plane begins, elements of a record
through the pointer of the codes).
"""

from __future__ import annotations

import triton
import triton.language as tl

from lath.formats.pages import INDEX_LEVELS
from lath.kernels.pages.triton_numbers import encode_e4m3, rint, round_e4m3

# What a step of max and min is a fraction of where codes are not int8 codes.
_INDEX_LEVELS = tl.constexpr(float(INDEX_LEVELS))
# More than the rounding of a quotient below 128: max and min never lie inside the true ones.
_OUTWARD = tl.constexpr(2.0**-15)


@triton.jit
def _append(values, value):
    return values + (value,)  # noqa: RUF005 (Triton has no starred expressions)


@triton.jit
def _load(pointer, stride, count, PART: tl.constexpr, LAYOUT: tl.constexpr, DIM: tl.constexpr):
    """fp32 [64, block]: the channels of a part of the first `count` tokens, and 0."""
    token, channel = tl.arange(0, 64)[:, None], tl.arange(0, LAYOUT[3])[None, :]
    own = PART * LAYOUT[2] + channel
    inside = (token < count) & (channel < LAYOUT[2]) & (own < DIM)
    pointers = pointer + token.to(tl.int64) * stride + own
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _scale(amax, broken, LARGEST: tl.constexpr, BLANK: tl.constexpr, SMALLEST: tl.constexpr):
    """(scale, usable, amax or 1) of groups: NaN for a broken one, BLANK for one of zeros."""
    usable = (amax >= SMALLEST) & (broken == 0)
    safe = tl.where(usable, amax, 1.0)
    scale = tl.div_rn(safe, tl.zeros_like(safe) + LARGEST)
    scale = tl.where(usable, scale, BLANK)
    return tl.where(broken != 0, float("nan"), scale), usable, safe


@triton.jit
def _amax(x, AXIS: tl.constexpr):
    """(largest finite |x|, 1 where something is not finite) along an axis."""
    size = tl.abs(x)
    finite = size < float("inf")  # false for NaN too
    return tl.max(tl.where(finite, size, 0.0), AXIS), tl.max(tl.where(finite, 0, 1), AXIS)


@triton.jit
def _codes(x, safe, usable, CODEC: tl.constexpr):
    """int32 codes of fp32 x as they are stored (u of the narrow codecs), and fp32 as multiplied.

    safe, usable: of the groups, broadcastable to x.
    """
    x = tl.where(usable, x, 0.0)
    if CODEC == "int4" or CODEC == "int2":
        BITS: tl.constexpr = 4 if CODEC == "int4" else 2
        HALF: tl.constexpr = 2.0 ** (BITS - 1)
        steps = tl.floor(x * tl.div_rn(tl.zeros_like(safe) + HALF, safe))
        steps = tl.minimum(tl.maximum(steps, -HALF), HALF - 1)
        return steps.to(tl.int32), steps * 2.0 ** (8 - BITS) + 2.0 ** (7 - BITS)
    elif CODEC == "e4m3":
        scaled = x * tl.div_rn(tl.zeros_like(safe) + 448.0, safe)
        return encode_e4m3(scaled), round_e4m3(scaled)
    else:
        codes = rint(x * tl.div_rn(tl.zeros_like(safe) + 127.0, safe))
        return codes, codes.to(tl.float32)


@triton.jit
def _place(
    pointer,
    bytes_,
    LAYOUT: tl.constexpr,
    VALUES: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Store int32 [64, block] holding bytes in units of 16 channels (keys) or 16 tokens: those of
    part PART of the PARTS of a row."""
    token, own = tl.arange(0, 64)[:, None], tl.arange(0, LAYOUT[3])[None, :]
    byte = PART * LAYOUT[2] + own
    row = token // 16 * (16 * PARTS * LAYOUT[2])
    if VALUES:
        offsets = row + byte * 16 + token % 16
    else:
        offsets = row + byte // 16 * 256 + token % 16 * 16 + byte % 16
    inside = (own < LAYOUT[2]) & (token < 64)
    tl.store(pointer + offsets, (bytes_ & 255).to(tl.uint8), mask=inside)


@triton.jit
def _place_floats(pointer, x, LAYOUT: tl.constexpr):
    token, channel = tl.arange(0, 64)[:, None], tl.arange(0, LAYOUT[3])[None, :]
    pointers = pointer + token * LAYOUT[2] + channel
    inside = (channel < LAYOUT[2]) & (token < 64)
    tl.store(pointers, x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _place_codes(pointer, codes, kept, LAYOUT: tl.constexpr, VALUES: tl.constexpr):
    """Store codes that share bytes; `kept` [64, 1]: tokens that count, others get 0."""
    if LAYOUT[0] == "int8-planes":
        upper = ((codes[0] >> 4) & 15) | (((codes[1] >> 4) & 15) << 4)
        lower = (codes[0] & 15) | ((codes[1] & 15) << 4)
        _place(pointer + LAYOUT[4], tl.where(kept, upper, 0), LAYOUT, VALUES, 0, 1)
        _place(pointer + LAYOUT[5], tl.where(kept, lower, 0), LAYOUT, VALUES, 0, 1)
    else:
        BITS: tl.constexpr = 8 // LAYOUT[1]
        packed = codes[0] & ((1 << BITS) - 1)
        for part in tl.static_range(1, LAYOUT[1]):
            packed |= (codes[part] & ((1 << BITS) - 1)) << (BITS * part)
        _place(pointer + LAYOUT[4], tl.where(kept, packed, 0), LAYOUT, VALUES, 0, 1)


@triton.jit
def _write_keys(
    source,
    stride,
    count,
    pointer,
    numbers,
    means,
    extremes,
    index_numbers,
    LAYOUT: tl.constexpr,
    RECORD: tl.constexpr,
    INDEX: tl.constexpr,
    DIM: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """Keys, their scales, and of the index row all but the mean of the values."""
    BYTES: tl.constexpr = LAYOUT[0] == "int8" or LAYOUT[0] == "e4m3"
    TOKEN: tl.constexpr = LAYOUT[0] == "int4" or LAYOUT[0] == "int2"
    token = tl.arange(0, 64)
    kept = (token < count)[:, None]
    tokens = tl.zeros((1,), tl.float32) + count
    centred, amax, broken = (), tl.zeros((64,), tl.float32), tl.zeros((64,), tl.int32)
    for part in tl.static_range(LAYOUT[1]):
        x = _load(source, stride, count, part, LAYOUT, DIM)
        if LAYOUT[0] == "float":
            _place_floats(pointer + LAYOUT[4], x, LAYOUT)
        mean = tl.div_rn(tl.sum(x, 0), tokens).to(tl.bfloat16)
        channel = tl.arange(0, LAYOUT[3])
        tl.store(means + part * LAYOUT[2] + channel, mean, mask=channel < LAYOUT[2])
        y = tl.where(kept, x - mean.to(tl.float32)[None, :], 0.0)
        own, own_broken = _amax(y, 1)
        amax, broken = tl.maximum(amax, own), tl.maximum(broken, own_broken)
        centred = _append(centred, y)
    # Both of the page, as [1], whatever the codes' own groups are.
    page_amax = tl.zeros((1,), tl.float32) + tl.max(amax, 0)
    page_broken = tl.zeros((1,), tl.int32) + tl.max(broken, 0)
    key_scale = tl.full((1,), 1.0, tl.float32)
    if TOKEN:
        scale, usable, safe = _scale(amax, broken, 128.0, 0.0, SMALLEST)
        tl.store(numbers + RECORD[3] + token, tl.where(token < count, scale, 0.0))
        usable, safe, scale = usable[:, None], safe[:, None], scale[:, None]
    elif LAYOUT[0] != "float":
        LARGEST: tl.constexpr = 448.0 if LAYOUT[0] == "e4m3" else 127.0
        key_scale, usable, safe = _scale(page_amax, page_broken, LARGEST, 1.0, SMALLEST)
        usable, safe, scale = usable[:, None], safe[:, None], key_scale[:, None]
    CODES: tl.constexpr = LAYOUT[0] == "int8" or LAYOUT[0] == "int8-planes"
    unit, _, _ = _scale(page_amax, page_broken, _INDEX_LEVELS, 1.0, SMALLEST)
    if CODES:
        unit = key_scale
    slot = tl.arange(0, 4)
    sides = tl.where(slot == 0, key_scale, tl.where(slot == 1, unit, 0.0))
    tl.store(numbers + RECORD[2] + slot, sides)
    sides = tl.where(slot == 0, unit, tl.where(slot == 1, tokens, 0.0))
    tl.store(index_numbers + INDEX[4] + slot, sides)
    step = tl.where(unit == unit, unit, 1.0)[:, None]
    stored = ()
    for part in tl.static_range(LAYOUT[1]):
        y = centred[part]
        number = y  # type: ignore[var-annotated]
        if LAYOUT[0] != "float":
            codes, number = _codes(y, safe, usable, LAYOUT[0])
            if BYTES:
                whole = tl.where(kept, codes, 0)
                _place(pointer + LAYOUT[4], whole, LAYOUT, False, part, LAYOUT[1])
            else:
                stored = _append(stored, codes)
            if not CODES:
                number = number * scale
        decoded = tl.where(tl.abs(number) < float("inf"), number, 0.0)
        highest = tl.max(tl.where(kept, decoded, float("-inf")), 0)[None, :]
        lowest = tl.min(tl.where(kept, decoded, float("inf")), 0)[None, :]
        if not CODES:
            highest = tl.ceil(tl.div_rn(highest, tl.zeros_like(highest) + step) + _OUTWARD)
            lowest = tl.floor(tl.div_rn(lowest, tl.zeros_like(lowest) + step) - _OUTWARD)
        y = tl.where(tl.abs(y) < float("inf"), y, 0.0)
        middle = tl.div_rn(tl.sum(y, 0), tokens)[None, :]
        off = tl.where(kept, y - middle, 0.0)
        spread = tl.sqrt(tl.div_rn(tl.sum(off * off, 0), tokens))[None, :]
        steps = tl.minimum(tl.div_rn(2.0 * spread, tl.zeros_like(spread) + step), 255.0)
        channel = part * LAYOUT[2] + tl.arange(0, LAYOUT[3])[None, :]
        fits = tl.arange(0, LAYOUT[3])[None, :] < LAYOUT[2]
        true = channel < DIM  # the others hold 0
        tl.store(extremes + INDEX[1] + channel, tl.where(true, highest, 0.0).to(tl.int8), mask=fits)
        tl.store(extremes + INDEX[2] + channel, tl.where(true, lowest, 0.0).to(tl.int8), mask=fits)
        deviation = tl.where(true, rint(steps), 0).to(tl.uint8).to(tl.int8, bitcast=True)
        tl.store(extremes + INDEX[3] + channel, deviation, mask=fits)
    if LAYOUT[0] != "float" and not BYTES:
        _place_codes(pointer, stored, kept, LAYOUT, False)


@triton.jit
def _write_values(
    source,
    stride,
    count,
    pointer,
    numbers,
    means,
    LAYOUT: tl.constexpr,
    RECORD: tl.constexpr,
    INDEX: tl.constexpr,
    DIM: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """Values, their scales and the mean of what the codes stand for."""
    tokens = tl.zeros((1,), tl.float32) + count
    kept = (tl.arange(0, 64) < count)[:, None]
    BYTES: tl.constexpr = LAYOUT[0] == "int8" or LAYOUT[0] == "e4m3"
    MIDRISE: tl.constexpr = LAYOUT[0] == "int4" or LAYOUT[0] == "int2"
    E4M3_LARGEST: tl.constexpr = 448.0 if LAYOUT[0] == "e4m3" else 127.0
    LARGEST: tl.constexpr = 128.0 if MIDRISE else E4M3_LARGEST
    BLANK: tl.constexpr = 0.0 if MIDRISE else 1.0
    stored = ()
    for part in tl.static_range(LAYOUT[1]):
        x = _load(source, stride, count, part, LAYOUT, DIM)
        amax, broken = _amax(x, 0)
        scale, usable, safe = _scale(amax, broken, LARGEST, BLANK, SMALLEST)
        if LAYOUT[0] == "float":
            _place_floats(pointer + LAYOUT[4], x, LAYOUT)
            scale = tl.zeros_like(scale) + 1.0
            total = tl.sum(x, 0)
        else:
            codes, number = _codes(x, safe[None, :], usable[None, :], LAYOUT[0])
            if BYTES:
                whole = tl.where(kept, codes, 0)
                _place(pointer + LAYOUT[4], whole, LAYOUT, True, part, LAYOUT[1])
            else:
                stored = _append(stored, codes)
            # Codes are multiples of 2**-9 below 512: their sum is exact.
            total = tl.sum(tl.where(kept, number, 0.0), 0)
        mean = tl.div_rn(total * scale, tl.zeros_like(scale) + tokens).to(tl.bfloat16)
        inside = tl.arange(0, LAYOUT[3])
        channel = part * LAYOUT[2] + inside
        scale = tl.where(channel < DIM, scale, 1.0)
        tl.store(numbers + RECORD[1] + channel, scale, mask=inside < LAYOUT[2])
        mean = tl.where(channel < DIM, mean, 0.0)
        tl.store(means + INDEX[5] + channel, mean, mask=inside < LAYOUT[2])
    if LAYOUT[0] != "float" and not BYTES:
        _place_codes(pointer, stored, kept, LAYOUT, True)


@triton.jit
def write_kernel(
    keys,
    values,
    jobs,
    key_records,
    value_records,
    numbers,
    means,
    extremes,
    index_numbers,
    key_stride_b,
    key_stride_h,
    key_stride_l,
    value_stride_b,
    value_stride_h,
    value_stride_l,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    RECORD: tl.constexpr,
    INDEX: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """Grid: jobs, KV heads. Without fused multiply-add.

    keys, values: [B, Hkv, L, D or E] with strides. jobs: int32 [J, 4]. key_records, value_records,
    numbers (fp32*): the records; means (bf16*), extremes (int8*), index_numbers (fp32*): the index.
    RECORD: fp32 of a record, where scales of values, of keys and of tokens begin. INDEX: bytes of
    a row, where max, min and deviation begin, numbers (in fp32) and the mean of values (in bf16).
    What a record holds between its fields is not written.
    """
    job = jobs + tl.program_id(0).to(tl.int64) * 4
    head = tl.program_id(1).to(tl.int64)
    row, first = tl.load(job).to(tl.int64), tl.load(job + 1).to(tl.int64)
    count, page = tl.load(job + 2), tl.load(job + 3).to(tl.int64)
    record = page * tl.num_programs(1) + head
    numbers += record * RECORD[0]
    _write_keys(
        keys + row * key_stride_b + head * key_stride_h + first * key_stride_l, key_stride_l, count,
        key_records + record * KEYS[6], numbers, means + record * (INDEX[0] // 2),
        extremes + record * INDEX[0], index_numbers + record * (INDEX[0] // 4), KEYS, RECORD, INDEX,
        KEY_DIM, SMALLEST,
    )  # fmt: skip
    _write_values(
        values + row * value_stride_b + head * value_stride_h + first * value_stride_l,
        value_stride_l, count, value_records + record * VALUES[6], numbers,
        means + record * (INDEX[0] // 2), VALUES, RECORD, INDEX, VALUE_DIM, SMALLEST,
    )  # fmt: skip
