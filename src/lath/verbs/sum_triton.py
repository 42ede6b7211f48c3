"""`linear` of a sum of packed weights on a GPU."""

from __future__ import annotations

from torch import Tensor

from lath.formats.activations import ActivationFormat
from lath.formats.plan import Plan
from lath.formats.sum_tensor import SumTensor
from lath.kernels.linear.triton import reduce
from lath.verbs.sum_plan import run_terms


def linear(
    x: Tensor,
    weight: SumTensor,
    bias: Tensor | None,
    activations: ActivationFormat,
    plan: Plan,
    out: Tensor | None = None,
) -> Tensor:
    """y [M, N] of x's dtype, or `out` (fp32)."""
    y = x.new_empty((x.shape[0], weight.shape[0])) if out is None else out
    if y.numel():
        reduce(run_terms(x, weight, bias, activations, plan, "triton"), None, y)
    return y
