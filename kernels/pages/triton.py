"""Writes pages on a GPU in Triton: one program per page and KV head (`lath.formats.pages`)."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from lath.formats.activations import SMALLEST_ABSMAX
from lath.formats.pages import PageCodec, PageFormat
from lath.kernels.pages import triton_write as kernels


def write_pages(
    keys: Tensor, values: Tensor, fmt: PageFormat, records: Tensor, index: Tensor, jobs: Tensor
) -> None:
    """Write records[page, head] and index[page, head] of every job and KV head, in place.

    keys [B, Hkv, L, D], values [B, Hkv, L, E]: fp16, bf16 or fp32, both the same, any strides with
    the last one 1. records, index: uint8 [N, Hkv, bytes], contiguous. jobs: int32 [J, 4] on the
    same device, each (row b, first token, count 1..64, page number). The mean is summed in fp32 in
    an order of its own; all else is the definition's bit for bit given that mean (max and min may
    be one step further out, the deviation one step off).
    """
    for name, tensor in (("records", records), ("index", index)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.stride(3) != 1 and tensor.shape[3] > 1:
            raise ValueError(f"{name} must have last stride 1, got strides {tensor.stride()}")
    if keys.dtype != values.dtype:
        raise ValueError(f"values must be of keys' dtype, {keys.dtype}, got {values.dtype}")
    if jobs.shape[0] == 0 or keys.shape[1] == 0:
        return
    floats = {codec: codec.map == "float" for codec in (fmt.key, fmt.value)}
    if any(floats.values()) and fmt.float_bytes != keys.dtype.itemsize:
        raise ValueError(
            f"fmt float_bytes must be that of keys, {keys.dtype.itemsize}, got {fmt.float_bytes}"
        )
    arguments = _settings(fmt)
    with torch.cuda.device(keys.device) if keys.is_cuda else contextlib.nullcontext():
        kernels.write_kernel[(jobs.shape[0], keys.shape[1])](
            keys, values, jobs.contiguous(), _records_as(records, fmt.key, keys.dtype),
            _records_as(records, fmt.value, keys.dtype), records.view(torch.float32),
            index.view(torch.bfloat16), index.view(torch.int8), index.view(torch.float32),
            *keys.stride()[:3], *values.stride()[:3], **arguments,
            num_warps=_warps(fmt), enable_fp_fusion=False,
        )  # fmt: skip


def _records_as(records: Tensor, codec: PageCodec, dtype: torch.dtype) -> Tensor:
    return records.view(dtype) if codec.map == "float" else records


def _warps(fmt: PageFormat) -> int:
    """So many that a page's numbers stay in registers; more only replicate sums over tokens."""
    channels = max(fmt.padded_key_dim, fmt.padded_value_dim)
    e4m3 = "e4m3" in (fmt.key.name, fmt.value.name)  # rounded with integer arithmetic
    return 8 if channels > (64 if e4m3 else 128) else 4


@functools.lru_cache(maxsize=256)
def _settings(fmt: PageFormat) -> dict[str, Any]:
    """The constexpr arguments of `write_kernel`."""
    fields, index = fmt.fields, fmt.index_fields
    layouts = []
    for name, codec, channels in (
        ("keys", fmt.key, fmt.padded_key_dim),
        ("values", fmt.value, fmt.padded_value_dim),
    ):
        size = fmt.float_bytes if codec.map == "float" else 1
        parts = 8 // codec.plane_bits if codec.map == "integer" else 1
        if codec.name == "e4m3" and channels > 128:
            parts = 4  # rounding whole rows at once takes 288 bytes more than the registers
        low = fields[f"{name}_low"].offset if codec.planes == 2 else 0
        block = max(16, 1 << (channels // parts - 1).bit_length())
        at, record = fields[name].offset // size, fmt.record_bytes // size
        layouts.append((codec.name, parts, channels // parts, block, at, low, record))
    token_scales = fields["token_scales"].offset // 4 if "token_scales" in fields else 0
    return {
        "KEYS": layouts[0],
        "VALUES": layouts[1],
        "RECORD": (
            fmt.record_bytes // 4, fields["value_scales"].offset // 4,
            fields["key_scales"].offset // 4, token_scales,
        ),
        "INDEX": (
            fmt.index_bytes, index["max"].offset, index["min"].offset, index["deviation"].offset,
            index["numbers"].offset // 4, index["value_mean"].offset // 2,
        ),
        "KEY_DIM": fmt.key_dim,
        "VALUE_DIM": fmt.value_dim,
        "SMALLEST": SMALLEST_ABSMAX,
    }  # fmt: skip
