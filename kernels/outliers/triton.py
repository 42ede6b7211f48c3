"""`linear` of outliers on a GPU: each program follows a few rows of entries to columns of x."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lath.formats.activations import ActivationFormat
from lath.formats.outliers import Outliers
from lath.formats.plan import Plan
from lath.kernels.linear.triton import device_of
from lath.kernels.outliers.plan import GATHER_TOKENS


@triton.jit
def gather_kernel(
    x,
    columns,
    values,
    offsets,
    bias,
    y,
    M,
    N,
    token_stride,
    column_stride,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[m, n] = Σ over the entries of row n, value * x[m, column], plus bias: fp32, rounded once.

    The rows of a program go on together until the longest of them ends. Lanes beyond the end of a
    row read nothing and add 0 * 0: a NaN in x reaches only the rows that have its column.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tl.load(offsets + row, mask=row < N, other=0)
    end = tl.load(offsets + row + 1, mask=row < N, other=0)
    longest = tl.max(end - begin, axis=0)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_rows = x + token.to(tl.int64)[:, None, None] * token_stride
    for first in range(0, longest, BLOCK_K):
        entry = begin[:, None] + first + tl.arange(0, BLOCK_K)[None, :]
        inside = entry < end[:, None]
        column = tl.load(columns + entry, mask=inside, other=0).to(tl.int64)
        value = tl.load(values + entry, mask=inside, other=0).to(tl.float32)
        read = inside[None, :, :] & (token < M)[:, None, None]
        number = tl.load(x_rows + column[None, :, :] * column_stride, mask=read, other=0)
        total += tl.sum(number.to(tl.float32) * value[None, :, :], axis=2)
    if BIAS:
        total += tl.load(bias + row, mask=row < N, other=0).to(tl.float32)[None, :]
    stored = (token < M)[:, None] & (row < N)[None, :]
    pointers = y + token.to(tl.int64)[:, None] * N + row[None, :]
    tl.store(pointers, total.to(y.dtype.element_ty), mask=stored)


def linear(
    x: Tensor,
    weight: Outliers,
    bias: Tensor | None,
    activations: ActivationFormat,
    plan: Plan,
    out: Tensor | None = None,
) -> Tensor:
    """x [M, K] times the outliers of [N, K], plus bias [N]: [M, N] of x's dtype, or `out` (fp32).

    activations: "float", as the plan requires. Sums are fp32.
    """
    tokens, rows = x.shape[0], weight.shape[0]
    y = x.new_empty((tokens, rows)) if out is None else out
    if y.numel() == 0:
        return y
    if tokens > GATHER_TOKENS:
        x = x.t().contiguous().t()
    grid = (triton.cdiv(rows, plan.block_n), triton.cdiv(tokens, plan.block_m))
    with device_of(x):
        gather_kernel[grid](
            x, weight.codes, weight.values, weight.offsets,
            weight.values if bias is None else bias.contiguous(), y,
            tokens, rows, x.stride(0), x.stride(1), BIAS=bias is not None,
            BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, num_warps=plan.warps,
        )  # fmt: skip
    return y
