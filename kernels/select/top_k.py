"""The largest k of each row in plain torch operations: any device, nothing waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

from lath.kernels.select.arguments import check_top_k

_INFINITY = 0x7F800000  # its bits as fp32


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices int32 [..., min(k, P)] of the largest of fp32 scores [..., P], ascending, -1 behind.

    The lower index wins a tie; -inf is never taken; NaN is larger than everything. TypeError for
    other scores than float32, ValueError for k < 0.
    """
    check_top_k(scores, k)
    width = scores.shape[-1]
    k = min(k, width)
    if k == 0:
        return torch.empty((*scores.shape[:-1], 0), dtype=torch.int32, device=scores.device)
    bits = scores.contiguous().view(torch.int32)
    size = bits & 0x7FFFFFFF
    # Integers in the order of the numbers: both zeros are one, so are all NaN.
    order = torch.where(bits < 0, -size, size)
    order = torch.where(size > _INFINITY, 0x7FFFFFFF, order)
    backwards = torch.arange(width - 1, -1, -1, device=scores.device)
    # No two are equal, so that it does not matter which of equal ones a device would take.
    keys = (order.long() << 32) + backwards
    taken = torch.topk(keys, k, sorted=False).values
    index = width - 1 - (taken & 0xFFFFFFFF)
    index = torch.where((taken >> 32) > -_INFINITY, index, width).sort().values
    return torch.where(index < width, index, -1).to(torch.int32)
