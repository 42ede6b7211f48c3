"""The column scales of AWQ in torch: `lath.reference.quantizers.awq_scales`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lath.formats.qtensor import QTensor


def awq_scales(
    weights: Sequence[Tensor],
    hessian: Tensor,
    grid: int,
    rounded: Callable[[Tensor], QTensor],
    shared: Tensor | None,
) -> Tensor:
    """fp32 [K]. rounded: a weight [N, K] to its packed form. shared: int64 [K] or None."""
    square = hessian.diagonal().double()
    if shared is not None:
        count = torch.bincount(shared)
        square = (torch.bincount(shared, square) / count)[shared]
    best = torch.ones(len(square), device=square.device)
    if not bool((square > 0).any()):
        return best
    rms = torch.where(square > 0, square, square[square > 0].min()).sqrt()
    best_error = math.inf
    for step in range(grid):
        s = rms ** (step / grid)
        s = (s / (s.max() * s.min()).sqrt()).float()
        error = 0.0
        for weight in weights:
            wide = weight.float()
            decoded = rounded(wide * s).dequantize()
            error += output_error(decoded.double() / s.double() - wide.double(), hessian)
        if error < best_error:
            best, best_error = s, error
    return best


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """tr(D H Dᵀ) = Σ_t ||D x_t||² of a difference of weights [N, K], in the Hessian's dtype."""
    own = difference.to(hessian.dtype)
    return float(((own @ hessian) * own).sum(dtype=torch.float64))
