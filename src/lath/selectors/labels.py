"""Labels: keys on some channels, channel by channel: r of D channels are r / D of the bytes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lath.formats.page_pool import SideTable
from lath.formats.pages import PageFormat
from lath.selectors.base import Request
from lath.verbs.page_decode import decode_pages, read_field


def labels(request: Request, channels: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Labels and their scales fp32 [N, Hkv] of the cache's pages.

    channels: int64 [Hkv, C]. int8 [N, Hkv, C, 64] with 8 bits, uint8 [N, Hkv, C, 32] with 4: see
    `reference.select.write_labels` and `pack_labels`.
    """
    kv = request.kv
    name = f"labels-{bits}-{channels.tolist()}"
    compute = functools.partial(_labels, kv.format, kv.dtype, channels, bits)
    table = kv.pool.side_tables.setdefault(name, SideTable(compute))
    codes, scales = table.of(kv.pool, request.pages, request.view.table)
    return codes, scales


def _labels(
    fmt: PageFormat, dtype: torch.dtype, channels: Tensor, bits: int, records: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    keys, _ = decode_pages(records, index, fmt, dtype)
    if fmt.key.map == "float":
        centred = keys
    else:
        mean = read_field(index, fmt.index_fields["mean"], torch.bfloat16).double()
        centred = keys - mean[..., None, : fmt.key_dim]
    places = channels.to(keys.device)[None, :, None].expand(keys.shape[0], -1, keys.shape[2], -1)
    own = centred.gather(3, places).transpose(2, 3)
    if bits == 8 and fmt.key.name in ("int8", "int8-planes"):
        scales = read_field(records, fmt.fields["key_scales"], torch.float32)[..., 0]
        codes = torch.round(own / scales.double()[..., None, None])
        return torch.nan_to_num(codes).to(torch.int8), scales.contiguous()
    own = torch.nan_to_num(own, nan=0, posinf=0, neginf=0).float()
    levels = 127.0 if bits == 8 else 7.0
    amax = own.abs().amax(dim=(-1, -2)) if own.numel() else own.new_zeros(own.shape[:2])
    safe = torch.where(amax > 0, amax, 1.0)
    codes = torch.round(own * (levels / safe)[..., None, None]).to(torch.int8)
    scales = torch.where(amax > 0, safe / levels, 1.0)
    return (codes if bits == 8 else _pack(codes)), scales


def _pack(codes: Tensor) -> Tensor:
    halves = codes.view(torch.uint8) & 15
    return halves[..., :32] | (halves[..., 32:] << 4)
