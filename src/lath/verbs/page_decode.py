"""The numbers that pages hold, in torch: for reading a cache back, repair and re-rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from lath.formats.pages import PAGE, SUBPAGE, UNIT, Field, PageCodec, PageFormat


def decode_pages(
    records: Tensor, index: Tensor, fmt: PageFormat, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """records uint8 [..., record_bytes] and index rows → keys [..., 64, D], values [..., 64, E].

    fp64: codes times scales (plus the mean) without rounding. dtype: what float codecs hold. Slots
    beyond a page's count hold whatever their codes say.
    """
    keys = _codes(records, fmt, "keys", fmt.key, dtype)[..., : fmt.key_dim]
    if fmt.key.map != "float":
        name = "token_scales" if fmt.key.scale_per_token else "key_scales"
        scales = _field(records, fmt, name).view(torch.float32).double()
        scales = scales if fmt.key.scale_per_token else scales[..., :1]
        span = fmt.index_fields["mean"]
        mean = index[..., span.offset : span.end].contiguous().view(torch.bfloat16).double()
        keys = keys * scales[..., None] + mean[..., None, : fmt.key_dim]
    values = _codes(records, fmt, "values", fmt.value, dtype)[..., : fmt.value_dim]
    if fmt.value.map != "float":
        scales = _field(records, fmt, "value_scales").view(torch.float32).double()
        values = values * scales[..., None, : fmt.value_dim]
    return keys, values


def _field(records: Tensor, fmt: PageFormat, name: str) -> Tensor:
    field = fmt.fields[name]
    return records[..., field.offset : field.end].contiguous()


def _codes(
    records: Tensor, fmt: PageFormat, name: str, codec: PageCodec, dtype: torch.dtype
) -> Tensor:
    """The numbers that are multiplied, fp64 [..., 64, padded channels]."""
    stored = _field(records, fmt, name)
    if codec.map == "float":
        numbers = stored.view(dtype)
        return numbers.reshape(*stored.shape[:-1], PAGE, numbers.shape[-1] // PAGE).double()
    values = name == "values"
    codes = _split(_rows(stored, values), codec.plane_bits)
    if codec.map == "e4m3":
        return codes.view(torch.float8_e4m3fn).double()
    signed = (codes << (8 - codec.plane_bits)).view(torch.int8).double()
    if codec.name == "int8":
        return signed
    if codec.planes == 2:
        return signed + _split(_rows(_field(records, fmt, f"{name}_low"), values), 4)
    halfway: float = 2.0 ** (7 - codec.bits)
    return signed + halfway


def _rows(stored: Tensor, values: bool) -> Tensor:
    """Bytes in memory order → uint8 [..., 64, bytes of a token]."""
    outer, subpages, width = stored.shape[:-1], PAGE // SUBPAGE, stored.shape[-1] // PAGE
    if values:
        ordered = stored.reshape(*outer, subpages, width, SUBPAGE).transpose(-1, -2)
    else:
        units = stored.reshape(*outer, subpages, width // UNIT, SUBPAGE, UNIT)
        ordered = units.transpose(-2, -3)
    return ordered.reshape(*outer, PAGE, width)


def _split(stored: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits: the channels' parts, the first in the low bits, side by side."""
    mask = 2**bits - 1
    return torch.cat([(stored >> (bits * i)) & mask for i in range(8 // bits)], dim=-1)


def read_field(rows: Tensor, field: Field, dtype: torch.dtype) -> Tensor:
    """A field of records or index rows uint8 [..., bytes] as numbers of `dtype`."""
    return rows[..., field.offset : field.end].contiguous().view(dtype)


def mean_over_tokens(numbers: Tensor, index: Tensor, fmt: PageFormat, unit: int = PAGE) -> Tensor:
    """Numbers of tokens [n, Hkv, 64] → [n, Hkv, 64 / unit], the mean over those of each unit that
    its page was written with; 0 of none."""
    written = read_field(index, fmt.index_fields["numbers"], torch.float32)[..., 1, None]
    used = torch.arange(PAGE, device=index.device) < written
    units = (*numbers.shape[:-1], PAGE // unit, unit)
    total = numbers.masked_fill(~used, 0).reshape(units).sum(-1)
    mean: Tensor = total / used.reshape(units).sum(-1).clamp(min=1)
    return mean
