"""The PTX instructions that the kernels write themselves, for Triton's interpreter.

Each is computed in float64, where a product and a sum of two 16-bit floats are exact, and rounded
once, as the instruction does. Another text than these raises.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl

from tools.narrow_floats import Array, bfloat16_to_float32, float32_to_bfloat16


def _half(words: Array) -> Array:
    return words.view(np.float16).astype(np.float64)


def _brain(words: Array) -> Array:
    return bfloat16_to_float32(words.view(np.uint16)).astype(np.float64)


def _fma_half(a: Array, b: Array, c: Array) -> Array:
    return (_half(a) * _half(b) + _half(c)).astype(np.float16).view(np.uint32)


def _fma_brain(a: Array, b: Array, c: Array) -> Array:
    total = _brain(a) * _brain(b) + _brain(c)
    single = total.astype(np.float32)
    assert np.array_equal(single, total), "a sum that fp32 does not hold would be rounded twice"
    return float32_to_bfloat16(single).astype(np.uint16).view(np.uint32)


INSTRUCTIONS = {
    "mov.b32 $0, $1;": lambda a: a,
    "fma.rn.f16x2 $0, $1, $2, $3;": _fma_half,
    "fma.rn.bf16x2 $0, $1, $2, $3;": _fma_brain,
}


class _Call:
    """What the builder's call returns: its one result."""

    def __init__(self, result: Any) -> None:
        self._result = result

    def get_result(self, index: int) -> Any:
        assert index == 0
        return self._result


def patch_inline_assembly(interpreter: Any) -> None:
    """Let the interpreter of this process run `INSTRUCTIONS` on 32-bit words."""
    handle = interpreter.TensorHandle

    def create_inline_asm(
        self: Any, text: str, constraints: str, values: Any, types: Any, is_pure: bool, pack: int
    ) -> _Call:
        if text not in INSTRUCTIONS or pack != 1:
            raise NotImplementedError(f"the interpreter has no twin of {text!r}, pack {pack}")
        words = [np.ascontiguousarray(value.data).view(np.uint32) for value in values]
        shape = words[0].shape
        result = INSTRUCTIONS[text](*(word.reshape(-1) for word in words))
        return _Call(handle(result.reshape(shape), tl.uint32))

    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
