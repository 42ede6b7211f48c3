"""FreqKV and DeltaLLM on a `PagedKV`: against their definitions, at their limits, and measured."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lath
from lath.reference import store as definition
from lath.verbs.store_transforms import BLOCK, cosines, low_frequencies
from tools.caches import assert_same
from tools.decoding import DIM, HEADS, VALUE_DIM, filled, held, numbers

# Float pages hold float32; a rounded number differs from the definition's by this share.
ROUNDED = 2.0**-23


def filled_with(signal: Tensor, codec: str = "float", **options: Any) -> lath.PagedKV:
    """A cache whose keys and values are signal [n] times a factor of each head and channel."""
    kv = filled(0, codec, **options)
    k = signal[:, None] * (1 + numbers(HEADS, 1, DIM).abs())
    v = signal[:, None] * (1 + numbers(HEADS, 1, VALUE_DIM).abs())
    kv.append(k[None].float(), v[None].float())
    return kv


def middle(kv: lath.PagedKV, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [Hkv, n, ...] of the held tokens begin .. end - 1, float64."""
    k, v = kv.dequantize(0)
    return k[:, begin:end].double().numpy(), v[:, begin:end].double().numpy()


@pytest.mark.parametrize("size", [1, 2, 7, 64, 200])
def test_the_transform_is_the_definitions(size: int) -> None:
    matrix = definition.dct_matrix(size)
    assert np.abs(matrix @ matrix.T - np.eye(size)).max() < 1e-13
    ours = cosines(range(size), size, torch.device("cpu")).numpy()
    assert np.abs(ours - matrix).max() < 1e-12  # the definition's angles reach size * π
    x = numbers(size, 3, dtype=torch.float64)
    for kept in {1, size // 2 or 1, size}:
        got = low_frequencies(x, kept).numpy()
        assert np.abs(got - definition.low_frequencies(x.numpy(), kept)).max() < 1e-12
    assert np.abs(low_frequencies(x, size).numpy() - x.numpy()).max() < 1e-12


def test_blocks_of_coefficients_add_up() -> None:
    x = numbers(BLOCK * 2 + 60, 2, dtype=torch.float64)
    got = low_frequencies(x, BLOCK + 70).numpy()
    assert np.abs(got - definition.low_frequencies(x.numpy(), BLOCK + 70)).max() < 1e-12


@pytest.mark.parametrize("keep", [100, 0.4, 64, 1])
@pytest.mark.parametrize("codec", ["float", "int8"])
def test_frequencies_against_the_definition(keep: int | float, codec: str) -> None:
    """The middle is the pages behind the first 100 and before the last 90 tokens held."""
    kv = filled(420, codec)
    kv.drop_pages([[2]])
    k, v = middle(kv, 128, 256)
    around = [held(kv)[i][0] for i in (0, 1)]
    positions = kv.positions(0)
    kv.compact_frequencies(keep, first=100, last=90)
    wanted = keep if isinstance(keep, int) else math.ceil(keep * 128)
    assert kv.lengths == [420]
    assert kv.tokens == [420 - 64 - 128 + wanted]
    stand = definition.nominal_positions(positions[128:256], wanted)
    assert kv.positions(0) == [*positions[:128], *stand, *positions[256:]]
    now = kv.dequantize(0)
    for was, is_now, original in zip((k, v), now, around, strict=True):
        assert torch.equal(is_now[:, :128], original[:, :128])
        assert torch.equal(is_now[:, 128 + wanted :], original[:, 256:])
        for head in range(HEADS):
            exact = definition.low_frequencies(was[head], wanted)
            error = np.abs(is_now[head, 128 : 128 + wanted].numpy() - exact).max()
            # Half a step of int8: amax / 254 of a page or channel, with the mean's bfloat16.
            largest = np.abs(exact - exact.mean(axis=0)).max() + np.abs(exact).max() * (was is v)
            bound = 1.02 * largest / 254 + 2.0**-9 * np.abs(exact).max() / 127
            assert error <= (bound if codec == "int8" else ROUNDED * np.abs(exact).max())


def test_full_retention_changes_nothing() -> None:
    for codec in ("float", "int8", "int2"):
        kv = filled(420, codec, batch=2, lengths=[420, 100])
        before = kv.fork()
        for keep in (1.0, 256, 10_000):
            kv.compact_frequencies(keep)
        kv.compact_frequencies(0.5, first=420)  # no page lies between
        kv.compact_frequencies(1, first=192, last=192)
        assert_same(kv, before)
        assert kv.spans == before.spans
        kv.compact_frequencies(0.5)
        assert kv.tokens == [420 - 128, 100]


def test_smooth_signals_stay_and_noise_does_not() -> None:
    """A signal of frequencies below M is the same curve at M places, to rounding; of white noise
    the share 1 - M/N of the energy is gone."""
    tokens, wanted = 256, 64
    at = (torch.arange(tokens, dtype=torch.float64) + 0.5) / tokens
    fewer = (torch.arange(wanted, dtype=torch.float64) + 0.5) / wanted
    signals = {
        "constant": lambda t: torch.full_like(t, 3.0),
        "cosines": lambda t: 2 + torch.cos(math.pi * 3 * t) - 0.5 * torch.cos(math.pi * 40 * t),
    }
    for curve in signals.values():
        kv = filled_with(torch.cat([torch.zeros(64), curve(at), torch.zeros(64)]))
        factors = kv.dequantize(0)[0][:, 64].double() / curve(at)[0]
        kv.compact_frequencies(wanted)
        got = kv.dequantize(0)[0][:, 64 : 64 + wanted].double()
        expected = curve(fewer)[:, None] * factors[:, None]
        # Keys are rounded to float32 when stored, before and after.
        assert (got - expected).abs().max() <= 4 * ROUNDED * expected.abs().max()
    # Nearly smooth: a line is not band-limited, its tail falls as 1/k².
    line = at.numpy()[:, None]
    assert lost(line - line.mean(), wanted) < 1e-5
    noise = numbers(tokens, HEADS * DIM, dtype=torch.float64).numpy()
    share = lost(noise, wanted)
    # A mean of squares of tokens * channels normal numbers: within 5 of its standard deviations.
    spread = math.sqrt(2 / (tokens * HEADS * DIM))
    assert abs(share - (1 - wanted / tokens)) < 5 * spread
    kv = filled(384)
    kv.compact_frequencies(wanted)
    k, _ = middle(filled(384), 64, 320)
    kept = kv.dequantize(0)[0][:, 64 : 64 + wanted].double().numpy()
    # The cache's own noise lies around 0.5: that stays, a quarter of the rest does.
    centred = [x - x.mean(axis=1, keepdims=True) for x in (k, kept * math.sqrt(tokens / wanted))]
    left = (centred[1] ** 2).sum() / (centred[0] ** 2).sum()
    assert abs(left - wanted / tokens) < 5 * spread


def lost(x: np.ndarray, kept: int) -> float:
    """The share of the energy of x [N, C] that the lowest coefficients do not hold, float64."""
    low = definition.low_frequencies(x, kept)
    return 1 - float((low**2).sum() * len(x) / kept / (x**2).sum())


def test_frequencies_may_be_taken_again_and_again() -> None:
    """A cache of a fixed size."""
    kv = filled(320, "int8")
    for step in range(4):
        kv.compact_frequencies(128)
        assert kv.tokens == [256]
        assert kv.lengths == [320 + 64 * step]
        kv.append(numbers(1, HEADS, 64, DIM), numbers(1, HEADS, 64, VALUE_DIM))
    assert not kv.exact_positions
    kv.crop(200)
    assert max(kv.positions(0)) < 200


@pytest.mark.parametrize("codec", ["float", "int8", "int4"])
@pytest.mark.parametrize("scaled", [False, True])
def test_deltas_against_the_definition(codec: str, scaled: bool) -> None:
    scales = 2.0 ** torch.arange(HEADS * DIM).reshape(HEADS, DIM).remainder(5) if scaled else None
    kv = filled(420, codec, key_channel_scales=scales)
    kv.drop_pages([[1]])
    k, _ = middle(kv, 64, 192)  # pages at 64 and 192; 256 .. is within the window
    before = kv.fork()
    threshold = 0.8
    sparsity = kv.threshold_deltas(threshold, window=120)
    now_k, now_v = kv.dequantize(0)
    assert torch.equal(now_v, before.dequantize(0)[1])
    assert kv.spans[0].pages[2:] == before.spans[0].pages[2:]
    assert kv.positions(0) == before.positions(0)
    zeros = 0
    for head in range(HEADS):
        expected, zero = definition.threshold_deltas(k[head], threshold)
        zeros += int(zero.sum())
        assert np.abs(expected - k[head]).max() <= threshold * (1 + 1e-12)
        got = now_k[head, 64:192].double().numpy()
        if codec == "float" and not scaled:
            assert np.array_equal(got, expected)
        step = key_step(kv, head)
        assert (np.abs(got - expected) <= step + 1e-6).all()
        # |score error| <= threshold * Σ|q| and the rounding, for any q.
        q = numbers(9, DIM, seed=head).double().numpy()
        error = np.abs(q @ (got - k[head]).T)
        bound = np.abs(q).sum(axis=1) * threshold + np.abs(q) @ step.max(axis=0) + 1e-5
        assert (error <= bound[:, None]).all()
        assert error.max() > 0.1  # something did change
    assert sparsity == zeros / k.size
    assert 0.2 < sparsity < 0.8


def key_step(kv: lath.PagedKV, head: int) -> np.ndarray:
    """Half a step of the keys of the first two pages: [128, D], in units of the appended keys."""
    steps = []
    for page in kv.spans[0].pages[:2]:
        fields, record = kv.format.fields, kv.pool.records[page, head]
        if kv.format.key.map == "float":
            steps.append(torch.full((64, 1), 2.0**-22))
            continue
        name = "token_scales" if "token_scales" in fields else "key_scales"
        scale = record[fields[name].offset : fields[name].end].view(torch.float32)
        half = 8.0 if name == "token_scales" else 0.5
        steps.append(half * (scale if name == "token_scales" else scale[:1].expand(64))[:, None])
    unit = torch.ones(DIM) if kv.key_channel_scales is None else kv.key_channel_scales[head]
    step: np.ndarray = (torch.cat(steps) * unit * (1 + 2.0**-12)).double().numpy()
    return step


def test_no_threshold_changes_nothing() -> None:
    for codec in ("float", "int8", "int4", "int2", "e4m3"):
        kv = filled(420, codec)
        before = kv.fork()
        sparsity = kv.threshold_deltas(0, window=0)
        assert kv.spans == before.spans
        assert_same(kv, before)
        # Codes with one scale for a page repeat by themselves; other numbers hardly ever do.
        assert sparsity > 0.001 if codec in ("int8", "e4m3") else sparsity < 0.001
        assert kv.threshold_deltas(1.0, window=420 - 64 - 63) == 0.0  # no page is that old
        assert_same(kv, before)


def test_deltas_go_on_from_page_to_page() -> None:
    """A kept value holds in the next page too: of equal tokens only the first is kept."""
    flat = filled_with(torch.full((320,), 2.0))
    assert flat.threshold_deltas(0.1, window=0) == 1 - 1 / 256
    slope = filled_with(torch.arange(320) * 2.0**-6)
    sparsity = slope.threshold_deltas(2.0, window=0)
    keys = slope.dequantize(0)[0]
    drift = keys[:, 64:320] - filled_with(torch.arange(320) * 2.0**-6).dequantize(0)[0][:, 64:320]
    assert drift.abs().max() <= 2.0  # the reference is the last kept value, not the token before
    assert 0.95 < sparsity < 1


def test_a_cut_page_keeps_what_it_held_back() -> None:
    """Tokens behind a page's count are written along: index rows go on describing the record."""
    kv = filled(420, "int8")
    kv.crop(160)
    index = kv.format.index_fields["numbers"]
    before = kv.fork()
    assert kv.threshold_deltas(0.8, window=0) > 0.2
    assert [page != old for page, old in zip(kv.spans[0].pages, before.spans[0].pages, strict=True)]
    written = kv.pool.index[kv.spans[0].pages, :, index.offset : index.end].view(torch.float32)
    assert (written[..., 1] == 64).all()
    value = kv.format.index_fields["value_mean"]
    assert torch.equal(
        kv.pool.index[kv.spans[0].pages, :, value.offset : value.end],
        kv.pool.index[before.spans[0].pages, :, value.offset : value.end],
    )
    assert kv.positions(0) == list(range(160))


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("compact_frequencies", (0,), ValueError, "keep must be 1 or more coefficients, got 0"),
        ("compact_frequencies", (0.0,), ValueError, r"keep must be a share in \(0, 1\]"),
        ("compact_frequencies", (1.5,), ValueError, "keep must be a share .* got 1.5"),
        ("compact_frequencies", (True,), TypeError, "keep must be an int"),
        ("compact_frequencies", ("half",), TypeError, "keep must be an int"),
        ("compact_frequencies", (4, -1), ValueError, "first must be 0 or more, got -1"),
        ("compact_frequencies", (4, 0, 1.0), TypeError, "last must be an int"),
        ("threshold_deltas", (-0.5, 0), ValueError, "threshold must be 0 or more, got -0.5"),
        ("threshold_deltas", (math.nan, 0), ValueError, "threshold must be finite"),
        ("threshold_deltas", ("1", 0), TypeError, "threshold must be a number"),
        ("threshold_deltas", (0.5, -1), ValueError, "window must be 0 or more, got -1"),
    ],
)
def test_bad_transforms(name: str, arguments: Any, error: type, message: str) -> None:
    kv = filled(300)
    before = kv.fork()
    with pytest.raises(error, match=message):
        getattr(kv, name)(*arguments)
    assert_same(kv, before)
