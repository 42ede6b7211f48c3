"""`lath.decode_attention`: options, codecs, trees, ragged batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lath
from tools.decoding import DIM, GROUP, HEADS, VALUE_DIM, assert_close, filled, held, numbers, query
from tools.dense_attention import backends, dense_attention, rounding_bound

BACKENDS = backends()

OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 40},
    "two-sided window": {"window": 40, "causal": False},
    "mask": {"mask": numbers(1, 1, 7, 150) > 0},
    "mask of keys": {"mask": numbers(150) > 0},
    "mask of heads": {"mask": numbers(HEADS * GROUP, 1, 150) > 0, "causal": False},
    "bias": {"bias": numbers(HEADS * GROUP, 7, 150) * 3},
    "bias of rows": {"bias": numbers(1, 1, 7, 1), "mask": numbers(7, 150) > 0},
    "alibi": {"alibi": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    "scale": {"scale": 0.7},
    "softcap": {"softcap": 1.5, "scale": 1.0},
    "sink": {"sink": numbers(HEADS * GROUP) + 2},
    "all": {"window": 100, "softcap": 4.0, "sink": numbers(HEADS * GROUP), "bias": numbers(7, 150),
            "alibi": torch.tensor([0.1, 0.02, 0.0, 0.3]), "mask": numbers(7, 150) > -1},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_options_mean_what_they_say(name: str, backend: str) -> None:
    """Float pages: fp32 arithmetic is all that may differ from float64 attention."""
    kv, q = filled(150), query(7)
    options = OPTIONS[name]
    got = lath.decode_attention(q, kv, return_lse=True, backend=backend, **options)
    expected = dense_attention(q, *held(kv), **{"causal": True, **options})
    assert_close(got, expected)
    # Negative control: the option is not idle.
    if name != "causal":
        plain = dense_attention(q, *held(kv), causal=True)
        assert (got[0] - plain[0]).abs().max() > 1e-3


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 257])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_around_a_page(length: int, backend: str) -> None:
    for rows in (1, 2):
        for keep_first in (True, False):
            kv, q = filled(length, keep_first=keep_first), query(rows)
            got = lath.decode_attention(q, kv, return_lse=True, backend=backend)
            assert_close(got, dense_attention(q, *held(kv), causal=True))


CODECS = [
    ("int8", "int8", "int8"), ("int8", "int8", "int16"), ("int8", "int8", "float"),
    ("int8", "float", "float"), ("int8-planes", "int8-planes", "int8"), ("int4", "int4", "int8"),
    ("int4", "int2", "float"), ("int2", "int8", "int8"), ("int8", "int4", "int8"),
    ("float", "int8", "int8"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "precision"), CODECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_codecs_are_within_their_rounding(
    key: str, value: str, precision: str, dtype: torch.dtype, backend: str
) -> None:
    """Against float64 attention over what the cache holds: q's and P's rounding are bounded."""
    kv, q = filled(300, key, value, dtype=dtype), query(3, dtype=dtype)
    o, lse = lath.decode_attention(q, kv, precision=precision, return_lse=True, backend=backend)
    k, v = held(kv)
    expected, expected_lse = dense_attention(q, k, v, causal=True)
    levels = {"int8": 127.0, "int16": 32512.0}.get(precision)
    bound = rounding_bound(q, k, v, levels=levels, dtype=dtype, causal=True)
    assert ((o.double() - expected).abs() <= bound).all()
    delta = DIM**-0.5 * q.double().abs().amax() / 254 * k.double().abs().sum(dim=3).amax()
    assert ((lse.double() - expected_lse).abs() <= delta + 1e-4).all()
    relative = (o.double() - expected).abs().sum() / expected.abs().sum()
    assert relative < 0.02  # the bound is the worst case; the mean error is this
    assert o.dtype == dtype
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_e4m3_and_fireq(backend: str) -> None:
    """E4M3 has steps of 1/8: stated bounds on relative L1 against what the cache holds."""
    for key, value, chosen, largest in (
        ("e4m3", "e4m3", "auto", 0.06), ("int4", "int4", "e4m3", 0.06),
        ("int2", "int8", "e4m3", 0.06),
    ):  # fmt: skip
        kv, q = filled(300, key, value, dtype=torch.bfloat16), query(1, dtype=torch.bfloat16)
        o = lath.decode_attention(q, kv, query=chosen, backend=backend).double()
        expected, _ = dense_attention(q, *held(kv), causal=True)
        assert (o - expected).abs().sum() / expected.abs().sum() < largest
        assert torch.equal(o, lath.decode_attention(q, kv, query="e4m3", backend=backend).double())


def test_channel_scales_go_with_the_query() -> None:
    scales = torch.exp2(
        torch.randint(-3, 4, (HEADS, DIM), generator=torch.Generator().manual_seed(0))
    )
    kv, q = filled(200, key_channel_scales=scales), query(2)
    plain = filled(200)
    got = lath.decode_attention(q, kv, return_lse=True)
    assert_close(got, lath.decode_attention(q, plain, return_lse=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_is_a_loop(backend: str) -> None:
    lengths, rows = [200, 65, 0, 10], [5, 1, 3, 0]
    kv, q = filled(200, "int8", batch=4, lengths=lengths), query(5, batch=4)
    o, lse = lath.decode_attention(q, kv, query_lengths=rows, return_lse=True, backend=backend)
    tensor = lath.decode_attention(q, kv, query_lengths=torch.tensor(rows), backend=backend)
    assert torch.equal(o, tensor)
    for s, count in enumerate(rows):
        one = kv.fork()
        one.reorder([s])
        single = lath.decode_attention(
            q[s : s + 1, :, :count], one, return_lse=True, backend=backend
        )
        assert_close((o[s : s + 1, :, :count], lse[s : s + 1, :, :count]), single, atol=2e-6)
        assert not o[s, :, count:].any()
        assert torch.isneginf(lse[s, :, count:]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_single_queries_at_their_length(backend: str) -> None:
    """Prefill and decode over the same pages agree, and so does a cropped cache."""
    kv, q = filled(150, "int8"), query(40)
    o, lse = lath.decode_attention(q, kv, return_lse=True, backend=backend)
    for row in (0, 17, 18, 39):
        past = kv.fork()
        past.crop(150 - 40 + row + 1)
        single = lath.decode_attention(
            q[:, :, row : row + 1], past, return_lse=True, backend=backend
        )
        assert_close((o[:, :, row : row + 1], lse[:, :, row : row + 1]), single, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_is_decode_over_the_same_pages(backend: str) -> None:
    """int8 attention keeps the first 64 keys and the last page as a cache does."""
    k, v = numbers(2, HEADS, 210, DIM, seed=1), numbers(2, HEADS, 210, VALUE_DIM, seed=2)
    kv = lath.PagedKV(HEADS, DIM, 2, dtype=k.dtype, value_dim=VALUE_DIM, backend=backend)
    kv.append(k, v)
    q = query(70, batch=2)
    for precision in ("int8", "int16"):
        a = lath.attention(
            q, k, v, causal=True, precision=precision, return_lse=True, backend=backend
        )
        b = lath.decode_attention(q, kv, precision=precision, return_lse=True, backend=backend)
        assert_close(a, b, atol=2e-6)


TREE = torch.tensor(
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
).bool()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [100, 66, 5])
def test_a_tree_row_reads_its_path(backend: str, length: int) -> None:
    kv, q = filled(length), query(5)
    o, lse = lath.decode_attention(q, kv, tree_mask=TREE, return_lse=True, backend=backend)
    assert_close((o, lse), dense_attention(q, *held(kv), tree_mask=TREE))
    for row in range(5):
        path = kv.fork()
        nodes = torch.nonzero(TREE[row])[:, 0].tolist()
        path.compact([[*range(length - 5), *(length - 5 + node for node in nodes)]])
        single = lath.decode_attention(
            q[:, :, row : row + 1], path, return_lse=True, backend=backend
        )
        assert_close((o[:, :, row : row + 1], lse[:, :, row : row + 1]), single)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forms_of_a_tree_mask(backend: str) -> None:
    kv, q = filled(130, batch=2), query(5, batch=2)
    bits = (TREE.long() * 2 ** torch.arange(5)).sum(dim=1)
    expected = lath.decode_attention(q, kv, tree_mask=TREE, backend=backend)
    for form in (TREE.expand(2, 5, 5), bits, bits.expand(2, 5)):
        assert torch.equal(lath.decode_attention(q, kv, tree_mask=form, backend=backend), expected)
    chain = torch.ones(5, 5).tril().bool()
    plain = lath.decode_attention(q, kv, backend=backend)
    assert torch.equal(lath.decode_attention(q, kv, tree_mask=chain, backend=backend), plain)
    both = torch.stack([TREE, chain])
    mixed = lath.decode_attention(q, kv, tree_mask=both, backend=backend)
    torch.testing.assert_close(mixed, torch.stack([expected[0], plain[1]]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rows", [32, 33, 64, 70])
def test_wide_trees(rows: int) -> None:
    """Chains of more than one word, with the sign bits of int32 and int64 in use."""
    kv, q = filled(rows + 3), query(rows)
    chain = torch.ones(rows, rows).tril().bool()
    plain = lath.decode_attention(q, kv)
    assert torch.equal(lath.decode_attention(q, kv, tree_mask=chain), plain)
    if rows <= 64:
        powers = [1 << j for j in range(rows)]
        masks = [sum(powers[: i + 1]) for i in range(rows)]
        bits = torch.tensor([m - (1 << 64) if m >= 1 << 63 else m for m in masks])
        assert torch.equal(lath.decode_attention(q, kv, tree_mask=bits), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_splits_and_schemes_change_nothing(backend: str) -> None:
    kv, q = filled(700, "int8", batch=2, lengths=[700, 130]), query(2, batch=2)
    options = {"return_lse": True, "backend": backend}
    once = lath.decode_attention(q, kv, splits=1, **options)
    for splits in (2, 3, 7, 40):
        assert_close(lath.decode_attention(q, kv, splits=splits, **options), once, atol=5e-6)
    if backend == "cpu":
        with pytest.raises(NotImplementedError, match="unified"):
            lath.decode_attention(q, kv, scheme="unified", **options)
    else:
        assert_close(lath.decode_attention(q, kv, scheme="unified", **options), once, atol=5e-5)


def test_draft_reads_the_upper_planes() -> None:
    kv, q = filled(300, "int8-planes"), query(1)
    full = lath.decode_attention(q, kv)
    draft = lath.decode_attention(q, kv, draft=True)
    with kv.draft():
        assert torch.equal(lath.decode_attention(q, kv), draft)
    assert torch.equal(lath.decode_attention(q, kv), full)
    exact, _ = dense_attention(q, *held(kv), causal=True)
    errors = [((o - exact).abs().sum() / exact.abs().sum()).item() for o in (full, draft)]
    assert errors[0] < 0.02 < errors[1] < 0.3
