"""`linear` on a GPU in Triton: what a `Plan` says becomes launches. No choices are made here.

float activations   [sums of x, if the codec has zero points]   matmul or gemv   [reduction]
int8 activations    row quantiser                               matmul or gemv   [reduction]
decode_matmul       decoder                                     torch's matmul
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from lath.formats import packing
from lath.formats.activations import LARGEST_CODE, SMALLEST_ABSMAX, ActivationFormat
from lath.formats.codec import Codec
from lath.formats.plan import Plan
from lath.formats.qtensor import QTensor
from lath.kernels.linear import triton_activations as rows
from lath.kernels.linear import triton_decode as decode
from lath.kernels.linear import triton_gemv as gemv
from lath.kernels.linear import triton_loops as loops

_DOTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_DECODERS = {
    "fp16": decode.decode_fp16,
    "bf16": decode.decode_bf16,
    "fp32": decode.decode_fp32,
    "int8": decode.decode_int8,
}
# Columns of x that a program of the row quantiser holds at once.
_MOST_COLUMNS = 4096
_REDUCE_BLOCK = 1024
# A product of an activation code and a weight code (less its zero) is at most 127 * 255.
_MOST_INT32_COLUMNS = (2**31 - 1) // (127 * 255)


@dataclass(frozen=True)
class _Settings:
    """What the formats and a plan fix about the launches: computed once, kept."""

    dot: str
    span: int  # columns with one weight and one activation scale; 0: all of them
    step: int  # columns per step of the loop; x is padded to it where it is quantised
    block_m: int  # tokens of a tile
    natural: bool  # the order of int8 codes
    sums_outside: bool  # a row kernel must provide sums of x
    kernel: dict[str, Any]  # constexpr arguments of the loop


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
    weight: QTensor,
    bias: Tensor | None,
    activations: ActivationFormat,
    plan: Plan,
) -> Tensor:
    """x [M, K] times the packed weight [N, K], plus bias [N]: [M, N] of x's dtype.

    x: fp16, bf16 or fp32, any strides. bias: any floating dtype. plan: its fields for the Triton
    backend. Scales, zero points and bias are applied in fp32 before the one rounding to x's dtype;
    "decode_matmul" also rounds each decoded weight to it, and leaves the rest to torch.matmul.
    ValueError for a plan that the kernels cannot run.
    """
    tokens, columns = x.shape
    outputs = weight.shape[0]
    if tokens == 0 or outputs == 0:
        return x.new_empty((tokens, outputs))
    if columns == 0:
        empty = x.new_zeros((tokens, outputs))
        return empty if bias is None else empty + bias.to(x.dtype)
    bias = None if bias is None else bias.contiguous()
    with _device_of(x):
        if plan.dataflow == "decode_matmul":
            return _decode_matmul(x, weight, bias, activations)
        if plan.dataflow == "gemv" and tokens > plan.block_m:
            raise ValueError(
                f"plan block_m for dataflow 'gemv' must be at least {tokens} for {tokens} tokens, "
                f"got {plan.block_m}"
            )
        settings = _settings(weight.codec, activations, x.dtype, columns, plan, _target(x))
        operand = _prepare(_addressable(x, plan.block_m), activations, settings)
        pieces = min(plan.split_k, -(-columns // settings.step))
        y = x.new_empty((tokens, outputs))
        if pieces == 1:
            _multiply(y, operand, weight, bias, settings, plan, pieces)
            return y
        workspace = x.new_empty((pieces, tokens, outputs), dtype=torch.float32)
        _multiply(workspace, operand, weight, None, settings, plan, pieces)
        loops.reduce_kernel[(triton.cdiv(y.numel(), _REDUCE_BLOCK),)](
            workspace, _or(bias, workspace), y, y.numel(), outputs,
            PIECES=pieces, BIAS=bias is not None, BLOCK=_REDUCE_BLOCK, num_warps=4,
        )  # fmt: skip
        return y


def dequantize(weight: QTensor, dtype: torch.dtype, block_n: int = 64) -> Tensor:
    """The decoded weight [N, K]: fp32 inside, rounded once to dtype. block_n: rows of a program."""
    outputs, columns = weight.shape
    dense = torch.empty((outputs, columns), dtype=dtype, device=weight.device)
    if dense.numel() == 0:
        return dense
    found = decode.encoding(weight.codec, "fp32", centred=True)
    padded, blocks = _padded(weight.shape)
    loops.decode_kernel[(triton.cdiv(outputs, block_n), blocks)](
        weight.codes, weight.scales, _or(weight.zeros, weight.scales), dense,
        outputs, columns, padded, blocks, weight.codec.num_groups(columns),
        WIDTHS=_widths(weight.codec), CENTRE=found.centre, UNIT=found.unit,
        OFFSET=_offset(weight.codec, found), ZERO=weight.codec.zero,
        GROUP=_weight_group(weight.codec, columns), BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return dense


def _decode_matmul(
    x: Tensor, weight: QTensor, bias: Tensor | None, activations: ActivationFormat
) -> Tensor:
    if activations.kind != "float":
        raise ValueError(
            f"plan dataflow 'decode_matmul' takes activations 'float', got {str(activations)!r}"
        )
    dense = dequantize(weight, x.dtype).t()
    # A GPU's matmul sums in fp32 and adds a bias of x's type there, then rounds once; a CPU's does
    # not promise to. Where it cannot be one rounding in x's type, it is a matmul in fp32.
    if x.is_cuda and bias is None:
        return x @ dense
    if x.is_cuda and bias is not None and bias.dtype == x.dtype:
        return torch.addmm(bias, x, dense)
    y = x.float() @ dense.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _multiply(
    y: Tensor,
    x: _Rows,
    weight: QTensor,
    bias: Tensor | None,
    settings: _Settings,
    plan: Plan,
    pieces: int,
) -> None:
    """Launch the loop of the plan into y: [M, N], or [pieces, M, N] fp32."""
    tokens, (outputs, columns) = x.values.shape[0], weight.shape
    padded, blocks = _padded(weight.shape)
    groups = weight.codec.num_groups(columns)
    stride = x.values.stride(0)
    sizes = (tokens, outputs, columns, stride, padded, x.tokens, blocks, groups, x.groups)
    tensors = (x.values, weight.codes, weight.scales, _or(weight.zeros, weight.scales))
    scales, offsets = _or(x.scales, weight.scales), _or(bias, weight.scales)
    tiles_n = triton.cdiv(outputs, plan.block_n)
    if plan.dataflow == "gemv":
        gemv.gemv_kernel[(tiles_n, pieces)](
            *tensors, scales, offsets, y, *sizes, **settings.kernel, BIAS=bias is not None,
            num_warps=plan.warps,
        )  # fmt: skip
        return
    loops.matmul_kernel[(triton.cdiv(tokens, plan.block_m) * tiles_n, pieces)](
        *tensors, scales, _or(x.sums, weight.scales), offsets, y, *sizes, **settings.kernel,
        BIAS=bias is not None, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip


def _prepare(x: Tensor, activations: ActivationFormat, settings: _Settings) -> _Rows:
    """x in the activation format, with the sums that the loop needs."""
    tokens, columns = x.shape
    span = settings.span or settings.step
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
    size = padded if activations.group is None else activations.group
    groups = 1 if activations.group is None else activations.num_groups(columns)
    dtype = torch.float16 if settings.dot == "fp16" else torch.int8
    codes = torch.empty((tokens, padded), dtype=dtype, device=x.device)
    scales = torch.empty((groups, padded_tokens), dtype=torch.float32, device=x.device)
    sums = torch.empty((spans, padded_tokens), dtype=torch.int32, device=x.device)
    chunk = min(_power_of_two(size), _MOST_COLUMNS)
    together = max(1, min(_power_of_two(-(-padded // size)), 1024 // chunk))
    programs = triton.cdiv(triton.cdiv(padded, size), together)
    rows.quantize_rows_kernel[(padded_tokens, programs)](
        x, codes, scales, sums, columns, tokens, x.stride(0), padded, padded_tokens, groups, size,
        SPAN=span, NATURAL=settings.natural, GROUPS=together, CHUNK=chunk,
        LIMIT=float(LARGEST_CODE), SMALLEST=SMALLEST_ABSMAX,
        num_warps=8 if chunk * together >= 4096 else 4, enable_fp_fusion=False,
    )  # fmt: skip
    return _Rows(codes, padded_tokens, scales, sums, groups)


@functools.lru_cache(maxsize=1024)
def _settings(
    codec: Codec,
    activations: ActivationFormat,
    dtype: torch.dtype,
    columns: int,
    plan: Plan,
    target: str,
) -> _Settings:
    if codec.is_table or codec.scale_dtype not in ("fp16", "fp32"):
        raise NotImplementedError(f"the Triton kernels of lath.linear do not read {codec} yet")
    without_dot = plan.dataflow == "gemv"
    step = packing.BLOCK if without_dot else plan.block_k
    dot = "fp32" if without_dot else plan.dot
    span = _span(codec, activations, columns, step, dot)
    _check_plan(plan, activations, dtype, span, target)
    # AMD has no bf16 arithmetic: a subtraction there takes about six instructions.
    amd = target == "hip"
    centred = not without_dot and not (amd and dot == "bf16")
    found = decode.encoding(codec, dot, centred)
    offset = _offset(codec, found)
    kernel: dict[str, Any] = {
        "WIDTHS": _widths(codec),
        "UNIT": found.unit,
        "OFFSET": offset,
        "ZERO": codec.zero,
        "GROUP": _weight_group(codec, columns),
        "X_GROUP": _activation_group(activations, columns),
        "SPAN": span,
        "MASKED": activations.kind == "float" and columns % step != 0,
        "BLOCK_N": plan.block_n,
        "STAGES": plan.stages,
    }
    needs_sums = codec.zero != "none" or offset != 0
    if without_dot:
        kernel["TOKENS"] = plan.block_m
    else:
        kernel |= {
            "DECODE": _DECODERS[dot],
            "CENTRE": found.centre,
            "SUMS": needs_sums,
            "RUN": 32 if dot == "int8" else 16,
            "DEPTH": min(span or packing.BLOCK, _depth(dot, plan.swap, amd)),
            "SWAP": plan.swap,
            "BLOCK_M": plan.block_m,
            "BLOCK_K": plan.block_k,
        }
    natural, sums_outside = dot != "int8", needs_sums and not without_dot
    return _Settings(dot, span, step, plan.block_m, natural, sums_outside, kernel)


def _span(codec: Codec, activations: ActivationFormat, columns: int, step: int, dot: str) -> int:
    """Longest run of columns inside a step with one weight and one activation scale, or 0: all."""
    groups = [g for g in (codec.group, activations.group) if g is not None and g < columns]
    if not groups and dot == "int8" and columns > _MOST_INT32_COLUMNS:
        return step
    return math.gcd(step, *groups) if groups else 0


def _depth(dot: str, swap: bool, amd: bool) -> int:
    """Columns of a dot. Fewer need fewer registers, more let x be loaded in wider pieces.

    Without a tensor unit (fp32) all of a tile's operands are live at once. A weight on the left of
    sm_90's and sm_100's dot, or on its way through AMD's shared memory, is best moved whole.
    """
    if dot == "fp32":
        return 32
    return packing.BLOCK if swap or amd else 64


def _offset(codec: Codec, found: decode.Encoding) -> int | float:
    """The constant that goes with sums of x: 0 where a symmetric codec is centred already."""
    if codec.zero != "none":
        return found.base
    offset = 0 if found.centre else found.base - codec.zero_code
    return int(offset) if offset == int(offset) else offset


def _activation_group(activations: ActivationFormat, columns: int) -> int:
    """Columns per activation scale; 0: one per token, -1: none."""
    if activations.kind == "float":
        return -1
    return 0 if activations.group is None or activations.group >= columns else activations.group


def _weight_group(codec: Codec, columns: int) -> int:
    """Columns per scale, 0 if a row has a single one."""
    return 0 if codec.group is None or codec.group >= columns else codec.group


def _widths(codec: Codec) -> tuple[int, int, int]:
    widths = (*codec.plane_widths, 0, 0)
    return widths[0], widths[1], widths[2]


def _padded(shape: tuple[int, int]) -> tuple[int, int]:
    """Rows rounded up to a panel, and blocks along K."""
    return packing.round_up(shape[0], packing.PANEL), -(-shape[1] // packing.BLOCK)


def _check_plan(
    plan: Plan, activations: ActivationFormat, dtype: torch.dtype, span: int, target: str
) -> None:
    """ValueError naming the first field that the kernels cannot run."""

    def require(holds: bool, field: str, accepted: str) -> None:
        if not holds:
            raise ValueError(
                f"plan {field} for dataflow {plan.dataflow!r} must be {accepted}, "
                f"got {getattr(plan, field)!r}"
            )

    def is_size(value: int, least: int, most: int) -> bool:
        return least <= value <= most and value & (value - 1) == 0

    require(plan.dataflow in ("gemv", "flat", "tiled"), "dataflow", "'gemv', 'flat' or 'tiled'")
    require(is_size(plan.block_n, 16, 256), "block_n", "a power of two from 16 to 256")
    require(is_size(plan.warps, 1, 16), "warps", "a power of two from 1 to 16")
    require(plan.split_k >= 1, "split_k", "at least 1")
    require(plan.stages >= 1, "stages", "at least 1")
    if plan.dataflow == "gemv":
        require(plan.block_m in (1, 2, 4), "block_m", "1, 2 or 4")
        return
    least = 8 if plan.swap else 16
    require(is_size(plan.block_m, least, 256), "block_m", f"a power of two from {least} to 256")
    require(plan.block_k in (128, 256), "block_k", "128 or 256")
    if activations.kind == "float":
        require(plan.dot == _DOTS[dtype], "dot", f"that of x, {_DOTS[dtype]!r}")
    elif span % 32 == 0:
        require(plan.dot in ("int8", "fp16"), "dot", "'int8' or 'fp16'")
    else:
        require(plan.dot == "fp16", "dot", f"'fp16', as scales change every {span} columns")
    if target.startswith("sm_10") and plan.swap and span == 16:
        # Triton 3.9 compiles its tensor-memory dot of depth 16 to a kernel that does nothing.
        why = f"1 or 2 on {target} with the weight on the left and scales every 16 columns"
        require(plan.warps <= 2, "warps", why)


def _addressable(x: Tensor, block_m: int) -> Tensor:
    """x with contiguous columns, and rows so close that offsets in a tile fit 32 bits."""
    far = abs(x.stride(0)) * block_m >= 2**31
    if far or (x.stride(1) != 1 and x.shape[1] > 1):
        return x.contiguous()
    return x


def _device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _target(x: Tensor) -> str:
    """What kernels for x are compiled for: "hip", "sm_90", ...; "interpreter" for none."""
    if x.is_cuda:
        return _target_of_device(x.device)
    if triton.knobs.runtime.interpret:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return "hip" if target.backend == "hip" else f"sm_{target.arch}"


@functools.cache
def _target_of_device(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    """A tensor for an argument that the kernel will not read."""
    return placeholder if tensor is None else tensor


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()
