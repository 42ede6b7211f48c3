"""GPTQ in torch, blocked: `lath.reference.quantizers.gptq` for all rows at once, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lath.formats.qtensor import QTensor
from lath.formats.quantizer import GPTQ
from lath.kernels.quantizers.grid import Grid, with_codes


@dataclass(frozen=True)
class Factor:
    """The damped Hessian, ready for every weight that reads the same inputs.

    order: int64 [K], columns as they are rounded. upper: float64 [K, K] upper triangular in that
    order, inv(H) = upperᵀ upper.
    """

    order: Tensor
    upper: Tensor


def factorize(hessian: Tensor, options: GPTQ) -> Factor:
    """ValueError if the damped Hessian is not positive definite.

    With J the reversal, J H J = L Lᵀ gives H = R Rᵀ with R = J L J upper triangular, so that
    inv(R) is the factor: one Cholesky and one triangular inverse in place of two and a full one.
    """
    wide = hessian.double()
    diagonal = wide.diagonal()
    columns = len(diagonal)
    if options.act_order:
        order = torch.sort(diagonal, descending=True, stable=True).indices
    else:
        order = torch.arange(columns, device=wide.device)
    wide = wide[order][:, order]
    mean = diagonal.mean() if columns else 0.0
    wide.diagonal().add_(options.damping * mean)
    lower, failed = torch.linalg.cholesky_ex(wide.flip(0, 1))
    # A pivot that is nothing but rounding is no pivot: its inverse would be noise.
    pivots = lower.diagonal().square()
    margin = columns * 2.0**-52 * wide.diagonal().max() if columns else 0.0
    if int(failed) or not bool((pivots > margin).all()):
        raise ValueError(
            f"hessian [{columns}, {columns}] is singular or not positive definite with damping "
            f"{options.damping}; raise the damping or calibrate on more tokens"
        )
    identity = torch.eye(columns, dtype=torch.float64, device=wide.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return Factor(order, upper)


def gptq(weight: Tensor, start: QTensor, factor: Factor, block: int) -> QTensor:
    """weight [N, K] with the scales, zeros and table of `start` and the codes of GPTQ."""
    rows, columns = weight.shape
    grid, order, upper = Grid.of(start), factor.order, factor.upper
    # A column is a contiguous row of the transposed weight.
    left = weight.double().T[order].contiguous()
    groups = (order // start.codec.group_size(columns)).tolist()
    codes = torch.empty((columns, rows), dtype=torch.uint8, device=weight.device)
    pivots = upper.diagonal().tolist()
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        own = left[begin:end]
        errors = torch.empty_like(own)
        for i in range(begin, end):
            column = left[i]
            code = grid.nearest(column, groups[i])
            codes[i] = code
            error = (column - grid.decode(code, groups[i])) / pivots[i]
            errors[i - begin] = error
            if i + 1 < end:
                own[i + 1 - begin :].addr_(upper[i, i + 1 : end], error, alpha=-1)
        if end < columns:
            left[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    unsorted = torch.empty_like(codes)
    unsorted[order] = codes
    return with_codes(start, unsorted.T.contiguous())
