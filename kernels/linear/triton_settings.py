"""What the formats and a plan fix about the launches of `linear`: constexpr arguments and checks.

Chosen once per codec, activation format, dtype, K, plan and target, and kept.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from lath.formats import packing
from lath.formats import values as value_tables
from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.plan import Plan
from lath.kernels.linear import triton_decode as decode
from lath.kernels.linear import triton_tables as tables
from lath.kernels.linear import triton_trits as trits

_DOTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_DECODERS: dict[str, Any] = {
    "fp16": decode.decode_fp16,
    "bf16": decode.decode_bf16,
    "fp32": decode.decode_fp32,
    "int8": decode.decode_int8,
}
_TRIT_DECODERS = {
    "fp16": trits.trits_fp16,
    "bf16": trits.trits_bf16,
    "fp32": trits.trits_fp32,
    "int8": trits.trits_int8,
}
_FLOAT_DECODERS = {
    "fp16": tables.float_fp16,
    "bf16": tables.float_bf16,
    "fp32": tables.float_fp32,
    "int8": tables.float_int8,
}
_TABLE_DECODERS = {
    "fp16": tables.table_fp16,
    "bf16": tables.table_bf16,
    "fp32": tables.table_fp32,
}
# A product of an activation code and a weight code (less its zero) is at most 127 * 255.
MOST_INT32_COLUMNS = (2**31 - 1) // (127 * 255)


@dataclass(frozen=True)
class Settings:
    """What the formats and a plan fix about the launches: computed once, kept."""

    dot: str
    span: int  # columns with one weight and one activation scale; 0: all of them
    step: int  # columns per step of the loop; x is padded to it where it is quantised
    block_m: int  # tokens of a tile
    natural: bool  # the order of int8 codes
    sums_outside: bool  # a row kernel must provide sums of x
    kernel: dict[str, Any]  # constexpr arguments of the loop

    @property
    def sum_span(self) -> int:
        """Columns of one sum of x: a shape in Triton is a power of two. Blocks of 160 columns are
        none, and take no sums."""
        size = self.span or self.step
        return size & -size


@functools.lru_cache(maxsize=1024)
def settings_of(
    codec: Codec,
    activations: ActivationFormat,
    dtype: torch.dtype,
    columns: int,
    plan: Plan,
    target: str,
) -> Settings:
    """What a plan means for a codec; ValueError for a plan that the kernels cannot run."""
    without_dot = plan.dataflow == "gemv"
    block = packing.block_of(codec)
    step = block if without_dot else plan.block_k
    dot = "fp32" if without_dot else plan.dot
    span = _span(codec, activations, columns, step, dot)
    _check_plan(plan, codec, activations, dtype, span, target)
    # AMD has no bf16 arithmetic: a subtraction there takes about six instructions.
    amd = target == "hip"
    centred = not without_dot and (codec.packing == "base3" or not (amd and dot == "bf16"))
    kernel = codec_arguments(codec, dot, centred, columns) | {
        "X_GROUP": _activation_group(activations, columns),
        "SPAN": span,
        "MASKED": activations.kind == "float" and columns % step != 0,
        "BLOCK_N": plan.block_n,
        "STAGES": plan.stages,
    }
    needs_sums = codec.zero != "none" or kernel["OFFSET"] != 0
    if without_dot:
        kernel["TOKENS"] = plan.block_m
    else:
        kernel |= {
            "SUMS": needs_sums,
            "RUN": 32 if dot == "int8" else 16,
            "DEPTH": _depth(span or block, dot, plan.swap, amd),
            "SWAP": plan.swap,
            "BLOCK_M": plan.block_m,
            "BLOCK_K": plan.block_k,
        }
    natural, sums_outside = dot != "int8", needs_sums and not without_dot
    return Settings(dot, span, step, plan.block_m, natural, sums_outside, kernel)


def codec_arguments(codec: Codec, dot: str, centred: bool, columns: int) -> dict[str, Any]:
    """The constexpr arguments that say how a weight is decoded for a dot."""
    found, decoders = decode.encoding(codec, dot, centred), _DECODERS
    if codec.packing == "base3":
        found, decoders = trits.encoding(dot, centred), _TRIT_DECODERS
    form: tables.Form = found.centre
    if codec.is_table:
        form = tables.form_of(codec, dot)
        decoders = _TABLE_DECODERS if tables.is_looked_up(codec) else _FLOAT_DECODERS
    outer = {"int8": "row", "e4m3": "all"}.get(codec.scale_dtype, "none")
    if outer == "none" and tables.is_scaled(codec, dot):
        outer = "all"
    return {
        "DECODE": decoders[dot],
        "WIDTHS": _widths(codec),
        "BLOCK": packing.block_of(codec),
        "FORM": form,
        "UNIT": found.unit,
        "OFFSET": _offset(codec, found),
        "ZERO": codec.zero,
        "SCALE": codec.scale_dtype if codec.scale_dtype in ("e8m0", "e4m3") else "number",
        "OUTER": outer,
        "GROUP": _weight_group(codec, columns),
    }


def _span(codec: Codec, activations: ActivationFormat, columns: int, step: int, dot: str) -> int:
    """Longest run of columns inside a step with one weight and one activation scale, or 0: all."""
    groups = [g for g in (codec.group, activations.group) if g is not None and g < columns]
    if not groups and dot == "int8" and columns > MOST_INT32_COLUMNS:
        return step
    return math.gcd(step, *groups) if groups else 0


def _depth(span: int, dot: str, swap: bool, amd: bool) -> int:
    """Columns of a dot inside a span, a power of two that divides it.

    Fewer need fewer registers, more let x be loaded in wider pieces.

    Without a tensor unit (fp32) all of a tile's operands are live at once. A weight on the left of
    sm_90's and sm_100's dot, or on its way through AMD's shared memory, is best moved whole.
    """
    best = 32 if dot == "fp32" else packing.BLOCK if swap or amd else 64
    return math.gcd(span, best)


def _offset(codec: Codec, found: decode.Encoding) -> int | float:
    """The constant that goes with sums of x: 0 where a symmetric codec is centred already."""
    if codec.zero != "none" or codec.is_table:
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


def _check_plan(
    plan: Plan,
    codec: Codec,
    activations: ActivationFormat,
    dtype: torch.dtype,
    span: int,
    target: str,
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
    block = packing.block_of(codec)
    require(plan.block_k in (block, 2 * block), "block_k", f"{block} or {2 * block}")
    if activations.kind == "float":
        require(plan.dot == _DOTS[dtype], "dot", f"that of x, {_DOTS[dtype]!r}")
    elif codec.is_table and codec.values not in value_tables.UNITS:
        why = f"'fp16', as the entries of {codec} are no whole numbers of 8 bits"
        require(plan.dot == "fp16", "dot", why)
    elif span % 32 == 0:
        require(plan.dot in ("int8", "fp16"), "dot", "'int8' or 'fp16'")
    else:
        require(plan.dot == "fp16", "dot", f"'fp16', as scales change every {span} columns")
    if target.startswith("sm_10") and plan.swap and span == 16:
        # Triton 3.9 compiles its tensor-memory dot of depth 16 to a kernel that does nothing.
        why = f"1 or 2 on {target} with the weight on the left and scales every 16 columns"
        require(plan.warps <= 2, "warps", why)
