"""Attention over disjoint sets of keys, put together: portable, in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [n, ..., E] and lses [n, ...] of n disjoint sets of keys -> those of their union.

    fp32 (or fp64) both, lses in natural units; the same come back without the first axis. Summed in
    the order given. A part with lse -inf read nothing, whatever its output holds; where no part
    read anything the result is 0 and -inf. A NaN in a part's lse makes the result NaN.
    """
    largest = lses.max(dim=0).values
    shift = torch.where(torch.isneginf(largest), 0.0, largest)
    total = torch.zeros_like(largest)
    summed = torch.zeros_like(outputs[0])
    for output, lse in zip(outputs.unbind(), lses.unbind(), strict=True):
        weight = torch.exp(lse - shift)
        total = total + weight
        read = ~torch.isneginf(lse)[..., None]
        summed = summed + torch.where(read, output, 0.0) * weight[..., None]
    empty = total == 0
    divisor = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, shift + torch.log(divisor))
    return summed / divisor[..., None], lse
