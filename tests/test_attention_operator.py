"""`lath.attention` as an operator of torch, its plan, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import lath
from tools.decoding import numbers, short
from tools.dense_attention import backends

BACKENDS = backends()


def inputs(rows: int = 6, keys: int = 70) -> Any:
    return numbers(2, 4, rows, 32), numbers(2, 2, keys, 32, seed=1), numbers(2, 2, keys, 32, seed=2)


def operator_arguments(backend: str, *options: Any) -> tuple[Any, ...]:
    return (*inputs(), *options, True, None, 0.2, None, "int8", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    operator = torch.ops.lath.attention.default
    plain = operator_arguments(backend, *[None] * 8)
    torch.library.opcheck(operator, plain)
    ragged = operator_arguments(
        backend, numbers(2, 1, 6, 70) > 0, numbers(1, 4, 6, 70), numbers(4), numbers(4),
        torch.tensor([70, 3]), torch.tensor([6, 2]), None, None,
    )  # fmt: skip
    torch.library.opcheck(operator, ragged)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_gives_one_graph(backend: str) -> None:
    graphs = []

    def count(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    def layer(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        masked = lath.attention(
            q, k, v, mask=torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(),
            sink=torch.ones(4), backend=backend,
        )  # fmt: skip
        return masked + lath.attention(q, k, v, causal=True, lengths=lengths, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    arguments = (*inputs(), torch.tensor([70, 9]))
    assert torch.equal(compiled(*arguments), layer(*arguments))
    assert len(graphs) == 1


def test_gradients_raise_and_are_not_lost() -> None:
    q, k, v = inputs()
    expected = lath.attention(q, k, v)
    for i in range(3):
        given = [x.clone().requires_grad_(i == j) for j, x in enumerate((q, k, v))]
        o = lath.attention(*given)
        assert torch.equal(o, expected)
        with pytest.raises(NotImplementedError, match=r"lath\.attention has no backward"):
            o.sum().backward()
    with pytest.raises(TypeError, match="lengths must be"):
        lath.attention(given[0], k, given[2], lengths="ab")
    with torch.no_grad():
        assert not lath.attention(q.requires_grad_(), k, v).requires_grad


@pytest.mark.parametrize("device", ["sm_90", "sm_89", "gfx942", "avx512_vnni"])
def test_the_plan_says_why(device: str) -> None:
    sizes = {"query_heads": 32, "kv_heads": 8, "head_dim": 128, "device": device}
    decode = lath.plan_attention(keys=32768, **sizes)
    prefill = lath.plan_attention(queries=2048, keys=2048, value_codec="float", **sizes)
    for plan in (decode, prefill):
        assert plan.reason
        assert plan.bytes_moved > 0
        assert plan.operations > 0
    assert decode == lath.plan_attention(keys=32768, **sizes)


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"keys": -1}, ValueError, "keys"),
        ({"query_heads": 12}, ValueError, "query_heads must be a multiple"),
        ({"kv_heads": 0}, ValueError, "query_heads"),
        ({"key_codec": "int5"}, ValueError, "key_codec"),
        ({"precision": "e4m3"}, ValueError, "precision"),
        ({"dtype": torch.float64}, TypeError, "dtype"),
        ({"device": "abacus"}, ValueError, "device"),
    ],
    ids=short,
)
def test_plans_refused(options: dict[str, Any], error: type, names: str) -> None:
    given = {"query_heads": 32, "kv_heads": 8, "head_dim": 128, "keys": 100, **options}
    with pytest.raises(error, match=names):
        lath.plan_attention(**given)


Q, K, V = inputs()


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"q": Q[0]}, ValueError, "q must be"),
        ({"q": Q[..., :31]}, ValueError, "head dim of k, 32"),
        ({"q": Q[:, :3]}, ValueError, "multiple of k's 2 heads"),
        ({"q": Q[:1]}, ValueError, "batch"),
        ({"q": Q.double()}, TypeError, "q must be"),
        ({"k": K.half()}, TypeError, "k must be torch.float32 like q"),
        ({"v": V.bfloat16()}, TypeError, "v must be torch.float32 like q"),
        ({"k": K[0]}, ValueError, "k must be"),
        ({"v": V[:, :, :69]}, ValueError, "alike"),
        ({"v": V[:, :1]}, ValueError, "alike"),
        ({"k": K[:, :0], "v": V[:, :0]}, ValueError, "Hkv >= 1"),
        ({"k": "k"}, TypeError, "k must be a torch.Tensor"),
        ({"k": K.to("meta")}, ValueError, "k must be on cpu"),
        ({"q": numbers(2, 4, 6, 300), "k": numbers(2, 2, 70, 300)}, NotImplementedError, "300"),
        ({"v": V[..., :0]}, NotImplementedError, "v's head dim"),
        ({"causal": None}, TypeError, "causal"),
        ({"window": 0}, ValueError, "window"),
        ({"window": True}, TypeError, "window"),
        ({"mask": torch.ones(6, 71).bool()}, ValueError, "mask must broadcast"),
        ({"mask": torch.ones(6, 70)}, TypeError, "mask must be bool"),
        ({"bias": torch.ones(3, 1, 6, 70)}, ValueError, "bias must broadcast"),
        ({"bias": 1.0}, TypeError, "bias"),
        ({"alibi": torch.ones(2)}, ValueError, "alibi"),
        ({"scale": -1.0}, ValueError, "scale"),
        ({"softcap": 0}, ValueError, "softcap"),
        ({"softcap": math.inf}, ValueError, "softcap"),
        ({"sink": torch.ones(5)}, ValueError, "sink"),
        ({"sink": torch.ones(4).to("meta")}, ValueError, "sink must be on cpu"),
        ({"lengths": [71, 1]}, ValueError, "lengths must be 0 .. 70"),
        ({"lengths": [-1, 1]}, ValueError, "lengths"),
        ({"lengths": [1]}, ValueError, "lengths must have"),
        ({"lengths": torch.ones(2)}, TypeError, "lengths"),
        ({"lengths": torch.ones(2, 1).long()}, ValueError, "one-dimensional"),
        ({"query_lengths": [7, 0]}, ValueError, "query_lengths must be 0 .. 6"),
        ({"cu_seqlens": [0, 3]}, ValueError, "batch 1"),
        ({"cu_seqlens": [0, 3], "lengths": [3, 3]}, NotImplementedError, "lengths"),
        ({"precision": "fp8"}, ValueError, "precision"),
        ({"precision": 8}, TypeError, "precision"),
        ({"return_lse": 1}, TypeError, "return_lse"),
        ({"backend": "cuda"}, ValueError, "backend"),
    ],
    ids=short,
)
def test_bad_arguments(options: dict[str, Any], error: type, names: str) -> None:
    with pytest.raises(error, match=names):
        lath.attention(**{"q": Q, "k": K, "v": V, **options})


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"cu_seqlens": [0, 3, 2, 6]}, ValueError, "must ascend"),
        ({"cu_seqlens": [1, 6]}, ValueError, "must ascend from 0"),
        ({"cu_seqlens": [0, 7]}, ValueError, "at most 6"),
        ({"cu_seqlens": []}, ValueError, "must ascend"),
        ({"cu_seqlens": ([0, 6], [0, 3, 6])}, ValueError, "as many sequences"),
        ({"cu_seqlens": torch.tensor([0.0, 6])}, TypeError, "cu_seqlens"),
        ({"cu_seqlens": [0, 6], "mask": torch.ones(6, 6).bool()}, NotImplementedError, "mask"),
        ({"cu_seqlens": [0, 6], "bias": torch.ones(6, 6)}, NotImplementedError, "bias"),
    ],
    ids=short,
)
def test_bad_packing(options: dict[str, Any], error: type, names: str) -> None:
    q, k, v = (x[:1, :, :6] for x in (Q, K, V))
    with pytest.raises(error, match=names):
        lath.attention(q, k, v, **options)
