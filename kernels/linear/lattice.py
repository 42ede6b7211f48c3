"""`linear` over a lattice, on any backend: x G, then `linear` of that over the whole numbers z.

The generators are multiplied into x, d columns at a time, in float64 and rounded once to fp32; an
activation format rounds what comes out. On a GPU float activations are then rounded to x's type,
which the tensor core takes: a CPU multiplies the fp32 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lath.formats.activations import ActivationFormat
from lath.formats.device import DeviceDescription
from lath.formats.lattice import LatticeCodec, LatticeTensor
from lath.formats.plan import Backend, Plan
from lath.kernels.linear import plan as planes


def plan_linear(
    m: int,
    n: int,
    k: int,
    codec: LatticeCodec,
    activations: ActivationFormat,
    dtype: torch.dtype,
    device: DeviceDescription,
    backend: Backend | None = None,
) -> Plan:
    """The plan of the points' own `linear`, with the cost of x G."""
    columns = codec.columns_of_points(k)
    made = planes.plan_linear(m, n, columns, codec.points, activations, dtype, device, backend)
    if made.backend == "reference":
        return made
    why = f"x times generators of {codec.dimension} first"
    if made.backend == "triton" and activations.kind == "float":
        why += f", rounded to {planes.DTYPE_NAMES[dtype]}"
    transformed = 8 * m * columns + 4 * codec.points.num_groups(columns) * codec.dimension**2
    return replace(
        made,
        reason=f"{why}; {made.reason}",
        bytes_moved=made.bytes_moved + transformed,
        operations=made.operations + 2 * m * columns * codec.dimension,
    )


def linear(
    x: Tensor,
    weight: LatticeTensor,
    bias: Tensor | None,
    activations: ActivationFormat,
    plan: Plan,
    out: Tensor | None = None,
) -> Tensor:
    """y [M, N] = A(x G) zᵀ + bias of x's dtype, by the kernels of the backend of `plan`.

    x [M, K], weight [N, K], bias [N] or None. out: fp32 [M, N], contiguous; filled and returned in
    place of a new tensor.
    """
    turned = weight.transform(x)
    if plan.backend == "cpu":
        from lath.kernels.linear import cpu

        y = cpu.linear(turned, weight.points, bias, activations, plan, out)
    else:
        from lath.kernels.linear import triton

        turned = turned.to(x.dtype) if activations.kind == "float" else turned
        y = triton.linear(turned, weight.points, bias, activations, plan, out)
    return y if out is not None else y.to(x.dtype)


def prepare(
    weight: LatticeTensor, bias: Tensor | None = None, activations: ActivationFormat | None = None
) -> Callable[[Tensor], Tensor]:
    """The layer of a weight [N, K] on the CPU and a bias [N]: x [..., K] → [..., N]."""
    from lath.kernels.linear import cpu

    points = cpu.prepare(weight.points, bias, activations)
    columns = weight.shape[1]

    def layer(x: Tensor) -> Tensor:
        if x.shape[-1] != columns or not x.is_cpu:
            raise ValueError(f"x must be [..., {columns}] on the CPU, got {[*x.shape]}")
        if x.dtype not in planes.DTYPE_NAMES:
            raise TypeError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
        turned = weight.transform(x.reshape(math.prod(x.shape[:-1]), columns))
        return points(turned).reshape(*x.shape[:-1], weight.shape[0]).to(x.dtype)

    return layer
