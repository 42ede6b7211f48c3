"""Dropping tokens of a `PagedKV`: positions count on, and attention is attention without them."""

from __future__ import annotations

import copy
import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lath
from lath.formats.attention import Queries, ScoreOptions
from lath.formats.selection import IndexList
from oracle_attention import definition
from tools.caches import assert_same, cache, contents, tokens
from tools.decoding import DIM, GROUP, HEADS, assert_close, filled, held, query
from tools.dense_attention import backends, dense_attention

BACKENDS = backends()


def entries(kv: lath.PagedKV, s: int, numbers: list[int]) -> list[int]:
    """Positions of some pages of a sequence."""
    return [position for n in numbers for position in kv.spans[s].pages_at[n]]


def readable(kv: lath.PagedKV, gone: list[list[int]]) -> Tensor:
    """The mask [B, 1, 1, longest] without some positions."""
    mask = torch.ones(kv.batch, 1, 1, len(kv), dtype=torch.bool)
    for s, positions in enumerate(gone):
        mask[s, :, :, positions] = False
    return mask


def attend(q: Tensor, kv: lath.PagedKV, **options: Any) -> tuple[Tensor, Tensor]:
    o, lse = lath.decode_attention(q, kv, return_lse=True, **options)
    return o, lse


@pytest.mark.parametrize("codec", ["float", "int8", "int4", "e4m3"])
def test_dropping_pages_is_masking_them(codec: str) -> None:
    """Bit for bit in the definition, window and slopes by position included."""
    kv, q = filled(700, codec, batch=2, lengths=[700, 410]), query(3, batch=2)
    whole = kv.fork()
    dropped = [[0, 3, 4, 8], [2]]
    mask = readable(kv, [entries(kv, s, own) for s, own in enumerate(dropped)])
    kv.drop_pages(dropped)
    assert kv.lengths == whole.lengths
    assert kv.tokens == [700 - 4 * 64, 410 - 64]
    for options in ({}, {"window": 300}, {"alibi": torch.tensor([0.1, 0.01, 0.0, 0.02])}):
        got, expected = attend(q, kv, **options), attend(q, whole, mask=mask, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert (got[0] - attend(q, whole, **options)[0]).abs().max() > 1e-3  # negative control


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_left_is_all_that_is_read(backend: str) -> None:
    """Float64 attention over the tokens that are held, and over none."""
    kv, q = filled(500), query(1)
    kv.drop_pages([[1, 2, 5]])
    k, v = held(kv)
    assert k.shape[2] == 500 - 192
    assert_close(attend(q, kv, backend=backend), dense_attention(q, k, v, causal=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_that_holds_nothing_at_its_length(backend: str) -> None:
    bare, q = filled(192, keep_first=False), query(1)
    bare.drop_pages([[0, 1, 2]])
    o, lse = attend(q, bare, backend=backend)
    assert (bare.lengths, bare.tokens) == ([192], [0])
    assert not o.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("codecs", [("int8", "int8"), ("int4", "float"), ("float", "float")])
@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU kernels need numba")
def test_kernels_read_gaps(codecs: tuple[str, str]) -> None:
    """Within the oracle's bounds, gaps at both ends and a crop into one."""
    kv, q = filled(900, *codecs, batch=3, lengths=[900, 500, 64]), query(2, batch=3)
    kv.drop_pages([[0, 1, 5, 12], [3, 4], []])
    kv.crop([830, 400, 64])  # the first ends in a gap
    assert kv.spans[0].last == 0
    o, lse = attend(q, kv, backend="cpu")
    precision: Any = "int8" if codecs[1] == "int8" else "float"
    rows = torch.full((3,), 2, dtype=torch.int32)
    options = ScoreOptions(DIM**-0.5, causal=True, precision=precision)
    answer = definition(Queries(q, rows, 2), kv.view(), options)
    assert (np.abs(o.double().numpy() - answer.o) <= answer.o_bound).all()
    assert (np.abs(lse.double().numpy() - answer.lse) <= answer.lse_bound).all()


def test_a_crop_into_a_gap_goes_on_there() -> None:
    """For every length; what is appended afterwards stands at it."""
    kv = filled(400)
    kv.drop_pages([[0, 2, 4]])
    positions = kv.positions(0)
    assert positions == [*range(64), *range(128, 192), *range(256, 320), *range(384, 400)]
    k, v = tokens_of(1)
    for length in range(401):
        cropped = kv.fork()
        cropped.crop(length)
        left = [position for position in positions if position < length]
        assert (cropped.lengths, cropped.positions(0)) == ([length], left)
        cropped.append(k, v)
        assert cropped.positions(0) == [*left, length]
        assert cropped.exact_positions
        assert torch.equal(cropped.dequantize(0)[0][:, -1], k[0, :, 0])
        view = cropped.view()
        assert view.longest == int(view.lengths[0]) == length + 1


def tokens_of(length: int, batch: int = 1, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Keys and values for the caches of `filled`."""
    source = filled(length, batch=batch, keep_first=False).dequantize(0)
    generator = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        torch.randn(batch, *side.shape, generator=generator) for side in source
    )


def test_gaps_survive_everything() -> None:
    """reorder, fork, deepcopy, to, repeat_interleave, reserve, rerotate, reset."""
    kv = cache(batch=2)
    kv.append(*tokens(420, batch=2), [420, 300])
    kv.drop_pages([[1, 3], [0]])
    before, places = contents(kv), [kv.positions(s) for s in (0, 1)]

    def check(other: lath.PagedKV, order: list[int]) -> None:
        assert other.lengths == [[420, 300][s] for s in order]
        for i, s in enumerate(order):
            assert other.positions(i) == places[s]
            assert all(
                torch.equal(a, b) for a, b in zip(other.dequantize(i), before[s], strict=True)
            )

    for other in (kv.fork(), copy.deepcopy(kv), kv.to("cpu", "reference")):
        check(other, [0, 1])
        other.reserve(1000)
        other.reorder([1, 0, 1])
        check(other, [1, 0, 1])
        other.repeat_interleave(2)
        check(other, [1, 1, 0, 0, 1, 1])
    turned = kv.fork()
    turned.rerotate(9, torch.ones(DIM // 4))
    assert [turned.positions(s) for s in (0, 1)] == places
    for s in (0, 1):
        assert torch.equal(turned.dequantize(s)[1], before[s][1])  # only keys turn
        assert not torch.equal(turned.dequantize(s)[0], before[s][0])
    turned.reset()
    assert (turned.lengths, turned.tokens) == ([0, 0], [0, 0])
    turned.append(*tokens(420, batch=2), [420, 300])
    fresh = cache(batch=2)
    fresh.append(*tokens(420, batch=2), [420, 300])
    assert_same(turned, fresh)
    check(kv, [0, 1])


def test_pages_go_back_when_nobody_holds_them() -> None:
    kv = cache()
    kv.append(*tokens(64 * 6))
    fork = kv.fork()
    kv.drop_pages([[0, 1, 2]])
    assert kv.pool.pages_in_use == 5
    fork.drop_pages([[1, 2, 3]])
    assert kv.pool.pages_in_use == 3
    del fork
    gc.collect()
    assert kv.pool.pages_in_use == 2
    size = len(kv.pool.references)
    kv.append(*tokens(64 * 3))
    assert len(kv.pool.references) == size
    assert sum(kv.pool.generations) == 5 + 3  # two of the pages were taken twice


def lists(*rows: list[int], heads: int = 1) -> IndexList:
    width = max(map(len, rows))
    padded = [[row + [-1] * (width - len(row))] * heads for row in rows]
    indices = torch.tensor(padded, dtype=torch.int32).reshape(len(rows), heads, width)
    return IndexList(indices, (indices >= 0).sum(-1, dtype=torch.int32), "page")


@pytest.mark.parametrize("heads", [1, HEADS, HEADS * GROUP])
def test_evict_keeps_a_list(heads: int) -> None:
    kv = filled(500, "int8", batch=2)
    other = kv.fork()
    kv.evict(lists([0, 3], [1, 2, 5], heads=heads))
    other.drop_pages([[1, 2, 4, 5], [0, 3, 4]])
    assert_same(kv, other)
    assert [kv.positions(s) for s in (0, 1)] == [other.positions(s) for s in (0, 1)]
    kv.evict(lists([0, 1], [0, 1, 2]))  # all there are: nothing changes
    assert_same(kv, other)


def test_keeping_everything_is_the_identity() -> None:
    for codec in ("float", "int8", "int2"):
        kv = filled(420, codec)
        kv.drop_pages([[1]])
        before = kv.fork()
        for keep in (range(420), kv.positions(0)):
            kv.compact([list(keep)], renumber=False)
            assert kv.spans[0].pages == before.spans[0].pages
            assert kv.lengths == [420]
            assert_same(kv, before)
        kv.compact([list(range(420))])
        assert kv.spans == before.spans


KEEPS = {
    "scattered": [*range(70), *range(70, 300, 3), *range(300, 420)],
    "first half of a page": [*range(64), *range(128, 170), *range(256, 420)],
    "last half of a page": [*range(64), *range(165, 192), *range(192, 420)],
    "no float parts": [*range(64, 320)],
    "holes in the tail": [*range(0, 64, 5), *range(64, 400), 401, 405],
    "one": [150],
}


@pytest.mark.parametrize("name", KEEPS)
def test_compaction_is_masking_for_floats(name: str) -> None:
    keep = KEEPS[name]
    kv, q = filled(420), query(1)
    k, v = held(kv)
    whole = kv.fork()
    kv.compact([keep], renumber=False)
    assert (kv.lengths, kv.positions(0)) == ([420], keep)
    assert all(torch.equal(a, b[:, :, keep]) for a, b in zip(held(kv), (k, v), strict=True))
    mask = torch.zeros(420, dtype=torch.bool)
    mask[keep] = True
    expected = dense_attention(q, k, v, causal=True, mask=mask)
    for backend in BACKENDS:
        assert_close(attend(q, kv, backend=backend), expected)
        assert_close(attend(q, whole, mask=mask, backend=backend), expected)
    kv.append(*tokens_of(3))
    assert kv.positions(0) == [*keep, 420, 421, 422]
    q = query(3)  # the rows of the tokens just appended: what they read is placed rightly
    assert kv.exact_from[0] <= 420
    mask = torch.cat([mask, torch.ones(3, dtype=torch.bool)])
    whole.append(*tokens_of(3))
    assert_close(attend(q, kv), dense_attention(q, *held(whole), causal=True, mask=mask))


@pytest.mark.parametrize("codec", ["int8", "int4", "e4m3"])
def test_compaction_quantises_within_its_step(codec: str) -> None:
    """Loose tokens move by half a step of their new page, the others not at all."""
    keep = KEEPS["scattered"]
    kv = filled(420, codec)
    k, v = held(kv)
    old = set(kv.spans[0].pages)
    kv.compact([keep], renumber=False)
    now_k, now_v = held(kv)
    at = kv.spans[0].first
    moved = torch.zeros(len(keep), dtype=torch.bool)
    for page, count in zip(kv.spans[0].pages, kv.spans[0].counts, strict=True):
        part = slice(at, at + count)
        moved[part] = page not in old
        if page not in old:
            steps = page_steps(kv, page, now_k[0, :, part], now_v[0, :, part])
            for now, was, step in ((now_k, k, steps[0]), (now_v, v, steps[1])):
                error = (now[0, :, part] - was[0, :, keep][:, part]).abs()
                assert (error <= step[:, :count] * (1 + 2.0**-12) + 1e-6).all()
        at += count
    assert moved.sum() == 6 + 77 + 20  # 64 .. 69, every third of 70 .. 299, and 300 .. 319
    for now, was in ((now_k, k), (now_v, v)):
        assert torch.equal(now[:, :, ~moved], was[:, :, keep][:, :, ~moved])


def page_steps(kv: lath.PagedKV, page: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest rounding error of numbers that a page decodes to."""
    fmt, record = kv.format, kv.pool.records[page]

    def field(name: str) -> Tensor:
        return (
            record[:, fmt.fields[name].offset : fmt.fields[name].end]
            .contiguous()
            .view(torch.float32)
        )

    per_token = "token_scales" in fmt.fields
    key_scales = field("token_scales")[..., None] if per_token else field("key_scales")[:, None, :1]
    value_scales = field("value_scales")[:, None, : fmt.value_dim]
    if fmt.key.map == "e4m3":  # 3 bits of mantissa: half of 1/8 of the number's power of two
        span = fmt.index_fields["mean"]
        index = kv.pool.index[page][:, span.offset : span.end].contiguous().view(torch.bfloat16)
        centred = keys - index.float()[:, None, : fmt.key_dim]
        smallest = 2.0**-10
        return (
            (centred.abs() / 15).clamp(min=0) + smallest * key_scales,
            (values.abs() / 15).clamp(min=0) + smallest * value_scales,
        )
    half = {"int8": 0.5, "int4": 8.0, "int2": 32.0}[fmt.key.name]
    return half * key_scales.expand(-1, 64, 1), half * value_scales.expand(-1, 64, -1)


def test_positions_that_are_not_known_are_refused() -> None:
    kv, q = filled(420), query(1)
    kv.compact([KEEPS["first half of a page"]], renumber=False)
    assert kv.exact_positions  # whole runs stand where they stood
    assert kv.exact_from == [0]
    attend(q, kv, window=300)
    kv.compact([[p for p in kv.positions(0) if p % 2 or p > 255]], renumber=False)
    assert not kv.exact_positions
    assert kv.exact_from == [170]  # 169 is the last token of a page that is not one run
    for options in ({"window": 9}, {"alibi": torch.ones(4)}, {"mask": torch.ones(420) > 0}):
        with pytest.raises(NotImplementedError, match=next(iter(options))):
            attend(q, kv, **options)
    kv.drop_pages([[0]])
    kv.compact([[*range(64, 420)]], renumber=False)  # the first part goes too
    assert kv.exact_positions
    kv.compact([[p for p in range(420) if p != 400]], renumber=False)
    assert kv.exact_from == [401]  # of the tail, the run at its end
    kv.crop(400)
    assert kv.exact_positions


def test_tokens_dropped_before_they_are_stored() -> None:
    """`append(keep=)`: all of them is append, a part of them is the rest at its positions."""
    k, v = tokens_of(300, batch=2)
    plain, kept, none = (filled(20, batch=2) for _ in range(3))
    plain.append(k, v, [300, 10])
    kept.append(k, v, [300, 10], keep=[list(range(300)), list(range(10))])
    assert_same(plain, kept)
    assert plain.spans == kept.spans
    none.append(k, v, [300, 10], keep=[[], []])
    none.append(k, v, [0, 5])
    other = filled(20, batch=2)
    other.advance([300, 10])
    other.append(k, v, [0, 5])
    assert_same(none, other)
    assert none.positions(1) == other.positions(1) == [*range(20), *range(30, 35)]
    assert none.exact_positions  # the first part ends before the gap, the tail begins behind it
    thin = filled(20, batch=2)
    keep = [[*range(60), *range(60, 300, 7)], torch.tensor([3, 9])]
    thin.append(k, v, [300, 10], keep=keep)
    assert thin.lengths == [320, 30]
    assert thin.positions(0) == [*range(20), *(20 + i for i in keep[0])]
    assert thin.positions(1) == [*range(20), 23, 29]
    assert [span.first for span in thin.spans] == [64, 20]
    assert torch.equal(thin.dequantize(0)[0][:, 20:], k[0][:, keep[0]])
    assert torch.equal(thin.dequantize(1)[1][:, 20:], v[1][:, [3, 9]])
    assert thin.exact_from == [320, 29]
    for errors in ([[300], []], [[2, 2], []], [[], [10]], [[3, 1], []]):
        with pytest.raises(ValueError, match=r"keep\[[01]\] must hold ascending indices"):
            thin.append(k, v, [300, 10], keep=errors)
    assert thin.lengths == [320, 30]


def test_bad_operations_change_nothing() -> None:
    kv = filled(300, batch=2, lengths=[300, 200])
    before = kv.fork()
    token = IndexList(torch.zeros(2, 1, 1, dtype=torch.int32), torch.ones(2, 1), "token")
    uneven = lists([0, 1], [0, 1], heads=2)
    uneven.indices[1, 1, 1] = -1
    uneven.counts[1, 1] = 1
    bad = [
        (kv.drop_pages, ([[3], []],), ValueError, r"entries\[0\] must hold .* 0 .. 2.*got 3"),
        (kv.drop_pages, ([[0], [2]],), ValueError, r"entries\[1\]"),
        (kv.drop_pages, ([[1, 1], []],), ValueError, "each once, got 1"),
        (kv.drop_pages, ([[-1], []],), ValueError, r"entries\[0\]"),
        (kv.drop_pages, ([[0]],), ValueError, "entries must be a sequence of 2"),
        (kv.drop_pages, (3,), ValueError, "entries must be .*got int"),
        (kv.drop_pages, ([[0.5], []],), TypeError, r"entries\[0\]"),
        (kv.evict, ([[0]],), TypeError, "ids must be a lath.IndexList, got list"),
        (kv.evict, (token,), ValueError, "granularity 'page', got 'token'"),
        (kv.evict, (lists([0]),), ValueError, "ids must have lists for 2"),
        (kv.evict, (uneven,), ValueError, "pages are shared by all KV heads"),
        (kv.evict, (lists([0, 1, 3], [0]),), ValueError, r"ids\[0\]"),
    ]
    for call, arguments, error, names in bad:
        with pytest.raises(error, match=names):
            call(*arguments)
    assert_same(kv, before)
    assert kv.pool.pages_in_use == 5
