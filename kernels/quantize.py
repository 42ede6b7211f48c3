"""Round-to-nearest quantisation in torch, on the device of the weight.

The same steps as `lath.reference.codecs.quantize`, which says what they mean, for all groups of a
weight at once. Every fp32 operation is the same one in the same order, so the codes agree bit for
bit (a one-bit scale is a float64 mean: it may differ in its last stored bit).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lath.formats import packing
from lath.formats.codec import Codec
from lath.formats.qtensor import SCALE_DTYPES, QTensor
from lath.kernels.quantize_tables import quantize_in_steps

_SMALLEST_SCALE = {"fp16": 2.0**-24, "fp32": 2.0**-126}
_SEARCH_RATIOS = [(64 - i) / 64 for i in range(33)]
# Weights quantised at once: bounds the temporary memory (about 40 bytes per weight) to 0.7 GB.
_CHUNK_WEIGHTS = 1 << 24


def quantize(
    weight: Tensor, codec: Codec, search: bool = False, table: Tensor | None = None
) -> QTensor:
    """weight [N, K] fp16, bf16 or fp32 → QTensor; ValueError on NaN, infinity or overflow.

    table: fp32 [levels], ascending, of a learned codec; None: found here.
    """
    rows, columns = weight.shape
    if codec.values != "integer" or codec.scale_dtype not in ("fp16", "fp32"):
        return quantize_in_steps(weight, codec, search, table)
    chunk = max(1, _CHUNK_WEIGHTS // max(columns, 1))
    parts = [
        _quantize_rows(weight[start : start + chunk].float(), codec, search)
        for start in range(0, rows, chunk)
    ]
    if not parts:
        parts = [_quantize_rows(weight.float(), codec, search)]
    codes = torch.cat([part[0] for part in parts])
    pad = (0, -rows % packing.PANEL)
    scales = torch.nn.functional.pad(torch.cat([part[1] for part in parts], dim=1), pad)
    zeros = None
    if codec.zero != "none":
        zeros = torch.nn.functional.pad(torch.cat([part[2] for part in parts], dim=1), pad)
    return QTensor(codec, (rows, columns), packing.pack(codes, codec), scales, zeros)


def _quantize_rows(weight: Tensor, codec: Codec, search: bool) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 [N, K] → codes uint8 [N, K], scales [G, N], zeros [G, N]."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must be finite: it has NaN or infinity")
    rows, columns = weight.shape
    size = codec.group_size(columns)
    whole = columns // size * size
    zero_dtype = torch.uint8 if codec.zero == "integer" else SCALE_DTYPES[codec.scale_dtype]
    codes = weight.new_empty((rows, columns), dtype=torch.uint8)
    scales = weight.new_empty(
        (codec.num_groups(columns), rows), dtype=SCALE_DTYPES[codec.scale_dtype]
    )
    zeros = weight.new_zeros((codec.num_groups(columns), rows), dtype=zero_dtype)
    for start, stop, width in ((0, whole, size), (whole, columns, columns - whole)):
        if start == stop or rows == 0:
            continue
        blocks = weight[:, start:stop].reshape(rows, -1, width)
        q, s, z = _best(blocks, codec, search)
        codes[:, start:stop] = q.reshape(rows, -1)
        first = start // size
        scales[first : first + blocks.shape[1]] = s.T
        if codec.zero != "none":
            zeros[first : first + blocks.shape[1]] = z.T
    return codes, scales, zeros


def _best(blocks: Tensor, codec: Codec, search: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Groups [N, G, g] → codes, scales [N, G], zeros [N, G] of the least squared error."""
    best = _quantize_groups(blocks, codec, 1.0)
    if not search:
        return best
    codes, scales, zeros = best
    best_loss = _loss(blocks, best, codec)
    for ratio in _SEARCH_RATIOS[1:]:
        trial = _quantize_groups(blocks, codec, ratio)
        loss = _loss(blocks, trial, codec)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        codes = torch.where(better[..., None], trial[0], codes)
        scales = torch.where(better, trial[1], scales)
        zeros = torch.where(better, trial[2], zeros)
    return codes, scales, zeros


def _loss(blocks: Tensor, trial: tuple[Tensor, Tensor, Tensor], codec: Codec) -> Tensor:
    codes, scales, zeros = (part.double() for part in trial)
    if codec.zero == "float":
        decoded = codes * scales[..., None] + zeros[..., None]
    elif codec.zero == "integer":
        decoded = (codes - zeros[..., None]) * scales[..., None]
    else:
        decoded = (codes - codec.zero_code) * scales[..., None]
    return (decoded - blocks.double()).square_().sum(dim=-1)


def _quantize_groups(blocks: Tensor, codec: Codec, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """One fraction of the range; the branches are those of the definition."""
    top = codec.levels - 1
    if codec.zero == "none":
        no_zeros = blocks.new_zeros(blocks.shape[:-1])
        if codec.bits == 1:
            mean = blocks.double().abs().mean(dim=-1)
            return (blocks >= 0).to(torch.uint8), _store((2 * mean).float(), codec), no_zeros
        absmax = blocks.abs().amax(dim=-1) * ratio
        scale = _scale(absmax / (codec.levels / 2 - 0.5), codec)
        code = torch.round(blocks / scale.float()[..., None]) + codec.zero_code
        return code.clamp_(0, top).to(torch.uint8), scale, no_zeros
    low, high = blocks.amin(dim=-1), blocks.amax(dim=-1)
    if codec.zero == "integer":
        low, high = low.clamp(max=0) * ratio, high.clamp(min=0) * ratio
        scale = _scale((high - low) / top, codec)
        zero = torch.round(-low / scale.float()).clamp_(0, top)
        code = torch.round(blocks / scale.float()[..., None]) + zero[..., None]
        return code.clamp_(0, top).to(torch.uint8), scale, zero.to(torch.uint8)
    shrink = (high - low) * ((1 - ratio) / 2)
    scale = _scale(((high - shrink) - (low + shrink)) / top, codec)
    minimum = _store(low + shrink, codec)
    code = torch.round((blocks - minimum.float()[..., None]) / scale.float()[..., None])
    return code.clamp_(0, top).to(torch.uint8), scale, minimum


def _scale(exact: Tensor, codec: Codec) -> Tensor:
    floored = exact.clamp(min=_SMALLEST_SCALE[codec.scale_dtype])
    return _store(torch.where(exact == 0, torch.ones_like(exact), floored), codec)


def _store(exact: Tensor, codec: Codec) -> Tensor:
    stored = exact.to(SCALE_DTYPES[codec.scale_dtype])
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(
            f"weight is too large for {codec}: a scale or minimum of {float(exact.abs().max()):.3g}"
            f" overflows {codec.scale_dtype}; use '-s32' or scale the weight"
        )
    return stored
