"""`linear` of a sum of packed weights on a GPU."""

from __future__ import annotations

from torch import Tensor

from lath.formats.activations import ActivationFormat
from lath.formats.plan import Plan
from lath.formats.sum_tensor import SumTensor
from lath.kernels.linear.triton import multiply_dense, reduce
from lath.verbs.sum_plan import run_terms


def linear(
    x: Tensor,
    weight: SumTensor,
    bias: Tensor | None,
    activations: ActivationFormat,
    plan: Plan,
    out: Tensor | None = None,
) -> Tensor:
    """y [M, N] of x's dtype, or `out` (fp32).

    "decode_matmul": all terms are decoded and added in fp32, rounded once to x's dtype, and
    multiplied once.
    """
    y = x.new_empty((x.shape[0], weight.shape[0])) if out is None else out
    if y.numel() and plan.dataflow == "decode_matmul":
        y.copy_(multiply_dense(x, weight.dequantize(x.dtype), bias, y.dtype))
    elif y.numel():
        reduce(run_terms(x, weight, bias, activations, plan, "triton"), None, y)
    return y
