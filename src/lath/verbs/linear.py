"""`lath.linear`: y = x Wᵀ + bias with a packed weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lath.formats.activations import ActivationFormat, activation_format
from lath.formats.families import weight_class, weight_codec
from lath.formats.packed_weight import PackedWeight
from lath.formats.plan import Backend
from lath.verbs.backends import resolve_backend
from lath.verbs.checks import check_same_device, check_tensor
from lath.verbs.kinds import kind_of
from lath.verbs.planning import describe_device


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    activations: str | ActivationFormat = "float",
    backend: str = "auto",
) -> Tensor:
    """y[..., n] = Σ_k A(x)[..., k] * W[n, k] + bias[n].

    x: [..., K] float16, bfloat16 or float32. weight: a packed weight [N, K] (`lath.quantize`)
    on the same device.
    bias: [N] of a floating dtype, or None. activations: the numbers that are multiplied, "float"
    (x itself), or "int8", "int6", "fp8", "fp8-e5m2" (rounded per token), each also with "-gG" (per
    token and group of G along K); they mean the same on every backend. backend: "auto", "triton",
    "cpu" or "reference"; a named backend runs or raises.

    Returns [..., N] of x's dtype: scales and bias in fp32, rounded once. Differentiable in x (the
    rounding of activations counts as the identity), not in the weight or the bias.
    """
    x = check_tensor("x", x)
    if not isinstance(weight, PackedWeight):
        raise TypeError(
            f"weight must be a packed weight such as lath.QTensor, got {type(weight).__name__}"
        )
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
            x, list(weight.tensors.values()), bias, str(weight.codec), rows, columns,
            str(activations), backend,
        )  # fmt: skip
        return y
    return run_linear(x, weight, bias, activations, resolve_backend(backend, weight.device))


def run_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    activations: ActivationFormat,
    backend: Backend,
) -> Tensor:
    """`linear` with its arguments checked and its backend chosen."""
    rows, columns = weight.shape
    x2d = x.reshape(math.prod(x.shape[:-1]), columns)  # -1 is ambiguous where K is 0
    kind = kind_of(weight)
    if backend == "reference":
        values = kind.reference(
            x2d.detach().float().cpu().numpy(),
            weight,
            None if bias is None else bias.detach().float().cpu().numpy(),
            activations,
        )
        y = torch.from_numpy(np.ascontiguousarray(values)).to(device=x.device, dtype=x.dtype)
    else:
        plan = kind.function("plan", "plan_linear")(
            x2d.shape[0], rows, columns, weight.codec, activations, x.dtype,
            describe_device(x.device), backend,
        )  # fmt: skip
        y = kind.function(backend, "linear")(x2d, weight, bias, activations, plan)
    return y.reshape(*x.shape[:-1], rows)


@torch.library.custom_op("lath::linear", mutates_args=())
def _operator(
    x: Tensor,
    tensors: list[Tensor],
    bias: Tensor | None,
    codec: str,
    rows: int,
    columns: int,
    activations: str,
    backend: str,
) -> Tensor:
    """`linear` on bare tensors: what torch.compile and torch.export record."""
    packed = _rebuild(codec, (rows, columns), tensors)
    chosen = resolve_backend(backend, packed.device)
    y = run_linear(x.detach(), packed, bias, activation_format(activations), chosen)
    return y.contiguous()


@_operator.register_fake
def _fake(
    x: Tensor,
    tensors: list[Tensor],
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


def _rebuild(codec: str, shape: tuple[int, int], tensors: Sequence[Tensor]) -> PackedWeight:
    """The weight of `PackedWeight.tensors`, in their order."""
    parsed = weight_codec(codec)
    cls = weight_class(parsed)
    names = cls.tensor_names(parsed)
    return cls.from_tensors(parsed, shape, dict(zip(names, tensors, strict=True)))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tensors, _, codec, rows, columns, _, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.weight = (codec, (rows, columns))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    codec, shape = ctx.weight
    dense = _rebuild(codec, shape, ctx.saved_tensors).dequantize(grad.dtype)
    return (grad @ dense, [None] * len(ctx.saved_tensors), *[None] * 6)


_operator.register_autograd(_backward, setup_context=_save_for_backward)
