"""`lath.linear`: y = x Wᵀ + bias with a packed weight."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lath.formats.activations import ActivationFormat, activation_format
from lath.formats.codec import codec as parse_codec
from lath.formats.plan import Backend
from lath.formats.qtensor import QTensor
from lath.kernels.linear.plan import plan_linear
from lath.reference import linear as reference
from lath.verbs.backends import resolve_backend
from lath.verbs.checks import check_same_device, check_tensor
from lath.verbs.planning import describe_device


def linear(
    x: Tensor,
    weight: QTensor,
    bias: Tensor | None = None,
    *,
    activations: str | ActivationFormat = "float",
    backend: str = "auto",
) -> Tensor:
    """y[..., n] = Σ_k A(x)[..., k] * W[n, k] + bias[n].

    x: [..., K] float16, bfloat16 or float32. weight: a QTensor [N, K] on the same device.
    bias: [N] of a floating dtype, or None. activations: the numbers that are multiplied, "float"
    (x itself), or "int8", "int6", "fp8", "fp8-e5m2" (rounded per token), each also with "-gG" (per
    token and group of G along K); they mean the same on every backend. backend: "auto", "triton",
    "cpu" or "reference"; a named backend runs or raises.

    Returns [..., N] of x's dtype: scales and bias in fp32, rounded once. Differentiable in x (the
    rounding of activations counts as the identity), not in the weight or the bias.
    """
    x = check_tensor("x", x)
    if not isinstance(weight, QTensor):
        raise TypeError(f"weight must be a lath.QTensor, got {type(weight).__name__}")
    check_same_device("x", x, weight.device)
    rows, columns = weight.shape
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"x must be [..., {columns}] for a weight {weight.shape}, got {[*x.shape]}"
        )
    if bias is not None:
        check_same_device("bias", check_tensor("bias", bias), weight.device)
        if tuple(bias.shape) != (rows,):
            raise ValueError(
                f"bias must be [{rows}] for a weight {weight.shape}, got {[*bias.shape]}"
            )
    activations = activation_format(activations)
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        y: Tensor = _operator(
            x, weight.codes, weight.scales, weight.zeros, weight.outer, weight.table, bias,
            str(weight.codec), rows, columns, str(activations), backend,
        )  # fmt: skip
        return y
    return run_linear(x, weight, bias, activations, resolve_backend(backend, weight.device))


def run_linear(
    x: Tensor,
    weight: QTensor,
    bias: Tensor | None,
    activations: ActivationFormat,
    backend: Backend,
) -> Tensor:
    """`linear` with its arguments checked and its backend chosen."""
    rows, columns = weight.shape
    x2d = x.reshape(math.prod(x.shape[:-1]), columns)  # -1 is ambiguous where K is 0
    if backend == "reference":
        y = _run_reference(x2d, weight, bias, activations)
    else:
        device = describe_device(x.device)
        plan = plan_linear(
            x2d.shape[0], rows, columns, weight.codec, activations, x.dtype, device, backend
        )
        y = _kernel(backend)(x2d, weight, bias, activations, plan)
    return y.reshape(*x.shape[:-1], rows)


def _kernel(backend: Backend) -> Any:
    """The launcher of a backend, imported on first use."""
    if backend == "triton":
        from lath.kernels.linear.triton import linear as launch
    else:
        from lath.kernels.linear.cpu import linear as launch
    return launch


def _run_reference(
    x: Tensor, weight: QTensor, bias: Tensor | None, activations: ActivationFormat
) -> Tensor:
    """The NumPy definition, rounded once to x's dtype."""
    rows = weight.shape[0]

    def array(side: Tensor | None) -> Any:
        return None if side is None else side[..., :rows].cpu().numpy()

    y = reference.linear(
        x.detach().float().cpu().numpy(),
        weight.unpack_codes().cpu().numpy(),
        array(weight.scales),
        array(weight.zeros),
        weight.codec,
        None if bias is None else bias.detach().float().cpu().numpy(),
        activations,
        array(weight.outer),
        None if weight.table is None else weight.table.cpu().numpy(),
    )
    return torch.from_numpy(np.ascontiguousarray(y)).to(device=x.device, dtype=x.dtype)


@torch.library.custom_op("lath::linear", mutates_args=())
def _operator(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    outer: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    codec: str,
    rows: int,
    columns: int,
    activations: str,
    backend: str,
) -> Tensor:
    """`linear` on bare tensors: what torch.compile and torch.export record."""
    packed = QTensor(parse_codec(codec), (rows, columns), codes, scales, zeros, outer, table)
    chosen = resolve_backend(backend, codes.device)
    y = run_linear(x.detach(), packed, bias, activation_format(activations), chosen)
    return y.contiguous()


@_operator.register_fake
def _fake(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    outer: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    codec: str,
    rows: int,
    columns: int,
    activations: str,
    backend: str,
) -> Tensor:
    if x.shape[-1] != columns:
        raise ValueError(f"x must be [..., {columns}], got {[*x.shape]}")
    return x.new_empty((*x.shape[:-1], rows))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scales, zeros, outer, table, _, codec, rows, columns, _, _ = inputs
    ctx.save_for_backward(codes, scales, zeros, outer, table)
    ctx.weight = (codec, (rows, columns))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codec, shape = ctx.weight
    dense = QTensor(parse_codec(codec), shape, *ctx.saved_tensors).dequantize(grad.dtype)
    return (grad @ dense, *[None] * 11)


_operator.register_autograd(_backward, setup_context=_save_for_backward)
