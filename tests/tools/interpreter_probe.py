"""Small kernels that show whether an interpreter has the defects that `tools.interpreter` mends.

Run as a program (with TRITON_INTERPRET=1) it prints one JSON object: defect name -> present.
"""

from __future__ import annotations

import json

import torch
import triton
import triton.language as tl


@triton.jit
def cast_kernel(source, target, BLOCK: tl.constexpr):
    """target[i] = source[i], converted to the element type of `target`."""
    i = tl.arange(0, BLOCK)
    value = tl.load(source + i)
    tl.store(target + i, value.to(target.dtype.element_ty))


@triton.jit
def arithmetic_kernel(left, right, total, BLOCK: tl.constexpr):
    """total[i] = left[i] * 2 + right[i] in the operands' own type."""
    i = tl.arange(0, BLOCK)
    tl.store(total + i, tl.load(left + i) * 2 + tl.load(right + i))


@triton.jit
def sum_kernel(source, total, BLOCK: tl.constexpr):
    """total[0] = sum of source[0:BLOCK] in its own type."""
    tl.store(total, tl.sum(tl.load(source + tl.arange(0, BLOCK)), axis=0))


@triton.jit
def largest_kernel(source, largest, BLOCK: tl.constexpr):
    """largest[0] = max of source[0:BLOCK] through a user's combine function."""
    tl.store(largest, tl.reduce(tl.load(source + tl.arange(0, BLOCK)), 0, larger))


@triton.jit
def larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def dot_kernel(left, right, product, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    """product [SIZE, SIZE] = left [SIZE, DEPTH] @ right [DEPTH, SIZE]."""
    row = tl.arange(0, SIZE)
    depth = tl.arange(0, DEPTH)
    a = tl.load(left + row[:, None] * DEPTH + depth[None, :])
    b = tl.load(right + depth[:, None] * SIZE + row[None, :])
    tl.store(product + row[:, None] * SIZE + row[None, :], tl.dot(a, b))


def _same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(got.float(), expected.float())


def _cast_is_right(dtype: torch.dtype) -> bool:
    source = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 8
    target = torch.zeros(4096, dtype=dtype)
    cast_kernel[(1,)](source, target, BLOCK=4096)
    return _same(target, source.to(dtype))


def _dot_is_right(dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-4, 5, (16, 32), generator=generator).to(dtype)
    right = torch.randint(-4, 5, (32, 16), generator=generator).to(dtype)
    product = torch.zeros(16, 16)
    dot_kernel[(1,)](left, right, product, SIZE=16, DEPTH=32)
    return _same(product, left.float() @ right.float())


def _arithmetic_is_right() -> bool:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(256, generator=generator).bfloat16()
    right = torch.randn(256, generator=generator).bfloat16()
    total = torch.zeros_like(left)
    arithmetic_kernel[(1,)](left, right, total, BLOCK=256)
    return _same(total, left * 2 + right)


def _sum_is_right() -> bool:
    source = torch.arange(-8, 24).bfloat16()
    total = torch.zeros(1, dtype=torch.bfloat16)
    sum_kernel[(1,)](source, total, BLOCK=32)
    return _same(total, source.float().sum().bfloat16().reshape(1))


def _largest_is_right() -> bool:
    source = torch.tensor([-3.0, -7.0, -1.0, -2.0]).bfloat16()
    largest = torch.zeros(1, dtype=torch.bfloat16)
    largest_kernel[(1,)](source, largest, BLOCK=4)
    return _same(largest, source.max().reshape(1))


def defects() -> dict[str, bool]:
    """Defect name -> whether the interpreter of this process has it."""
    probes = {
        "bf16 cast truncates": lambda: _cast_is_right(torch.bfloat16),
        "fp8 e4m3 cast rounds wrongly": lambda: _cast_is_right(torch.float8_e4m3fn),
        "fp8 e5m2 cast rounds wrongly": lambda: _cast_is_right(torch.float8_e5m2),
        "bf16 dot multiplies bit patterns": lambda: _dot_is_right(torch.bfloat16),
        "bf16 arithmetic adds bit patterns": _arithmetic_is_right,
        "bf16 sum adds bit patterns": _sum_is_right,
        "bf16 reduce compares bit patterns": _largest_is_right,
    }
    return {name: not right() for name, right in probes.items()}


if __name__ == "__main__":
    print(json.dumps(defects()))
