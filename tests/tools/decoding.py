"""Caches, queries and comparisons for the tests of `decode_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import lath

HEADS, GROUP, DIM, VALUE_DIM = 2, 2, 32, 48


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(
    length: int,
    key: str = "float",
    value: str | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    lengths: list[int] | None = None,
    **options: Any,
) -> lath.PagedKV:
    options = {"value_dim": VALUE_DIM, "backend": "reference", **options}
    kv = lath.PagedKV(HEADS, DIM, batch, key, value or key, dtype=dtype, **options)
    k = numbers(batch, HEADS, length, DIM, seed=1) + 0.5
    kv.append(k.to(dtype), numbers(batch, HEADS, length, VALUE_DIM, seed=2, dtype=dtype), lengths)
    return kv


def query(rows: int, batch: int = 1, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return numbers(batch, HEADS * GROUP, rows, DIM, seed=seed, dtype=dtype)


def held(kv: lath.PagedKV, s: int = 0) -> tuple[Tensor, Tensor]:
    k, v = kv.dequantize(s)
    return k[None], v[None]


def assert_close(got: Any, expected: Any, atol: float = 2e-5) -> None:
    """o and lse; equal where infinite."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=atol)


def short(value: Any) -> str:
    """The id of a parameter: a dict's keys, a class's name, else the value."""
    if isinstance(value, dict):
        return "+".join(value) or "none"
    return value.__name__ if isinstance(value, type) else str(value)
