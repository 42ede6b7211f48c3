"""bf16 on machines that multiply it: pairs of it in 32-bit lanes, products summed in fp32."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.ir.types import _BaseFloatType

from lath.kernels.simd.emitter import FLOATS, LANES, SHORTS, Emitter


class _BrainType(_BaseFloatType):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BrainType._create_instance()
_PAIRS = ir.VectorType(_BrainType(), 2 * LANES)
_HALF = ir.VectorType(_BrainType(), LANES)


def dot_pairs(e: Emitter, total: Any, left: Any, right: Any) -> Any:
    """total + the sum of two products in each lane; left, right: int lanes of two bf16 each."""
    function = e.function("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [FLOATS, _PAIRS, _PAIRS])
    pairs = [e.builder.bitcast(side, _PAIRS) for side in (left, right)]
    return e.builder.call(function, [total, *pairs])


def narrow(e: Emitter, value: Any) -> Any:
    """fp32 lanes rounded to bf16, as shorts."""
    function = e.function("llvm.x86.avx512bf16.cvtneps2bf16.512", _HALF, [FLOATS])
    return e.builder.bitcast(e.builder.call(function, [value]), SHORTS)
