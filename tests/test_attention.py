"""`lath.attention` and its drop-in for torch's scaled_dot_product_attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import lath
from lath.verbs.attention import ATTENTION_PRECISIONS
from tools.decoding import assert_close, numbers, short
from tools.dense_attention import backends, dense_attention

BACKENDS = backends()
SCALE = 1 / 127**2


def lattice(*shape: int, seed: int, pages: bool = False) -> Tensor:
    """Whole numbers up to ±127 that rounding to int8 leaves alone, [B, H, L, D] with L even.

    Every row holds 127. pages: each run of 64 tokens is a half and its negation, so that the mean
    that is removed from a page is zero and its scale is one.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, shape, generator=generator).float()
    x[..., 0] = 127
    if pages:
        for start in range(0, shape[2], 64):
            end = min(start + 64, shape[2])
            half = (end - start) // 2
            x[:, :, start + half : end] = -x[:, :, start : start + half]
    return x


def inputs(rows: int, keys: int, batch: int = 1, dim: int = 32, value_dim: int = 48) -> Any:
    """q, k, v with 4 and 2 heads whose scores int8 computes exactly (with scale=SCALE)."""
    q = lattice(batch, 4, rows, dim, seed=1)
    k = lattice(batch, 2, keys, dim, seed=2, pages=True)
    return q, k, numbers(batch, 2, keys, value_dim, seed=3)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": 30, "causal": True},
    "two-sided window": {"window": 30},
    "mask": {"mask": numbers(2, 1, 70, 150) > 0},
    "mask of rows": {"mask": numbers(70, 150) > 1, "causal": True},
    "bias": {"bias": numbers(1, 4, 70, 150) * 3},
    "alibi": {"alibi": torch.tensor([0.5, 0.25, 0.1, 0.0]), "causal": True},
    "softcap": {"softcap": 1.0},
    "sink": {"sink": numbers(4) + 2},
    "all": {"window": 100, "softcap": 4.0, "sink": numbers(4), "bias": numbers(70, 150),
            "alibi": torch.tensor([0.1, 0.02, 0.0, 0.3]), "mask": numbers(70, 150) > -1,
            "causal": True},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_options_mean_what_they_say(name: str, backend: str) -> None:
    """Scores without rounding: fp32 arithmetic is all that may differ from float64 attention."""
    q, k, v = inputs(70, 150, batch=2)
    options = {"scale": SCALE, **OPTIONS[name]}
    got = lath.attention(q, k, v, return_lse=True, backend=backend, **options)
    assert_close(got, dense_attention(q, k, v, **options))
    if name != "plain":  # negative control: the option is not idle
        plain, _ = dense_attention(q, k, v, scale=SCALE)
        assert (got[0] - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("rows", "keys"), [(1, 2), (5, 64), (64, 64), (66, 66), (3, 130), (130, 4), (128, 128)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_and_right_alignment(rows: int, keys: int, backend: str) -> None:
    q, k, v = inputs(rows, keys)
    for causal in (False, True):
        options = {"scale": SCALE, "causal": causal}
        got = lath.attention(q, k, v, return_lse=True, backend=backend, **options)
        assert_close(got, dense_attention(q, k, v, **options))


@pytest.mark.parametrize("precision", ["int8", "int16", "e4m3"])
@pytest.mark.parametrize("keys", [1, 63, 64, 65, 127])
@pytest.mark.parametrize("backend", BACKENDS)
def test_short_sequences_are_not_rounded(precision: str, keys: int, backend: str) -> None:
    """Up to 127 keys there is no full page after the first 64: nothing is quantised."""
    q, k, v = numbers(2, 4, 5, 32), numbers(2, 2, keys, 32, seed=1), numbers(2, 2, keys, 48, seed=2)
    options = {"precision": precision, "return_lse": True, "backend": backend}
    assert_close(lath.attention(q, k, v, **options), dense_attention(q, k, v))
    lengths = [keys // 2, keys]
    o, lse = lath.attention(q, k, v, lengths=lengths, **options)
    for s, n in enumerate(lengths):
        row = slice(s, s + 1)
        expected = dense_attention(q[row], k[row, :, :n], v[row, :, :n])
        assert_close((o[row], lse[row]), expected)


@pytest.mark.parametrize("dims", [(1, 1), (7, 20), (80, 80), (96, 64), (256, 256)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_dims(dims: tuple[int, int], backend: str) -> None:
    q, k, v = inputs(6, 70, dim=dims[0], value_dim=dims[1])
    got = lath.attention(q, k, v, scale=SCALE, return_lse=True, backend=backend)
    assert_close(got, dense_attention(q, k, v, scale=SCALE))


def fidelity_bound(q: Tensor, k: Tensor, v: Tensor, precision: str, causal: bool) -> Tensor:
    """Largest |o - float64 attention| that rounding q, k, v and weights may cause.

    A score moves by δ <= scale (|q|₁ e_k + e_q (|k|₁ + D e_k)) with e half a step: amax/254 of the
    row, and of the page's centred keys (at most twice the largest key). A weight moves by the
    factor exp(2δ), a value by amax/254 of its channel (E4M3: its 16th), a weight's code by half a
    level of its tile's largest, which is at most 1.
    """
    group = q.shape[1] // k.shape[1]
    x, keys, values = q.double(), *(
        t.double().repeat_interleave(group, dim=1) for t in (k, v)
    )  # fmt: skip
    e_q = x.abs().amax(dim=3, keepdim=True) / 254
    e_k = 2 * keys.abs().amax(dim=(2, 3), keepdim=True) / 254
    keys_l1 = keys.abs().sum(dim=3).amax(dim=2)[..., None, None]
    delta = (x.abs().sum(dim=3, keepdim=True) * e_k + e_q * (keys_l1 + x.shape[3] * e_k)) * x.shape[
        3
    ] ** -0.5
    moved = torch.expm1(2 * delta)
    sizes, _ = dense_attention(q, k, v.abs(), causal=causal)
    bound = (moved + 2.0**-8) * sizes
    if precision != "float":
        largest = values.abs().amax(dim=2, keepdim=True)
        step = largest / 16 if precision == "e4m3" else largest / 254
        level = {"int8": 0.5 / 127, "int16": 0.5 / 32512, "e4m3": 1 / 16}[precision]
        bound = bound + (1 + moved) * (step + level * sizes * (64 if precision == "int8" else 1))
    return bound + 2.0**-8 * sizes


@pytest.mark.parametrize("precision", ATTENTION_PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_precisions_against_float64(precision: str, dtype: torch.dtype, backend: str) -> None:
    q, k, v = (
        numbers(2, heads, length, dim, seed=heads, dtype=dtype)
        for heads, length, dim in ((4, 60, 32), (2, 200, 32), (2, 200, 48))
    )
    k = k + 1
    o, lse = lath.attention(
        q, k, v, causal=True, precision=precision, return_lse=True, backend=backend
    )
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    expected, expected_lse = dense_attention(q, k, v, causal=True)
    error = (o.double() - expected).abs()
    assert (error <= fidelity_bound(q, k, v, precision, True)).all()
    # The bound is the worst case. Stated mean errors on Gaussian data:
    largest = {"float": 0.015, "int8": 0.02, "int16": 0.015, "e4m3": 0.04}[precision]
    assert error.sum() / expected.abs().sum() < largest
    assert (lse.double() - expected_lse).abs().max() < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_does_not_drown_the_rest(backend: str) -> None:
    """One key 6 nats above: what remains keeps its precision because the first page is exact."""
    q, k, v = (numbers(1, 2, n, 32, seed=n, dtype=torch.bfloat16) for n in (33, 512, 513))
    v = v[:, :, :512] * 1.0
    v[:, :, 0] *= 0.05
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, :, 0, 0] = 12.0
    expected, _ = dense_attention(q, k, v)
    for precision, largest in (("float", 0.02), ("int8", 0.02), ("int16", 0.02)):
        o = lath.attention(q, k, v, precision=precision, backend=backend).double()
        assert (o - expected).abs().sum() / expected.abs().sum() < largest


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_values_do_not_overflow(backend: str) -> None:
    """bfloat16 beyond float16's range, and sums of 64 of them."""
    q, k, v = (numbers(1, 2, 130, 32, seed=s, dtype=torch.bfloat16) for s in (1, 2, 3))
    v = v * 1e6
    for precision in ("float", "int8"):
        o = lath.attention(q, k, v, precision=precision, backend=backend)
        expected, _ = dense_attention(q, k, v)
        assert torch.isfinite(o).all()
        assert (o.double() - expected).abs().sum() / expected.abs().sum() < 0.03


@pytest.mark.parametrize("precision", ["float", "int8"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_are_a_loop_and_padding_is_not_read(
    precision: str, causal: bool, backend: str
) -> None:
    lengths = [150, 65, 0, 17]
    q, k, v = inputs(150, 150, batch=4)
    options = {
        "causal": causal, "precision": precision, "scale": SCALE, "return_lse": True,
        "backend": backend,
    }  # fmt: skip
    for s, n in enumerate(lengths):
        k[s, :, n:] = math.nan
        v[s, :, n:] = math.nan
    o, lse = lath.attention(q, k, v, lengths=lengths, **options)
    again = lath.attention(q, k, v, lengths=torch.tensor(lengths), **options)
    assert torch.equal(o, again[0])
    for s, n in enumerate(lengths):
        rows = n if causal else 150  # padded self-attention, or any queries
        row = slice(s, s + 1)
        single = lath.attention(q[row, :, :rows], k[row, :, :n], v[row, :, :n], **options)
        assert_close((o[row, :, :rows], lse[row, :, :rows]), single, atol=2e-6)
        assert not o[s, :, rows:].any()
        assert torch.isneginf(lse[s, :, rows:]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_lengths(backend: str) -> None:
    q, k, v = inputs(9, 150, batch=2)
    options = {"causal": True, "return_lse": True, "backend": backend}
    o, lse = lath.attention(q, k, v, lengths=[150, 70], query_lengths=[9, 4], **options)
    for s, (rows, n) in enumerate(((9, 150), (4, 70))):
        row = slice(s, s + 1)
        single = lath.attention(q[row, :, :rows], k[row, :, :n], v[row, :, :n], **options)
        assert_close((o[row, :, :rows], lse[row, :, :rows]), single, atol=2e-6)
    assert not o[1, :, 4:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_with_other_rows_and_masks(backend: str) -> None:
    """Fewer rows than keys are aligned with the end of each sequence; a mask keeps its columns."""
    lengths = [140, 70]
    q, k, v = inputs(9, 150, batch=2)
    mask, bias = numbers(2, 1, 9, 150) > 0, numbers(9, 150, seed=7)
    options = {"causal": True, "scale": SCALE, "return_lse": True, "backend": backend}
    plain = lath.attention(q, k, v, lengths=lengths, **options)
    masked = lath.attention(q, k, v, lengths=lengths, mask=mask, bias=bias, **options)
    for s, n in enumerate(lengths):
        row = slice(s, s + 1)
        part = q[row], k[row, :, :n], v[row, :, :n]
        assert_close([x[row] for x in plain], lath.attention(*part, **options), atol=2e-6)
        own = {"mask": mask[row, ..., :n], "bias": bias[:, :n]}
        assert_close([x[row] for x in masked], lath.attention(*part, **own, **options), atol=2e-6)


@pytest.mark.parametrize("precision", ["float", "int8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_a_loop(precision: str, backend: str) -> None:
    """Prepacking: several prompts in one row, and rows of queries against other keys."""
    ends, key_ends = [0, 40, 40, 134, 140], [0, 66, 70, 200, 250]
    q, k, v = inputs(142, 142)
    options = {
        "causal": True, "precision": precision, "scale": SCALE, "return_lse": True,
        "backend": backend,
    }  # fmt: skip
    o, lse = lath.attention(q, k, v, cu_seqlens=torch.tensor(ends, dtype=torch.int32), **options)
    pair = inputs(142, 250)
    crossed = lath.attention(*pair, cu_seqlens=(ends, key_ends), **options)
    for s in range(4):
        rows, keys = slice(ends[s], ends[s + 1]), slice(key_ends[s], key_ends[s + 1])
        single = lath.attention(q[:, :, rows], k[:, :, rows], v[:, :, rows], **options)
        assert_close((o[:, :, rows], lse[:, :, rows]), single, atol=2e-6)
        single = lath.attention(
            pair[0][:, :, rows], pair[1][:, :, keys], pair[2][:, :, keys], **options
        )
        assert_close((crossed[0][:, :, rows], crossed[1][:, :, rows]), single, atol=2e-6)
    assert not o[:, :, 140:].any()
    assert torch.isneginf(lse[:, :, 140:]).all()


@pytest.mark.parametrize("precision", ATTENTION_PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_read(precision: str, backend: str) -> None:
    options = {"precision": precision, "return_lse": True, "backend": backend}
    sink = torch.tensor([1.0, 2.0, 3.0, -1.0])
    q, k, v = inputs(3, 0)
    o, lse = lath.attention(q, k, v, **options)
    assert (o.shape, lse.shape) == ((1, 4, 3, 48), (1, 4, 3))
    assert not o.any()
    assert torch.isneginf(lse).all()
    assert torch.equal(
        lath.attention(q, k, v, sink=sink, **options)[1], sink[None, :, None].expand(1, 4, 3)
    )
    _, lse = lath.attention(q, k, v, sink=sink, cu_seqlens=([0, 2], [0, 0]), **options)
    assert torch.equal(lse[0, :, :2], sink[:, None].expand(4, 2))
    assert torch.isneginf(lse[0, :, 2]).all()
    q, k, v = inputs(0, 70)
    assert lath.attention(q, k, v, **options)[0].shape == (1, 4, 0, 48)
    q, k, v = inputs(3, 70, batch=0)
    assert lath.attention(q, k, v, **options)[0].shape == (0, 4, 3, 48)
    q, k, v = inputs(3, 2)  # row 0 stands before the first key
    o, lse = lath.attention(q, k, v, causal=True, **options)
    assert not o[:, :, 0].any()
    assert torch.isneginf(lse[:, :, 0]).all()
    assert torch.isfinite(lse[:, :, 1:]).all()
    dead = torch.ones(3, 2, dtype=torch.bool)
    dead[1] = False
    o, lse = lath.attention(q, k, v, mask=dead, **options)
    assert not o[:, :, 1].any()
    assert torch.isneginf(lse[:, :, 1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_where_it_was_read(backend: str) -> None:
    q, k, v = inputs(200, 200)
    k[0, 1, 130, 3] = math.nan  # in the third page of head 1, which rows from 128 on read
    o, lse = lath.attention(q, k, v, causal=True, scale=SCALE, return_lse=True, backend=backend)
    clean = inputs(200, 200)
    expected = lath.attention(*clean, causal=True, scale=SCALE, return_lse=True, backend=backend)
    assert torch.equal(o[:, :2], expected[0][:, :2])
    assert torch.equal(o[:, 2:, :128], expected[0][:, 2:, :128])
    assert torch.isnan(o[:, 2:, 128:]).all()
    assert torch.isnan(lse[:, 2:, 128:]).all()
    q = clean[0].clone()
    q[0, 0, 5, 0] = math.inf
    o = lath.attention(q, *clean[1:], causal=True, scale=SCALE, backend=backend)
    assert torch.isnan(o[0, 0, 5]).all()
    o[0, 0, 5] = expected[0][0, 0, 5]
    assert torch.equal(o, expected[0])


def test_inputs_are_not_changed_and_strides_do_not_matter() -> None:
    q, k, v = inputs(20, 140, batch=2)
    mask, bias = numbers(20, 140) > 0, numbers(20, 140)
    given = [q, k, v, mask, bias]
    before = [tensor.clone() for tensor in given]
    for precision in ATTENTION_PRECISIONS:
        expected = lath.attention(q, k, v, mask=mask, bias=bias, precision=precision)
        swapped = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
        model = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
        for other in (swapped, model):
            o = lath.attention(
                *other, mask=mask.T.contiguous().T, bias=bias.T.contiguous().T, precision=precision
            )
            assert torch.equal(o, expected)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


# torch's function of the same arguments


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "keys", "options"),
    [
        (20, 70, {}),
        (70, 70, {"is_causal": True}),
        (20, 70, {"is_causal": True}),
        (70, 20, {"is_causal": True}),
        (20, 70, {"attn_mask": numbers(20, 70) > 0}),
        (20, 70, {"attn_mask": numbers(2, 1, 20, 70) > 0}),
        (20, 70, {"attn_mask": numbers(1, 4, 20, 70)}),
        (20, 70, {"attn_mask": numbers(4, 1, 70)}),
    ],
    ids=short,
)
def test_drop_in_for_torch(rows: int, keys: int, options: dict[str, Any], backend: str) -> None:
    q, k, v = inputs(rows, keys, batch=2)
    if "is_causal" in options and rows < keys:  # only these keys are read: they make the page
        k = torch.cat([lattice(2, 2, rows, 32, seed=2, pages=True), k[:, :, rows:]], dim=2)
    options = {"scale": SCALE, "enable_gqa": True, **options}
    o = lath.scaled_dot_product_attention(q, k, v, backend=backend, **options)
    wide = {name: value for name, value in options.items() if name != "attn_mask"}
    if "attn_mask" in options:
        mask = options["attn_mask"]
        wide["attn_mask"] = mask if mask.dtype == torch.bool else mask.double()
    expected = functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), **wide)
    torch.testing.assert_close(o.double(), expected, rtol=2e-5, atol=2e-5)


def test_drop_in_without_a_head_axis() -> None:
    q, k, v = (x[0, :2] for x in inputs(20, 70))
    for mask in (None, numbers(20, 70), numbers(2, 20, 70)):
        o = lath.scaled_dot_product_attention(q, k, v, mask, scale=SCALE)
        wide = None if mask is None else mask.double()
        expected = functional.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), wide, scale=SCALE
        )
        torch.testing.assert_close(o.double(), expected, rtol=2e-5, atol=2e-5)


def test_drop_in_refuses() -> None:
    q, k, v = inputs(20, 70)
    call = lath.scaled_dot_product_attention
    for arguments, options, error, names in (
        ((q, k, v), {"enable_gqa": True, "dropout_p": 0.1}, NotImplementedError, "dropout_p"),
        ((q, k, v), {}, ValueError, "enable_gqa"),
        ((q, k[0], v), {"enable_gqa": True}, ValueError, "key must have"),
        ((q[0, 0], k[0, 0], v[0, 0]), {}, ValueError, "query must have"),
        ((q, k, v, numbers(20, 70) > 0), {"is_causal": True}, ValueError, "None"),
        ((q, k, v, numbers(21, 70) > 0), {"enable_gqa": True}, ValueError, "mask must broadcast"),
        ((q, k, v, numbers(20, 70).long()), {"enable_gqa": True}, TypeError, "attn_mask"),
    ):  # fmt: skip
        with pytest.raises(error, match=names):
            call(*arguments, **options)
