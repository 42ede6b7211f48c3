"""`lath.decode_attention` and `lath.merge`: the contracts of attention and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lath
from tools.decoding import DIM, HEADS, VALUE_DIM, assert_close, filled, numbers, query, short
from tools.dense_attention import backends, dense_attention

BACKENDS = backends()
TREE = torch.tensor(
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
).bool()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_read_nothing(backend: str) -> None:
    sink = torch.tensor([1.0, -2.0, 0.5, 3.0])
    mask = torch.ones(3, 100, dtype=torch.bool)
    mask[1] = False
    cases = [
        (filled(0), query(3), {}, [0, 1, 2]),
        (filled(100), query(3), {"mask": mask}, [1]),
        (filled(2), query(3), {}, [0]),  # row 0 stands before the first key
    ]
    for kv, q, options, dead in cases:
        o, lse = lath.decode_attention(q, kv, return_lse=True, backend=backend, **options)
        assert not o[:, :, dead].any()
        assert torch.isneginf(lse[:, :, dead]).all()
        assert not torch.isnan(o).any()
        o, lse = lath.decode_attention(
            q, kv, sink=sink, return_lse=True, backend=backend, **options
        )
        assert not o[:, :, dead].any()
        torch.testing.assert_close(lse[0, :, dead], sink[:, None].expand(4, len(dead)))
    o, lse = lath.decode_attention(
        query(3), filled(0), sink=sink, query_lengths=[2], return_lse=True, backend=backend
    )
    assert torch.equal(lse[0, :, :2], sink[:, None].expand(4, 2))
    assert torch.isneginf(lse[0, :, 2]).all()
    empty = lath.decode_attention(query(0), filled(100), backend=backend)
    assert empty.shape == (1, 4, 0, VALUE_DIM)
    none = lath.PagedKV(HEADS, DIM, 0, dtype=torch.float32, backend=backend)
    assert lath.decode_attention(query(3, batch=0), none).shape == (0, 4, 3, DIM)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_q_stays_in_its_row(backend: str) -> None:
    kv, q = filled(150, "int8"), query(3)
    clean = lath.decode_attention(q, kv, backend=backend)
    q[0, 1, 2, 5] = math.nan
    o = lath.decode_attention(q, kv, backend=backend)
    assert torch.isnan(o[0, 1, 2]).all()
    o[0, 1, 2] = clean[0, 1, 2]
    assert torch.equal(o, clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_held_is_not_read(backend: str) -> None:
    """NaN in every slot beyond a count, in float parts, free pages and cut pages."""
    kv, q = filled(300, "int8"), query(2)
    kv.crop(170)
    expected = lath.decode_attention(q, kv, backend=backend)
    for part in (kv.last_keys, kv.last_values):
        part[:, :, kv.spans[0].last :] = math.nan
    free = [page for page, count in enumerate(kv.pool.references) if not count]
    assert free
    kv.pool.records[free] = 255
    assert torch.equal(lath.decode_attention(q, kv, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_merge_into_the_whole(backend: str) -> None:
    """Hogwild: segments stored from position 0, queries turned by where each begins."""
    frequencies = 1.0 / 100.0 ** (torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2))

    def turn(x: Tensor, positions: Tensor) -> Tensor:
        angles = positions.double()[:, None] * frequencies
        a, b = x.double().chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    k, v = numbers(1, HEADS, 150, DIM, seed=1), numbers(1, HEADS, 150, VALUE_DIM, seed=2)
    q, last = query(1), torch.tensor([149])
    expected = dense_attention(turn(q, last), turn(k, torch.arange(150)), v)
    parts = []
    for start, end in ((0, 70), (70, 70), (70, 150)):
        kv = lath.PagedKV(HEADS, DIM, dtype=k.dtype, value_dim=VALUE_DIM, key_codec="float",
                          value_codec="float", backend=backend)  # fmt: skip
        kv.append(turn(k[:, :, start:end], torch.arange(end - start)).float(), v[:, :, start:end])
        turned = turn(q, last - start).float()
        parts.append(lath.decode_attention(turned, kv, causal=False, return_lse=True))
    assert_close(lath.merge(parts), expected)
    nested = lath.merge([lath.merge(parts[1:]), parts[0]])
    assert_close(nested, expected)


def test_layers_may_share_a_cache() -> None:
    """SwiftKV: a later layer attends over an earlier layer's cache, by the object or a fork."""
    kv, q = filled(150, "int8"), query(1, seed=8)
    assert torch.equal(lath.decode_attention(q, kv), lath.decode_attention(q, kv.fork()))


def test_merge_takes_empty_parts_and_keeps_the_dtype() -> None:
    o, lse = query(3, dtype=torch.bfloat16), numbers(1, 4, 3)
    lse[0, 0] = -math.inf
    hidden = torch.full_like(o, math.nan), torch.full_like(lse, -math.inf)
    merged = lath.merge([hidden, (o, lse), hidden])
    assert merged[0].dtype == torch.bfloat16
    assert torch.equal(merged[1], lse)
    assert not merged[0][0, 0].any()
    assert torch.equal(merged[0][0, 1:], o[0, 1:])


def test_nothing_is_changed() -> None:
    kv, q = filled(150, "int8"), query(5)
    mask, bias, sink = numbers(5, 150) > 0, numbers(5, 150), numbers(4)
    given = [q, mask, bias, sink, TREE, kv.pool.records, kv.pool.index, kv.last_keys]
    before = [tensor.clone() for tensor in given]
    lath.decode_attention(q, kv, mask=mask, bias=bias, sink=sink, tree_mask=TREE)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_strides_do_not_matter() -> None:
    kv, q = filled(150, "int8"), query(6)
    expected = lath.decode_attention(q, kv)
    for other in (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        q.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert torch.equal(lath.decode_attention(other, kv), expected)


def test_backward_raises() -> None:
    q = query(1).requires_grad_()
    o = lath.decode_attention(q, filled(20))
    with pytest.raises(NotImplementedError, match="decode_attention has no backward"):
        o.sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"q": numbers(1, 4, 2, 31)}, ValueError, "head dim"),
        ({"q": numbers(1, 3, 2, 32)}, ValueError, "multiple of the cache's 2 heads"),
        ({"q": numbers(2, 4, 2, 32)}, ValueError, "batch, 1"),
        ({"q": numbers(4, 2, 32)}, ValueError, "q must be"),
        ({"q": numbers(1, 4, 2, 32).half()}, TypeError, "q must be float32"),
        ({"q": [1]}, TypeError, "q must be"),
        ({"kv": 3}, TypeError, "kv must be"),
        ({"causal": 1}, TypeError, "causal"),
        ({"window": 0}, ValueError, "window"),
        ({"window": -3}, ValueError, "window"),
        ({"window": 2.0}, TypeError, "window"),
        ({"mask": torch.ones(2, 99, dtype=torch.bool)}, ValueError, "mask must broadcast"),
        ({"mask": torch.ones(2, 100)}, TypeError, "mask must be bool"),
        ({"mask": torch.ones(1, 1, 1, 2, 100, dtype=torch.bool)}, ValueError, "mask"),
        ({"bias": torch.ones(3, 100)}, ValueError, "bias must broadcast"),
        ({"bias": torch.ones(2, 100, dtype=torch.int64)}, TypeError, "bias"),
        ({"alibi": torch.ones(2)}, ValueError, "alibi"),
        ({"scale": 0.0}, ValueError, "scale"),
        ({"scale": math.nan}, ValueError, "scale"),
        ({"scale": "1"}, TypeError, "scale"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"sink": torch.ones(4, 1)}, ValueError, "sink"),
        ({"sink": 1.0}, TypeError, "sink"),
        ({"tree_mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "tree_mask"),
        ({"tree_mask": torch.ones(3, dtype=torch.int64)}, ValueError, "tree_mask"),
        ({"tree_mask": torch.ones(2, 2)}, TypeError, "tree_mask"),
        ({"query_lengths": [3]}, ValueError, "query_lengths"),
        ({"query_lengths": [1, 1]}, ValueError, "query_lengths"),
        ({"query": "fp8"}, ValueError, "query"),
        ({"query": "e4m3"}, ValueError, "int4, int2 or e4m3"),
        ({"precision": "int4"}, ValueError, "precision"),
        ({"precision": "e4m3"}, ValueError, "precision must be one of"),
        ({"scheme": "fast"}, ValueError, "scheme"),
        ({"scheme": "unified", "bias": torch.ones(2, 100)}, NotImplementedError, "bias"),
        ({"scheme": "unified", "alibi": torch.ones(4)}, NotImplementedError, "alibi"),
        ({"draft": True}, ValueError, "int8-planes"),
        ({"draft": 1}, TypeError, "draft"),
        ({"splits": 0}, ValueError, "splits"),
        ({"splits": 1.5}, TypeError, "splits"),
        ({"return_lse": 0}, TypeError, "return_lse"),
        ({"backend": "gpu"}, ValueError, "backend"),
        ({"mask": torch.ones(2, 100).bool().to("meta")}, ValueError, "mask must be on"),
    ],
    ids=short,
)  # fmt: skip
def test_bad_arguments(options: dict[str, Any], error: type, names: str) -> None:
    given = {"q": query(2), "kv": filled(100, "int8"), **options}
    with pytest.raises(error, match=names):
        lath.decode_attention(**given)


def test_codecs_refuse_what_they_cannot() -> None:
    q = query(1)
    with pytest.raises(ValueError, match="query must be 'e4m3'"):
        lath.decode_attention(q, filled(10, "e4m3"), query="int8")
    with pytest.raises(ValueError, match="precision must be one of"):
        lath.decode_attention(q, filled(10, "e4m3"), precision="int8")
    with pytest.raises(ValueError, match="precision must be one of"):
        lath.decode_attention(q, filled(10, "int8", "float"), precision="int8")
    with pytest.raises(NotImplementedError, match="draft"):
        lath.decode_attention(q, filled(10, "int8-planes"), scheme="unified", draft=True)
    with pytest.raises(ValueError, match="64 nodes"):
        lath.decode_attention(query(65), filled(70), tree_mask=torch.zeros(65, dtype=torch.int64))


def test_bad_parts() -> None:
    part = (numbers(1, 4, 2, 8), numbers(1, 4, 2))
    for parts, error, names in (
        ([], ValueError, "at least one"),
        (3, TypeError, "list"),
        ([part[0]], TypeError, r"parts\[0\]"),
        ([part, (part[0], part[1][:, :3])], ValueError, r"parts\[1\]"),
        ([part, (part[0][..., :4], part[1])], ValueError, r"shapes of parts\[0\]"),
        ([part, (part[0].half(), part[1])], TypeError, r"parts\[1\]"),
    ):
        with pytest.raises(error, match=names):
            lath.merge(parts)
