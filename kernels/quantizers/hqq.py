"""HQQ in torch: `lath.reference.quantizers.hqq`, all whole groups of a weight at once."""

from __future__ import annotations

import torch
from torch import Tensor

from lath.formats.qtensor import QTensor
from lath.formats.quantizer import HQQ
from lath.kernels.quantizers.grid import Grid, with_codes


def hqq(weight: Tensor, start: QTensor, options: HQQ) -> QTensor:
    """weight [N, K] with the scales of `start` and the zeros and codes of HQQ."""
    assert start.zeros is not None
    rows, columns = weight.shape
    size = start.codec.group_size(columns)
    whole = columns // size * size
    codes = torch.empty((columns, rows), dtype=torch.uint8, device=weight.device)
    zeros = start.zeros.clone()
    grid, turned = Grid.of(start), weight.float().T.contiguous()
    for begin, end, width in ((0, whole, size), (whole, columns, columns - whole)):
        if begin == end or rows == 0:
            continue
        first, last = begin // size, -(-end // size)
        part = Grid(
            grid.codec, grid.scale[first:last, None], grid.zero[first:last, None],
            grid.entries, grid.by_number,
        )  # fmt: skip
        block = turned[begin:end].reshape(last - first, width, rows)
        q, zero = _best(block, part, zeros.dtype, options)
        codes[begin:end] = q.reshape(-1, rows)
        zeros[first:last, :rows] = zero[:, 0]
    packed = with_codes(start, codes.T.contiguous())
    packed = QTensor(packed.codec, packed.shape, packed.codes, packed.scales, zeros, packed.outer)
    return packed


def _best(block: Tensor, grid: Grid, dtype: torch.dtype, options: HQQ) -> tuple[Tensor, Tensor]:
    """block fp32 [G, g, N], sides [G, 1, N] → codes [G, g, N] and zeros [G, 1, N] in `dtype`."""
    wide, scale, everything = block.double(), grid.scale.double(), slice(None)
    zero = grid.zero.to(dtype)
    kept_codes, kept_zero = None, zero
    best = torch.full_like(scale, torch.inf)
    for step in range(options.rounds + 1):
        now = Grid(grid.codec, grid.scale, zero.float(), grid.entries, grid.by_number)
        q = now.nearest(block, everything)
        r = (wide - now.decode(q, everything)) / scale
        magnitude = r.abs()
        loss = magnitude.pow(options.p).sum(dim=1, keepdim=True)
        better = loss < best
        best = torch.where(better, loss, best)
        kept_codes = q if kept_codes is None else torch.where(better, q, kept_codes)
        kept_zero = torch.where(better, zero, kept_zero)
        beta = options.beta * options.kappa**step
        magnitude.clamp_(min=1e-30)
        e = r.sign() * (magnitude - magnitude.pow(options.p - 1) / beta).clamp_(min=0)
        zero = (wide - scale * (e + q)).mean(dim=1, keepdim=True).to(dtype)
    assert kept_codes is not None
    return kept_codes, kept_zero
