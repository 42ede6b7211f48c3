"""The definition of a page in NumPy: 64 tokens of one KV head (`lath.formats.pages`).

Keys lose their mean μ over the page's tokens (rounded to bfloat16) before they are rounded:

    int8         scale = amax/127   code = rint(y * (127/amax))           amax of the page
    int4, int2   scale = amax/128   u = floor(y * (2**(b-1)/amax))        amax of the token
                 clipped to b bits; decoded code = u * 2**(8-b) + 2**(7-b)
    e4m3         scale = amax/448   code = E4M3(y * (448/amax))           amax of the page

with y = k - μ; key = code * scale + μ. Values are rounded likewise with the amax of each channel,
without a mean. Every division and product is one IEEE fp32 operation. A group of zeros (amax below
2**-100) has codes 0 and scale 1 (int4, int2: scale 0, for no code stands for zero there); one with
NaN or infinity has codes 0 and scale NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lath.formats.activations import SMALLEST_ABSMAX
from lath.formats.pages import INDEX_LEVELS, PAGE, SUBPAGE, UNIT, PageCodec, PageFormat
from lath.reference import floats

FloatArray = NDArray[np.float32]
_SUBPAGES = PAGE // SUBPAGE


@dataclass(frozen=True)
class Page:
    """A page read back, `tokens` = 64 rows.

    key_codes: float64 [64, D] (int8 codes, E4M3 values, or floats as stored). key_scales: fp32
    [64]. mean: fp32 [D], what was removed from the keys (zero for float keys). value_codes:
    float64 [64, E], value_scales: fp32 [E] (one for float values).
    """

    key_codes: NDArray[np.float64]
    key_scales: FloatArray
    mean: FloatArray
    value_codes: NDArray[np.float64]
    value_scales: FloatArray

    @property
    def keys(self) -> NDArray[np.float64]:
        """The keys that the codes stand for, [64, D]."""
        return self.key_codes * self.key_scales.astype(np.float64)[:, None] + self.mean

    @property
    def values(self) -> NDArray[np.float64]:
        return self.value_codes * self.value_scales.astype(np.float64)


def key_mean(keys: FloatArray) -> FloatArray:
    """The mean of keys [n, D] over tokens, rounded to bfloat16, as fp32."""
    with np.errstate(invalid="ignore", over="ignore"):
        return floats.round_bfloat16(keys.astype(np.float64).mean(axis=0).astype(np.float32))


def encode(
    y: FloatArray, codec: PageCodec, axis: int | None
) -> tuple[NDArray[np.float64], FloatArray]:
    """Codes (decoded to the numbers that are multiplied) and scales of y; groups along `axis`,
    the whole array where None. Scales keep their axis with length 1."""
    y = y.astype(np.float32)
    finite = np.isfinite(y).all(axis=axis, keepdims=True)
    amax = np.abs(np.where(np.isfinite(y), y, 0)).max(axis=axis, keepdims=True)
    usable = finite & (amax >= np.float32(SMALLEST_ABSMAX))
    safe = np.where(usable, amax, np.float32(1)).astype(np.float32)
    scales = safe / np.float32(codec.largest)
    inside = np.where(usable, y, np.float32(0))
    midrise = codec.name in ("int4", "int2")
    if midrise:
        half = np.float32(2 ** (codec.bits - 1))
        steps = np.clip(np.floor(inside * (half / safe)), -half, half - 1)
        codes = steps * 2.0 ** (8 - codec.bits) + 2.0 ** (7 - codec.bits)
    else:
        scaled = inside * (np.float32(codec.largest) / safe)
        codes = floats.round_e4m3(scaled) if codec.map == "e4m3" else np.rint(scaled)
    blank = np.float32(0) if midrise else np.float32(1)
    scales = np.where(usable, scales, np.where(finite, blank, np.float32(np.nan)))
    return codes.astype(np.float64), scales.astype(np.float32)


def write_page(
    keys: FloatArray,
    values: FloatArray,
    fmt: PageFormat,
    dtype: str = "fp32",
    mean: FloatArray | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """keys [n, D], values [n, E], 1 <= n <= 64 → record uint8 and index row uint8.

    dtype: "fp16", "bf16" or "fp32", what float codecs store (the inputs must be numbers of it).
    mean: μ to use instead of `key_mean(keys)`; a kernel that sums in another order may differ from
    it by one bfloat16 step, and all else follows from the μ that it stored.
    """
    tokens = len(keys)
    mean = key_mean(keys) if mean is None else mean
    record = np.zeros(fmt.record_bytes, np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        centred = keys.astype(np.float32) - mean
    unit = index_unit(centred, fmt.key)
    if fmt.key.map == "float":
        _put_floats(record, fmt, "keys", keys, fmt.padded_key_dim, dtype)
        decoded, key_scale = centred.astype(np.float64), 1.0
    else:
        per_token = fmt.key.scale_per_token
        codes, scales = encode(centred, fmt.key, 1 if per_token else None)
        decoded = codes * scales.astype(np.float64)
        key_scale = 1.0 if per_token else float(scales.item())
        if per_token:
            padded = np.zeros(PAGE, np.float32)
            padded[:tokens] = scales[:, 0]
            _put(record, fmt, "token_scales", padded)
        _put_codes(record, fmt, "keys", fmt.key, pad(codes, fmt.padded_key_dim, fmt.key), False)
    _put(record, fmt, "key_scales", np.array([key_scale, unit, 0, 0], np.float32))
    value_scales, value_mean = _put_values(record, fmt, values, dtype)
    padded_scales = np.ones(fmt.padded_value_dim, np.float32)
    padded_scales[: fmt.value_dim] = value_scales
    _put(record, fmt, "value_scales", padded_scales)
    return record, index_row(fmt, mean, decoded, centred, unit, value_mean)


def index_unit(centred: FloatArray, codec: PageCodec) -> float:
    """What one step of max and min stands for: the key scale of an int8 page, else amax / 120."""
    if codec.name in ("int8", "int8-planes"):
        return float(encode(centred, codec, None)[1].item())
    return widest_unit(centred)


def widest_unit(centred: NDArray[np.floating]) -> float:
    """A unit in which the largest of centred keys is `INDEX_LEVELS`; 1 for zeros, NaN where one is
    not finite."""
    finite = bool(np.isfinite(centred).all())
    amax = np.float32(np.abs(centred).max() if finite and centred.size else 0)
    if finite and amax < SMALLEST_ABSMAX:
        return 1.0
    return float(amax / np.float32(INDEX_LEVELS)) if finite else float("nan")


def _put_values(
    record: NDArray[np.uint8], fmt: PageFormat, values: FloatArray, dtype: str
) -> tuple[FloatArray, FloatArray]:
    """Store the values; their scales [E] and the means of what is stored [E], not rounded to
    bfloat16 yet: (sum of codes * scale) / n in IEEE fp32, the sum of codes being exact."""
    count = np.float32(len(values))
    if fmt.value.map == "float":
        _put_floats(record, fmt, "values", values, fmt.padded_value_dim, dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            sums = values.astype(np.float64).sum(axis=0).astype(np.float32)
        return np.ones(fmt.value_dim, np.float32), sums / count
    codes, kept = encode(values, fmt.value, 0)
    _put_codes(record, fmt, "values", fmt.value, pad(codes, fmt.padded_value_dim, fmt.value), True)
    with np.errstate(over="ignore"):
        return kept[0], codes.sum(axis=0).astype(np.float32) * kept[0] / count


def index_row(
    fmt: PageFormat,
    mean: FloatArray,
    decoded: NDArray[np.float64],
    centred: NDArray[np.floating],
    unit: float,
    value_mean: FloatArray,
) -> NDArray[np.uint8]:
    """The index row uint8 of tokens: max and min of `decoded`, deviation of `centred` keys."""
    row = np.zeros(fmt.index_bytes, np.uint8)
    step = unit if np.isfinite(unit) else 1.0
    kept = np.nan_to_num(decoded, nan=0, posinf=0, neginf=0)
    spread = np.nan_to_num(centred.astype(np.float64), nan=0, posinf=0, neginf=0).std(axis=0)

    def channels(values: NDArray[Any], dtype: type, size: int) -> NDArray[np.uint8]:
        padded: NDArray[Any] = np.zeros(size, dtype)
        padded[: len(values)] = values.astype(dtype)
        return padded.view(np.uint8)

    keys = fmt.padded_key_dim
    # A quotient that is a whole number but for its rounding is that number.
    largest = np.ceil(np.round(kept.max(axis=0) / step, 6))
    smallest = np.floor(np.round(kept.min(axis=0) / step, 6))
    contents = {
        "mean": channels(floats.bfloat16_bits(mean), np.uint16, keys),
        "max": channels(largest, np.int8, keys),
        "min": channels(smallest, np.int8, keys),
        "numbers": np.array([unit, len(centred), 0, 0], np.float32).view(np.uint8),
        "deviation": channels(np.minimum(255, np.rint(2 * spread / step)), np.uint8, keys),
        "value_mean": channels(
            floats.bfloat16_bits(floats.round_bfloat16(value_mean)),
            np.uint16,
            fmt.padded_value_dim,
        ),
    }
    for name, field in fmt.index_fields.items():
        row[field.offset : field.end] = contents[name]
    return row


def read_page(
    record: NDArray[np.uint8],
    index: NDArray[np.uint8],
    fmt: PageFormat,
    dtype: str = "fp32",
    draft: bool = False,
) -> Page:
    """The page in a record and its index row, 64 tokens, true head dims.

    draft: the upper planes of "int8-planes" alone, each code 16u + 8.
    """
    mean_field = fmt.index_fields["mean"]
    bits = index[mean_field.offset : mean_field.end].view(np.uint16)
    mean = floats.from_bfloat16_bits(bits)[: fmt.key_dim]
    sides = _get(record, fmt, "key_scales").view(np.float32)
    scales = np.full(PAGE, sides[0], np.float32)
    if fmt.key.scale_per_token:
        scales = _get(record, fmt, "token_scales").view(np.float32)
    if fmt.key.map == "float":
        mean = np.zeros_like(mean)
        keys = _get_floats(record, fmt, "keys", fmt.padded_key_dim, dtype)
    else:
        keys = _get_codes(record, fmt, "keys", fmt.key, fmt.padded_key_dim, False, draft)
    value_scales = _get(record, fmt, "value_scales").view(np.float32)[: fmt.value_dim]
    if fmt.value.map == "float":
        values = _get_floats(record, fmt, "values", fmt.padded_value_dim, dtype)
        value_scales = np.ones_like(value_scales)
    else:
        values = _get_codes(record, fmt, "values", fmt.value, fmt.padded_value_dim, True, draft)
    return Page(keys[:, : fmt.key_dim], scales, mean, values[:, : fmt.value_dim], value_scales)


# Bytes


def pad(codes: NDArray[np.float64], channels: int, codec: PageCodec) -> NDArray[np.uint8]:
    """Codes [n, D] → uint8 [64, channels]: int8 and E4M3 codes, or u of the narrow codecs; 0 in
    padded tokens and channels."""
    padded = np.zeros((PAGE, channels), np.uint8)
    if codec.map == "e4m3":
        stored = floats.encode_e4m3(codes)
    elif codec.name in ("int4", "int2"):
        mask = 2**codec.bits - 1
        stored = (np.floor(codes / 2.0 ** (8 - codec.bits)).astype(np.int64) & mask).astype(
            np.uint8
        )
    else:
        stored = codes.astype(np.int8).view(np.uint8)
    padded[: codes.shape[0], : codes.shape[1]] = stored
    return padded


def split_bytes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """uint8 [64, C] of `bits` bits each → [64, C * bits / 8]: parts of the channels in one byte,
    the first part in the low bits."""
    parts = np.split(codes, 8 // bits, axis=1)
    joined: NDArray[np.uint8] = np.bitwise_or.reduce(
        [part << np.uint8(bits * i) for i, part in enumerate(parts)]
    )
    return joined


def join_bytes(stored: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of `split_bytes`."""
    mask = 2**bits - 1
    return np.concatenate([(stored >> (bits * i)) & mask for i in range(8 // bits)], axis=1)


def order(stored: NDArray[np.uint8], values: bool) -> NDArray[np.uint8]:
    """uint8 [64, B] → bytes in memory order: units of 16 channels (keys) or 16 tokens (values)."""
    blocks = stored.reshape(_SUBPAGES, SUBPAGE, -1)
    if values:
        return np.ascontiguousarray(blocks.swapaxes(1, 2)).reshape(-1)
    units = blocks.reshape(_SUBPAGES, SUBPAGE, -1, UNIT)
    return np.ascontiguousarray(units.swapaxes(1, 2)).reshape(-1)


def unorder(flat: NDArray[np.uint8], values: bool) -> NDArray[np.uint8]:
    """The inverse of `order`: uint8 [64, B]."""
    width = flat.size // PAGE
    if values:
        return flat.reshape(_SUBPAGES, width, SUBPAGE).swapaxes(1, 2).reshape(PAGE, width)
    units = flat.reshape(_SUBPAGES, width // UNIT, SUBPAGE, UNIT)
    return units.swapaxes(1, 2).reshape(PAGE, width)


def _put_codes(
    record: NDArray[np.uint8],
    fmt: PageFormat,
    name: str,
    codec: PageCodec,
    codes: NDArray[np.uint8],
    values: bool,
) -> None:
    if codec.planes == 2:
        _put(record, fmt, name, order(split_bytes(codes >> np.uint8(4), 4), values))
        _put(record, fmt, f"{name}_low", order(split_bytes(codes & np.uint8(15), 4), values))
    else:
        _put(record, fmt, name, order(split_bytes(codes, codec.bits), values))


def _get_codes(
    record: NDArray[np.uint8],
    fmt: PageFormat,
    name: str,
    codec: PageCodec,
    channels: int,
    values: bool,
    draft: bool,
) -> NDArray[np.float64]:
    """The numbers that are multiplied, [64, channels]."""
    bits = codec.plane_bits
    stored = join_bytes(unorder(_get(record, fmt, name), values), bits)
    if codec.map == "e4m3":
        return floats.decode_e4m3(stored)
    upper = (stored << (8 - bits)).view(np.int8).astype(np.float64)  # u * 2**(8 - bits)
    if codec.name == "int8":
        return upper
    if codec.planes == 2 and not draft:
        return upper + join_bytes(unorder(_get(record, fmt, f"{name}_low"), values), 4)
    return upper + 2.0 ** (7 - bits)


def _put_floats(
    record: NDArray[np.uint8],
    fmt: PageFormat,
    name: str,
    numbers: FloatArray,
    channels: int,
    dtype: str,
) -> None:
    padded = np.zeros((PAGE, channels), np.float32)
    padded[: numbers.shape[0], : numbers.shape[1]] = numbers
    if dtype == "bf16":
        _put(record, fmt, name, floats.bfloat16_bits(padded))
    else:
        _put(record, fmt, name, padded.astype(np.float16 if dtype == "fp16" else np.float32))


def _get_floats(
    record: NDArray[np.uint8], fmt: PageFormat, name: str, channels: int, dtype: str
) -> NDArray[np.float64]:
    stored = _get(record, fmt, name)
    if dtype == "bf16":
        numbers = floats.from_bfloat16_bits(stored.view(np.uint16))
    else:
        numbers = stored.view(np.float16 if dtype == "fp16" else np.float32).astype(np.float32)
    return numbers.reshape(PAGE, channels).astype(np.float64)


def _put(record: NDArray[np.uint8], fmt: PageFormat, name: str, array: NDArray[Any]) -> None:
    field = fmt.fields[name]
    record[field.offset : field.end] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _get(record: NDArray[np.uint8], fmt: PageFormat, name: str) -> NDArray[np.uint8]:
    field = fmt.fields[name]
    return np.ascontiguousarray(record[field.offset : field.end])
