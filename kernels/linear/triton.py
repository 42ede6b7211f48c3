"""`linear` on a GPU in Triton: what a `Plan` says becomes launches. No choices are made here.

float activations   [sums of x, if the codec has zero points]   matmul or gemv   [reduction]
rounded ones        row quantiser                               matmul or gemv   [reduction]
decode_matmul       decoder                                     torch's matmul
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from lath.formats import packing
from lath.formats.activations import SMALLEST_ABSMAX, ActivationFormat
from lath.formats.plan import Plan
from lath.formats.qtensor import QTensor
from lath.formats.sparse import SparseTensor
from lath.formats.vectors import VectorTensor
from lath.kernels.linear import triton_activations as rows
from lath.kernels.linear import triton_gemv as gemv
from lath.kernels.linear import triton_loops as loops
from lath.kernels.linear.triton_settings import (
    Settings,
    codec_arguments,
    is_folded,
    settings_of,
)
from lath.kernels.linear.triton_tables import table_for

# Columns of x that a program of the row quantiser holds at once.
_MOST_COLUMNS = 4096
_REDUCE_BLOCK = 1024


@dataclass(frozen=True)
class _Rows:
    """x as the loop reads it: values [M, >= K], scales [groups, tokens], sums [spans, tokens].

    tokens: M rounded up, so that a tile reads scales and sums without a mask, several at once.
    """

    values: Tensor
    tokens: int
    scales: Tensor | None = None
    sums: Tensor | None = None
    groups: int = 1


def linear(
    x: Tensor,
    weight: QTensor | SparseTensor | VectorTensor,
    bias: Tensor | None,
    activations: ActivationFormat,
    plan: Plan,
    out: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """x [M, K] times the packed weight [N, K], plus bias [N]: [M, N] of x's dtype.

    x: fp16, bf16 or fp32, any strides. bias: any floating dtype. plan: its fields for the Triton
    backend. Scales, zero points and bias are applied in fp32 before the one rounding to x's dtype;
    "decode_matmul" also rounds each decoded weight to it, and leaves the rest to torch.matmul. out:
    fp32 [M, N], contiguous; filled and returned in place of a new tensor. order: int32 [K], the
    columns of a wider x that are multiplied, read where they lie as x is rounded.
    ValueError for a plan that the kernels cannot run, and for an order without rounded activations.
    """
    tokens, (outputs, columns) = x.shape[0], weight.shape
    if order is not None and activations.kind == "float":
        raise ValueError("order needs activations that are rounded, got activations 'float'")
    y = x.new_empty((tokens, outputs)) if out is None else out
    if y.numel() == 0:
        return y
    if columns == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    bias = None if bias is None else bias.contiguous()
    with device_of(x):
        if plan.dataflow == "decode_matmul":
            product = _decode_matmul(x, weight, bias, activations, y.dtype)
            return product if out is None else out.copy_(product)
        if plan.dataflow == "gemv" and tokens > plan.block_m:
            raise ValueError(
                f"plan block_m for dataflow 'gemv' must be at least {tokens} for {tokens} tokens, "
                f"got {plan.block_m}"
            )
        settings = settings_of(weight.codec, activations, x.dtype, columns, plan, _target(x))
        operand = _prepare(_addressable(x, plan.block_m), activations, settings, order)
        pieces = min(plan.split_k, -(-columns // settings.step))
        if pieces == 1:
            _multiply(y, operand, weight, bias, settings, plan, pieces)
            return y
        workspace = x.new_empty((pieces, tokens, outputs), dtype=torch.float32)
        _multiply(workspace, operand, weight, None, settings, plan, pieces)
        reduce(workspace, bias, y)
        return y


def reduce(pieces: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y [M, N] = the sum of fp32 pieces [P, M, N], first to last, plus bias [N], rounded once."""
    with device_of(y):
        loops.reduce_kernel[(triton.cdiv(y.numel(), _REDUCE_BLOCK),)](
            pieces, _or(bias, pieces), y, y.numel(), y.shape[1],
            PIECES=pieces.shape[0], BIAS=bias is not None, BLOCK=_REDUCE_BLOCK, num_warps=4,
        )  # fmt: skip


def dequantize(
    weight: QTensor | SparseTensor | VectorTensor, dtype: torch.dtype, block_n: int = 64
) -> Tensor:
    """The decoded weight [N, K]: fp32 inside, rounded once to dtype. block_n: rows of a program."""
    outputs, columns = weight.shape
    dense = torch.empty((outputs, columns), dtype=dtype, device=weight.device)
    if dense.numel() == 0:
        return dense
    padded, blocks = _padded(weight)
    folded = is_folded(weight.codec, ActivationFormat(), columns, "fp32")
    loops.decode_kernel[(triton.cdiv(outputs, block_n), blocks)](
        *_tensors(weight, "fp32", folded), dense,
        outputs, columns, padded, blocks, weight.codec.num_groups(columns),
        **codec_arguments(weight.codec, "fp32", True, columns, folded, _target(weight.codes)),
        BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return dense


def _tensors(
    weight: QTensor | SparseTensor | VectorTensor, dot: str, folded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """codes, scales, zeros, outer, table as the loops take them for a dot. folded: the decoder
    takes the scales of the groups, as its table, and the loop those of the rows."""
    if isinstance(weight, SparseTensor):
        scales = _or(weight.scales, weight.bitmap)
        return weight.bitmap, scales, weight.offsets, scales, weight.codes
    scales, outer, table = weight.scales, weight.outer, weight.codes
    if folded:
        assert outer is not None  # scales of 8 bits have one above them
        return weight.codes, outer, _or(weight.zeros, scales), outer, scales
    lookup = table_for(weight, dot)
    if lookup is not None:
        table, outer = lookup.entries, outer if lookup.outer is None else lookup.outer
    return weight.codes, scales, _or(weight.zeros, scales), _or(outer, scales), table


def _decode_matmul(
    x: Tensor,
    weight: QTensor | SparseTensor | VectorTensor,
    bias: Tensor | None,
    activations: ActivationFormat,
    dtype: torch.dtype,
) -> Tensor:
    """x times the decoded weight, in `dtype`: x's or fp32."""
    if activations.kind != "float":
        raise ValueError(
            f"plan dataflow 'decode_matmul' takes activations 'float', got {str(activations)!r}"
        )
    return multiply_dense(x, dequantize(weight, x.dtype), bias, dtype)


def multiply_dense(x: Tensor, dense: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [M, K] times a decoded weight [N, K] of x's dtype, plus bias [N], rounded to `dtype`."""
    dense = dense.t()
    # A GPU's matmul sums in fp32 and adds a bias of x's type there, then rounds once; a CPU's does
    # not promise to. Where it cannot be one rounding in x's type, it is a matmul in fp32.
    if x.is_cuda and bias is None and dtype == x.dtype:
        return x @ dense
    if x.is_cuda and bias is not None and bias.dtype == x.dtype == dtype:
        return torch.addmm(bias, x, dense)
    y = x.float() @ dense.float()
    return (y if bias is None else y + bias.float()).to(dtype)


def _multiply(
    y: Tensor,
    x: _Rows,
    weight: QTensor | SparseTensor | VectorTensor,
    bias: Tensor | None,
    settings: Settings,
    plan: Plan,
    pieces: int,
) -> None:
    """Launch the loop of the plan into y: [M, N], or [pieces, M, N] fp32."""
    tokens, (outputs, columns) = x.values.shape[0], weight.shape
    padded, blocks = _padded(weight)
    groups = weight.codec.num_groups(columns)
    stride = x.values.stride(0)
    sizes = (tokens, outputs, columns, stride, padded, x.tokens, blocks, groups, x.groups)
    tensors = (x.values, *_tensors(weight, settings.dot, settings.folded))
    scales, offsets = _or(x.scales, tensors[2]), _or(bias, tensors[2])
    tiles_n = triton.cdiv(outputs, plan.block_n)
    if plan.dataflow == "gemv":
        gemv.gemv_kernel[(tiles_n, pieces)](
            *tensors, scales, offsets, y, *sizes, **settings.kernel, BIAS=bias is not None,
            num_warps=plan.warps,
        )  # fmt: skip
        return
    loops.matmul_kernel[(triton.cdiv(tokens, plan.block_m) * tiles_n, pieces)](
        *tensors, scales, _or(x.sums, tensors[2]), offsets, y, *sizes, **settings.kernel,
        BIAS=bias is not None, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip


def _prepare(
    x: Tensor, activations: ActivationFormat, settings: Settings, order: Tensor | None = None
) -> _Rows:
    """x in the activation format, with the sums that the loop needs."""
    tokens, columns = x.shape[0], x.shape[1] if order is None else len(order)
    span = settings.sum_span
    padded = packing.round_up(columns, settings.step)
    spans = padded // span
    padded_tokens = packing.round_up(tokens, max(16, settings.block_m))
    if activations.kind == "float":
        if not settings.sums_outside:
            return _Rows(x, padded_tokens)
        sums = torch.empty((spans, padded_tokens), dtype=torch.float32, device=x.device)
        together = max(1, 2048 // span)
        rows.sum_rows_kernel[(padded_tokens, triton.cdiv(spans, together))](
            x, sums, tokens, columns, x.stride(0), padded_tokens, spans,
            SPAN=span, SPANS=together, num_warps=4,
        )  # fmt: skip
        return _Rows(x, padded_tokens, sums=sums)
    size, groups = padded, 1
    # A group that is not shorter than x is all of it, as in `common_group`.
    if activations.group is not None and activations.group < columns:
        size, groups = activations.group, activations.num_groups(columns)
    held = {"e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16}
    dtype = held.get(settings.dot, torch.float16)
    if activations.is_integer and settings.dot == "int8":
        dtype = torch.int8
    codes = torch.empty((tokens, padded), dtype=dtype, device=x.device)
    scales = torch.empty((groups, padded_tokens), dtype=torch.float32, device=x.device)
    exact = torch.int32 if activations.is_integer else torch.float32
    sums = torch.empty((spans, padded_tokens), dtype=exact, device=x.device)
    chunk = min(_power_of_two(size), _MOST_COLUMNS)
    together = max(1, min(_power_of_two(-(-padded // size)), 1024 // chunk))
    programs = triton.cdiv(triton.cdiv(padded, size), together)
    rows.quantize_rows_kernel[(padded_tokens, programs)](
        x, _or(order, scales),
        codes, scales, sums, columns, tokens, x.stride(0), padded, padded_tokens, groups, size,
        SPAN=span, NATURAL=settings.natural, GROUPS=together, CHUNK=chunk,
        LIMIT=float(activations.largest), SMALLEST=SMALLEST_ABSMAX, VALUES=activations.values,
        ORDER=order is not None,
        num_warps=8 if chunk * together >= 4096 else 4, enable_fp_fusion=False,
    )  # fmt: skip
    return _Rows(codes, padded_tokens, scales, sums, groups)


def _padded(weight: QTensor | SparseTensor | VectorTensor) -> tuple[int, int]:
    """Rows rounded up to a panel, and blocks along K."""
    rows, columns = weight.shape
    return packing.round_up(rows, packing.PANEL), -(-columns // packing.block_of(weight.codec))


def _addressable(x: Tensor, block_m: int) -> Tensor:
    """x with contiguous columns, and rows so close that offsets in a tile fit 32 bits."""
    far = abs(x.stride(0)) * block_m >= 2**31
    if far or (x.stride(1) != 1 and x.shape[1] > 1):
        return x.contiguous()
    return x


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The context in which kernels over x are launched."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _target(x: Tensor) -> str:
    """What kernels for x are compiled for: "gfx942", "sm_90", ...; "interpreter" for none."""
    if x.is_cuda:
        return _target_of_device(x.device)
    if triton.knobs.runtime.interpret:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return str(target.arch) if target.backend == "hip" else f"sm_{target.arch}"


@functools.cache
def _target_of_device(device: torch.device) -> str:
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    """A tensor for an argument that the kernel will not read."""
    return placeholder if tensor is None else tensor


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()
