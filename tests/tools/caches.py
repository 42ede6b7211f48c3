"""Small caches and their contents, for the tests of `PagedKV` and of attention over it."""

from __future__ import annotations

import torch
from torch import Tensor

import lath

HEADS, DIM, VALUE_DIM = 2, 16, 32


def tokens(
    length: int, batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(batch, HEADS, length, DIM, generator=generator) + 1
    v = torch.randn(batch, HEADS, length, VALUE_DIM, generator=generator)
    return k.to(dtype), v.to(dtype)


def cache(
    codec: str = "int8", batch: int = 1, dtype: torch.dtype = torch.bfloat16, **options
) -> lath.PagedKV:
    options = {"backend": "reference", "value_dim": VALUE_DIM, **options}
    return lath.PagedKV(HEADS, DIM, batch, codec, codec, dtype=dtype, **options)


def contents(kv: lath.PagedKV) -> list[tuple[Tensor, Tensor]]:
    return [kv.dequantize(s) for s in range(kv.batch)]


def assert_same(a: lath.PagedKV, b: lath.PagedKV) -> None:
    """Same structure, same numbers, page for page."""
    assert [(s.first, s.counts, s.last) for s in a.spans] == [
        (s.first, s.counts, s.last) for s in b.spans
    ]
    for (ka, va), (kb, vb) in zip(contents(a), contents(b), strict=True):
        assert torch.equal(ka, kb)
        assert torch.equal(va, vb)
    for x, y in zip(a.spans, b.spans, strict=True):
        assert torch.equal(a.pool.records[x.pages], b.pool.records[y.pages])
        assert torch.equal(a.pool.index[x.pages], b.pool.index[y.pages])
