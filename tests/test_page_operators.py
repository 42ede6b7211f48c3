"""Caches under torch.compile: the operators are sound, and a graph gives what eager mode does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lath
from lath.formats.attention import PageView
from lath.verbs import page_operators


def cache(length: int) -> tuple[lath.PagedKV, Tensor, Tensor]:
    kv = lath.PagedKV(2, 32, backend="reference")
    k, v = torch.randn(2, 1, 2, length, 32, dtype=torch.bfloat16)
    kv.append(k, v)
    return kv, k, v


def tensors_of(view: PageView) -> list[Tensor | None]:
    names = (
        "records", "index", "table", "starts", "counts", "page_counts", "lengths", "first_keys",
        "first_values", "first_lengths", "last_keys", "last_values", "last_lengths",
    )  # fmt: skip
    return [getattr(view, name) for name in names]


def test_attend_pages_passes_opcheck() -> None:
    kv, _, _ = cache(200)
    q = torch.randn(1, 4, 2, 32, dtype=torch.bfloat16)
    arguments: list[Any] = [
        q, torch.tensor([2], dtype=torch.int32), *tensors_of(kv.view()), *[None] * 5,
        "int8", "int8", 32, 32, 2, 200, False, 32**-0.5, True, None, None, "int8", "int8", "online",
        "reference", None,
    ]  # fmt: skip
    torch.library.opcheck(page_operators._attend_operator, arguments)


def test_write_pages_passes_opcheck() -> None:
    kv, k, v = cache(128)
    jobs = torch.tensor([[0, 0, 64, 0]], dtype=torch.int32)
    records, index = kv.pool.records.clone(), kv.pool.index.clone()
    arguments = (k, v, records, index, jobs, "int8", "int8", "reference")
    torch.library.opcheck(page_operators._write_operator, arguments)


@pytest.mark.parametrize("length", [40, 200])
def test_decoding_compiles_to_one_graph(length: int) -> None:
    kv, _, _ = cache(length)
    q = torch.randn(1, 4, 1, 32, dtype=torch.bfloat16)

    def step(q: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = lath.decode_attention(q * 2, kv, return_lse=True)
        return o + 1, lse

    expected = step(q)
    torch._dynamo.reset()
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(q)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_appending_in_a_compiled_function_is_appending() -> None:
    kv, k, v = cache(126)
    other = kv.fork()
    q = torch.randn(1, 4, 1, 32, dtype=torch.bfloat16)

    def step(kv: lath.PagedKV, q: Tensor, at: int) -> Tensor:
        kv.append(k[:, :, at : at + 1], v[:, :, at : at + 1])
        result: Tensor = lath.decode_attention(q, kv)
        return result

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager")
    for at in range(4):  # over the end of a page
        assert torch.equal(compiled(kv, q, at), step(other, q, at))
    assert kv.lengths == other.lengths
