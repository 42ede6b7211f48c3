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
from lath.formats.activations import ActivationFormat
from lath.formats.codec import PlanesCodec
from lath.formats.device import has_e4m3
from lath.formats.plan import Plan
from lath.formats.sparse import SparseCodec
from lath.formats.vectors import VectorCodec
from lath.kernels.linear import triton_decode as decode
from lath.kernels.linear import triton_in_place as in_place
from lath.kernels.linear import triton_scaled as scaled
from lath.kernels.linear import triton_sparse as sparse
from lath.kernels.linear import triton_tables as tables
from lath.kernels.linear import triton_trits as trits
from lath.kernels.linear import triton_vectors as vectors
from lath.kernels.linear.plan_facts import (
    MOST_INT32_COLUMNS,
    folds_scales,
    held_in,
    holds_integers,
    multiplies_float8,
)

_DOTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_DECODERS: dict[str, Any] = {
    "fp16": in_place.decode_fp16,
    "bf16": in_place.decode_bf16,
    "fp32": decode.decode_fp32,
    "int8": decode.decode_int8,
}
_TRIT_DECODERS = {
    "fp16": trits.trits_fp16,
    "bf16": trits.trits_bf16,
    "fp32": trits.trits_fp32,
    "int8": trits.trits_int8,
}
# What is better done otherwise on some targets. "pairs": both numbers of a word at once, by
# instructions that the kernel writes itself where the compiler does not pair them.
_DECODERS_OF_TARGET: dict[str, dict[str, Any]] = {
    "hip": {"bf16": decode.decode_bf16_by_exponent},
    "interpreter": {},
    "pairs": {
        "fp16": in_place.decode_fp16_packed,
        "bf16": in_place.decode_bf16_packed,
        "int8": decode.decode_int8_opaque,
    },
    "cuda": {"int8": decode.decode_int8_opaque},
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
_SPARSE_DECODERS = {
    "fp16": sparse.kept_fp16,
    "bf16": sparse.kept_bf16,
    "fp32": sparse.kept_fp32,
    "int8": sparse.kept_int8,
}
_VECTOR_DECODERS = {
    "fp16": vectors.vectors_fp16,
    "bf16": vectors.vectors_bf16,
    "fp32": vectors.vectors_fp32,
}


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
    folded: bool = False  # the decoder multiplies codes by the scales of their groups

    @property
    def sum_span(self) -> int:
        """Columns of one sum of x: a shape in Triton is a power of two. Blocks of 160 columns are
        none, and take no sums."""
        size = self.span or self.step
        return size & -size


@functools.lru_cache(maxsize=1024)
def settings_of(
    codec: PlanesCodec | SparseCodec,
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
    folded = is_folded(codec, activations, columns, dot)
    span = _span(codec, activations, columns, step, dot, folded)
    _check_plan(plan, codec, activations, dtype, columns, span, target)
    amd = target.startswith("gfx")
    kernel = codec_arguments(codec, dot, not without_dot, columns, folded, target) | {
        "X_GROUP": _activation_group(activations, columns),
        "SPAN": span,
        "MASKED": activations.kind == "float" and columns % step != 0,
        "BLOCK_N": plan.block_n,
        "STAGES": plan.stages,
    }
    needs_sums = kernel["ZERO"] != "none" or kernel["OFFSET"] != 0
    # Codes of whole bytes are read 32 at a time, in an order that x has too.
    whole = dot == "int8" or (dot == "e4m3" and codec.values == "e4m3")
    if without_dot:
        kernel["TOKENS"] = plan.block_m
    else:
        kernel |= {
            "SUMS": needs_sums,
            "RUN": 32 if whole else 16,
            "DEPTH": _depth(span or packing.block_of(codec), codec, dot, plan, amd),
            "SWAP": plan.swap,
            "BLOCK_M": plan.block_m,
            "BLOCK_K": plan.block_k,
        }
    sums_outside = needs_sums and not without_dot
    natural = not whole or isinstance(codec, SparseCodec)
    return Settings(dot, span, step, plan.block_m, natural, sums_outside, kernel, folded)


def is_folded(
    codec: PlanesCodec | SparseCodec, activations: ActivationFormat, columns: int, dot: str
) -> bool:
    """Whether the decoder for a dot multiplies codes by the scales of their groups."""
    if codec.scale_dtype == "fp8":
        return True
    return dot == "int8" and folds_scales(columns, codec, activations)


def codec_arguments(
    codec: PlanesCodec | SparseCodec,
    dot: str,
    centred: bool,
    columns: int,
    folded: bool,
    target: str,
) -> dict[str, Any]:
    """The constexpr arguments that say how a weight is decoded for a dot on a target."""
    if isinstance(codec, SparseCodec):
        return _sparse_arguments(codec, dot, columns)
    if folded:
        return {
            "LOCATE": decode.block_planes, "BLOCK": packing.BLOCK,
            "DECODE": scaled.scaled_int8 if dot == "int8" else scaled.scaled_e4m3,
            "WIDTHS": _widths(codec), "FORM": scaled.form_of(codec, dot, columns),
            "UNIT": 1, "OFFSET": 0, "ZERO": "none", "SCALE": "number", "OUTER": "none", "GROUP": 0,
        }  # fmt: skip
    amd = target.startswith("gfx")
    # AMD has no bf16 arithmetic: a subtraction there takes about six instructions.
    arithmetic = not amd or dot != "bf16"
    found = decode.encoding(codec, dot, centred and arithmetic, arithmetic)
    decoders = _DECODERS | _DECODERS_OF_TARGET[_kind_of_target(codec, target)]
    if packing.is_base3(codec):
        found, decoders = trits.encoding(dot, centred), _TRIT_DECODERS
    form: tables.Form = found.centre
    if found.exponent is not None:
        form = (found.centre, found.exponent)
    if codec.is_table:
        form = tables.form_of(codec, dot) if dot != "e4m3" else 0.0
        decoders = _TABLE_DECODERS if tables.is_looked_up(codec) else _FLOAT_DECODERS
        decoders = _VECTOR_DECODERS if codec.values == "vectors" else decoders
    outer = {"int8": "row", "e4m3": "all"}.get(codec.scale_dtype, "none")
    if outer == "none" and tables.is_scaled(codec, dot):
        outer = "all"
    return {
        "LOCATE": decode.block_planes,
        "DECODE": scaled.bytes_e4m3 if dot == "e4m3" else decoders[dot],
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


def _kind_of_target(codec: PlanesCodec, target: str) -> str:
    """Whose decoders a target takes.

    Of three planes LLVM pairs the products and leaves the sums single, so that every pair is taken
    apart and put together again: 10 to 12 instructions per weight and spilled registers, where the
    kernel's own pairs take 5 to 10. Of one plane or two it pairs both, in fewer than those. On
    sm_80 it pairs neither; before it there are no pairs of bf16.
    """
    if target.startswith("gfx"):
        return "hip"
    if target == "interpreter":
        return target
    capability = int(target[3:])
    three = len(codec.plane_widths) == 3 and capability > 80
    return "pairs" if three or capability == 80 else "cuda"


def _sparse_arguments(codec: SparseCodec, dot: str, columns: int) -> dict[str, Any]:
    """Kept numbers are signed and what is not kept is 0: there is no zero point to account for."""
    return {
        "LOCATE": sparse.locate_kept,
        "DECODE": _SPARSE_DECODERS[dot],
        "WIDTHS": (codec.bits, 0, 0, False),
        "BLOCK": packing.BLOCK,
        "FORM": 0.0,
        "UNIT": 1,
        "OFFSET": 0,
        "ZERO": "none",
        "SCALE": "none" if codec.scale_dtype is None else "number",
        "OUTER": "none",
        "GROUP": _weight_group(codec, columns),
    }


def _span(
    codec: PlanesCodec | SparseCodec,
    activations: ActivationFormat,
    columns: int,
    step: int,
    dot: str,
    folded: bool,
) -> int:
    """Longest run of columns inside a step with one weight and one activation scale, or 0: all."""
    both = (None if folded else codec.group, activations.group)
    groups = [g for g in both if g is not None and g < columns]
    if not groups and dot == "int8" and columns > MOST_INT32_COLUMNS:
        return step
    return math.gcd(step, *groups) if groups else 0


def _depth(span: int, codec: PlanesCodec | SparseCodec, dot: str, plan: Plan, amd: bool) -> int:
    """Columns of a dot inside a span, a power of two that divides it.

    Fewer need fewer registers, more let x be loaded in wider pieces.

    Without a tensor unit (fp32) all of a tile's operands are live at once; entries of two numbers
    have addresses twice as wide as they are, live until they are fetched. A weight on the left of
    sm_90's and sm_100's dot of four warps, or on its way through AMD's shared memory, is best moved
    whole.
    """
    best = 64
    if dot == "fp32":
        best = 32
    elif amd or (plan.swap and plan.warps >= 4):
        best = packing.BLOCK
    elif isinstance(codec, VectorCodec) and codec.vector == 2:
        best = 32
    return math.gcd(span, best)


def _offset(codec: PlanesCodec, found: decode.Encoding) -> int | float:
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


def _weight_group(codec: PlanesCodec | SparseCodec, columns: int) -> int:
    """Columns per scale, 0 if a row has a single one."""
    return 0 if codec.group is None or codec.group >= columns else codec.group


def _widths(codec: PlanesCodec) -> tuple[int, int, int, bool]:
    widths = (*codec.plane_widths, 0, 0)
    in_halves = 1 in codec.plane_widths and codec.values != "vectors"
    return widths[0], widths[1], widths[2], in_halves


def _check_plan(
    plan: Plan,
    codec: PlanesCodec | SparseCodec,
    activations: ActivationFormat,
    dtype: torch.dtype,
    columns: int,
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
    elif plan.dot == "e4m3":
        why = f"'fp16': no dot of 8-bit floats on {target} of {activations} and {codec}"
        fits = multiplies_float8(columns, codec, activations) and has_e4m3(target)
        require(fits, "dot", why)
    elif not holds_integers(codec) or not activations.is_integer:
        held = held_in(codec)
        why = f"{held!r}, as {activations} times {codec} are no whole numbers of 8 bits"
        require(plan.dot == held, "dot", why)
    elif span % 32 == 0:
        require(plan.dot in ("int8", "fp16"), "dot", "'int8' or 'fp16'")
    else:
        require(plan.dot == "fp16", "dot", f"'fp16', as scales change every {span} columns")
    if target.startswith("sm_10") and plan.swap and span == 16:
        # Triton 3.9 compiles its tensor-memory dot of depth 16 to a kernel that does nothing.
        why = f"1 or 2 on {target} with the weight on the left and scales every 16 columns"
        require(plan.warps <= 2, "warps", why)
