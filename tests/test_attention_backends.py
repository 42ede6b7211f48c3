"""The verbs hand every backend the same thing: CPU and Triton (interpreted) against the definition.

fp32 inputs: the backends differ by their order of summation and by codes of weights that lie
within it of a tie, each half a level of 127 of one weight among at least 64.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lath
from tools.decoding import assert_close, numbers

COMPILED = [
    backend
    for backend, package in (("cpu", "numba"), ("triton", "triton"))
    if importlib.util.find_spec(package)
]
Q = numbers(2, 3, 4, 32).transpose(1, 2)  # strides as models have them
K, V = numbers(2, 2, 200, 32, seed=1) + 1, numbers(2, 2, 200, 48, seed=2)
MASK, BIAS = numbers(3, 200, seed=3) > -0.5, numbers(1, 4, 3, 1, seed=4)
TREE = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()


def dense(**options: Any) -> Callable[[str], Any]:
    return lambda backend: lath.attention(Q, K, V, return_lse=True, backend=backend, **options)


def packed(backend: str) -> Any:
    ends = [0, 1, 3], [0, 100, 190]
    return lath.attention(
        Q[:1], K[:1], V[:1], cu_seqlens=ends, causal=True, return_lse=True, backend=backend
    )


def drop_in(backend: str) -> Any:
    o = lath.scaled_dot_product_attention(Q, K, V, BIAS, enable_gqa=True, backend=backend)
    return o, o


def decode(
    key: str, value: str, given: dict[str, Any] | None = None, **options: Any
) -> Callable[[str], Any]:
    """A cache that the backend itself writes, cropped, appended to and reordered."""

    def run(backend: str) -> Any:
        settings = {"dtype": torch.float32, "value_dim": 48, "backend": backend, **(given or {})}
        kv = lath.PagedKV(2, 32, 2, key, value, **settings)
        kv.append(K, V, [200, 130])
        kv.crop([150, 129])
        kv.append(K[:, :, :80], V[:, :, :80])
        kv.reorder([1, 0])
        return lath.decode_attention(Q, kv, return_lse=True, **options)

    return run


CALLS: dict[str, Callable[[str], Any]] = {
    "float": dense(causal=True),
    "int8 lengths": dense(precision="int8", lengths=[200, 70], mask=MASK, bias=BIAS),
    "int16 sink": dense(precision="int16", sink=torch.ones(4), window=90, causal=True),
    "e4m3": dense(precision="e4m3", softcap=3.0),
    "alibi": dense(alibi=torch.tensor([0.1, 0.2, 0.0, 0.3]), query_lengths=[3, 1]),
    "packed": packed,
    "drop-in": drop_in,
    "decode int8": decode("int8", "int8"),
    "decode ragged": decode("int8", "int8", query_lengths=[1, 3], mask=numbers(230) > -1),
    "decode tree": decode("int8", "int8", tree_mask=TREE),
    "decode k4v2": decode("int4", "int2", {"key_channel_scales": torch.full((2, 32), 2.0)}),
    "decode draft": decode("int8-planes", "int8-planes", draft=True),
    "decode unified": decode("int8", "float", {"keep_first": False}, scheme="unified"),
    "decode float": decode("float", "float", window=100),
    "decode fireq": decode("int4", "int4", query="e4m3"),
    "decode e4m3": decode("e4m3", "e4m3"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", COMPILED)
def test_backends_agree(name: str, backend: str) -> None:
    if (name, backend) == ("decode unified", "cpu"):
        with pytest.raises(NotImplementedError, match="unified"):
            CALLS[name](backend)
        return
    expected: tuple[Tensor, Tensor] = CALLS[name]("reference")
    got = CALLS[name](backend)
    # A code of E4M3 is a step of 1/16 from the next, one of int8 1/127.
    flips = {"e4m3": 2e-3, "decode e4m3": 2e-3}.get(name, 2e-4)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=flips)
    assert_close([got[1]], [expected[1]], atol=1e-5)


@pytest.mark.parametrize("backend", COMPILED)
def test_one_by_one_is_all_at_once(backend: str) -> None:
    """From a view of the tail or of the input, at any offset and stride: the same records."""
    caches = [
        lath.PagedKV(2, 32, 2, "int4", "int8", dtype=torch.float32, value_dim=48, backend=backend)
        for _ in range(2)
    ]
    caches[0].append(K, V)
    for i in range(200):
        caches[1].append(K[:, :, i : i + 1], V[:, :, i : i + 1])
    whole, single = caches
    pages = [[page for span in kv.spans for page in span.pages] for kv in caches]
    assert torch.equal(whole.pool.records[pages[0]], single.pool.records[pages[1]])
    assert torch.equal(whole.pool.index[pages[0]], single.pool.index[pages[1]])
    assert_close(whole.dequantize(1), single.dequantize(1), atol=0)
