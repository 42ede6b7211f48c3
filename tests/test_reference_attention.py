"""The definition of pages and attention against paths that share nothing with it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cases_attention import (
    CATALOGUE,
    AttentionCase,
    as_cache,
    as_options,
    dense_queries,
    make_attention,
)
from lath.formats.pages import PAGE_CODECS, PageCodec, PageFormat
from lath.reference import attention, floats, pages

Array = NDArray[np.float64]


def test_e4m3_is_torchs() -> None:
    numbers = torch.cat([torch.logspace(-4, 2.6, 4000), torch.linspace(-448, 448, 3001)])
    narrow = numbers.to(torch.float8_e4m3fn)
    assert np.array_equal(floats.encode_e4m3(numbers.numpy()), narrow.view(torch.uint8).numpy())
    assert np.array_equal(floats.round_e4m3(numbers.numpy()), narrow.double().numpy())


def test_bfloat16_is_torchs() -> None:
    numbers = torch.randn(5000) * torch.logspace(-30, 30, 5000)
    rounded = numbers.bfloat16()
    assert np.array_equal(floats.round_bfloat16(numbers.numpy()), rounded.float().numpy())
    bits = floats.bfloat16_bits(numbers.numpy())
    assert np.array_equal(bits, rounded.view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(floats.from_bfloat16_bits(bits), rounded.float().numpy())


# Largest error over the amax of a code's group: half a step, and the division's own rounding.
LARGEST_ERROR = {
    "float": 0.0, "int8": 0.5 / 127, "int8-planes": 0.5 / 127, "int4": 1 / 16, "int2": 1 / 4,
    "e4m3": 16 / 448,
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), list(itertools.product(PAGE_CODECS, PAGE_CODECS)))
@pytest.mark.parametrize("tokens", [1, 17, 64])
def test_a_page_holds_what_was_written(key: str, value: str, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    fmt = PageFormat(PageCodec(key), PageCodec(value), 80, 48, 4)
    keys = (rng.standard_normal((tokens, 80)) + 3 * rng.standard_normal(80)).astype(np.float32)
    values = rng.standard_normal((tokens, 48)).astype(np.float32)
    record, index = pages.write_page(keys, values, fmt)
    assert (record.size, index.size) == (fmt.record_bytes, fmt.index_bytes)
    page = pages.read_page(record, index, fmt)
    centred = np.abs(keys - pages.key_mean(keys))
    per_token = PageCodec(key).scale_per_token
    amax = centred.max(axis=1, keepdims=True) if per_token else centred.max()
    error = np.abs(page.keys[:tokens] - keys)
    assert (error <= amax * LARGEST_ERROR[key] * (1 + 2e-6) + 1e-6).all()
    channel = np.abs(values).max(axis=0)
    error = np.abs(page.values[:tokens] - values)
    assert (error <= channel * LARGEST_ERROR[value] * (1 + 2e-6) + 1e-7).all()


def test_the_layout_is_the_one_drawn() -> None:
    """Byte (token, channel) at the offsets of page-notes' record, by explicit loops."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (64, 48)).astype(np.uint8)
    keys, values = pages.order(codes, False), pages.order(codes, True)
    for token, channel in itertools.product(range(64), range(48)):
        block = token // 16 * 16 * 48
        at = block + channel // 16 * 256 + token % 16 * 16 + channel % 16
        assert keys[at] == codes[token, channel]
        assert values[block + channel * 16 + token % 16] == codes[token, channel]
    assert np.array_equal(pages.unorder(keys, False), codes)
    assert np.array_equal(pages.unorder(values, True), codes)
    narrow = codes & 15
    packed = pages.split_bytes(narrow, 4)
    assert (packed[:, 0] == narrow[:, 0] | narrow[:, 24] << 4).all()
    assert np.array_equal(pages.join_bytes(packed, 4), narrow)


def test_planes_are_the_int8_code_and_its_upper_half() -> None:
    rng = np.random.default_rng(1)
    keys, values = rng.standard_normal((2, 64, 64)).astype(np.float32)
    plain = PageFormat(PageCodec("int8"), PageCodec("int8"), 64, 64)
    planes = PageFormat(PageCodec("int8-planes"), PageCodec("int8-planes"), 64, 64)
    whole = pages.read_page(*pages.write_page(keys, values, plain), plain)
    written = pages.write_page(keys, values, planes)
    full, draft = (pages.read_page(*written, planes, draft=draft) for draft in (False, True))
    assert np.array_equal(full.key_codes, whole.key_codes)
    assert np.array_equal(draft.key_codes, np.floor(whole.key_codes / 16) * 16 + 8)
    assert np.array_equal(draft.value_codes, np.floor(whole.value_codes / 16) * 16 + 8)
    codes = 64 * (64 + 64)
    assert planes.draft_bytes == planes.record_bytes - codes // 2


@pytest.mark.parametrize("key", PAGE_CODECS)
def test_the_index_bounds_every_score(key: str) -> None:
    """q·mean + unit (relu(q)·max - relu(-q)·min) >= q·k for every decoded key."""
    rng = np.random.default_rng(2)
    fmt = PageFormat(PageCodec(key), PageCodec("int8"), 64, 64, 4)
    keys = (rng.standard_normal((50, 64)) * np.exp(rng.standard_normal(64))).astype(np.float32)
    record, index = pages.write_page(keys, keys, fmt)
    page = pages.read_page(record, index, fmt)
    fields = {n: index[f.offset : f.end] for n, f in fmt.index_fields.items()}
    mean = floats.from_bfloat16_bits(fields["mean"].view(np.uint16)).astype(np.float64)
    sides = record[fmt.fields["key_scales"].offset :][:8].view(np.float32).astype(np.float64)
    largest, smallest = (fields[name].view(np.int8) for name in ("max", "min"))
    q = rng.standard_normal((20, 64))
    bound = q @ mean + sides[1] * (np.maximum(q, 0) @ largest - np.maximum(-q, 0) @ smallest)
    scores = (q @ page.keys[:50].T).max(axis=1)
    assert (bound >= scores - 1e-9 * np.abs(scores)).all()
    # For one channel alone it is the largest score itself, or less than a step above it.
    excess = mean + sides[1] * largest - page.keys[:50].max(axis=0)
    assert (excess <= sides[1] * (1e-5 if key.startswith("int8") else 1)).all()
    assert (excess >= -1e-5 * sides[1]).all()
    deviation = fields["deviation"].astype(np.float64) * sides[1] / 2
    expected = (keys - pages.key_mean(keys)).astype(np.float64).std(axis=0)
    below = fields["deviation"] < 255
    assert (np.abs(deviation - expected)[below] <= sides[1] / 4 * 1.001).all()
    assert np.array_equal(fields["numbers"].view(np.float32), [np.float32(sides[1]), 50, 0, 0])
    means = floats.from_bfloat16_bits(fields["value_mean"].view(np.uint16)).astype(np.float64)
    assert (np.abs(means - page.values[:50].mean(axis=0)) <= np.abs(means) * 2.0**-8).all()


@pytest.mark.parametrize("codec", ["int8", "int4", "int2", "e4m3", "int8-planes"])
def test_zeros_and_broken_groups(codec: str) -> None:
    """A group of zeros decodes to zero; NaN and infinity stay in their page or channel."""
    fmt = PageFormat(PageCodec(codec), PageCodec(codec), 64, 64, 4)
    keys, values = np.full((64, 64), 2.5, np.float32), np.zeros((64, 64), np.float32)
    page = pages.read_page(*pages.write_page(keys, values, fmt), fmt)
    assert np.array_equal(page.keys, keys.astype(np.float64))
    assert not page.values.any()
    values = np.ones_like(values)
    values[3, 5] = np.inf
    page = pages.read_page(*pages.write_page(keys, values, fmt), fmt)
    assert np.isnan(page.values[:, 5]).all()
    assert np.isfinite(np.delete(page.values, 5, axis=1)).all()


def dense(case: AttentionCase) -> tuple[Array, Array]:
    """Attention over decoded keys and values by loops over rows: no tile, no base, no code of P."""
    queries, view, options = make_attention(case)
    q, cache, given = dense_queries(queries), as_cache(view, queries.q.dtype), as_options(options)
    sequences, heads, rows, _ = q.shape
    o = np.zeros((sequences, heads, rows, case.format.value_dim))
    lse = np.full((sequences, heads, rows), -np.inf)
    for s, head in itertools.product(range(sequences), range(heads)):
        tiles = cache.tiles(s, head * cache.heads // heads)
        length, own_rows = int(cache.lengths[s]), int(queries.lengths[s])
        for i in range(own_rows):
            scores, values = [], []
            for tile in tiles:
                row = q[s, head, i].astype(np.float64)
                rounded = attention.round_query(q[s, head, i], given.query)
                for t in range(len(tile.key_codes)):
                    if tile.readable is not None and not tile.readable[t]:
                        continue
                    key = tile.key_codes[t] * tile.key_scales[t]
                    product = (row if tile.key_map == "float" else rounded) @ key + row @ tile.mean
                    scores.append(
                        score(product, s, head, i, tile.start + t, own_rows, length, given)
                    )
                    values.append(tile.value_codes[t] * tile.value_scales)
            extra = [] if given.sink is None else [float(given.sink[head])]
            total = [x for x in scores + extra if x > -math.inf]
            if not total:
                continue
            top = max(total)
            denominator = sum(math.exp(x - top) for x in total)
            lse[s, head, i] = top + math.log(denominator)
            for x, value in zip(scores, values, strict=True):
                if x > -math.inf:
                    o[s, head, i] += math.exp(x - top) / denominator * value
    return o, lse


def score(
    product: float, s: int, head: int, i: int, key: int, rows: int, length: int,
    options: attention.Options,
) -> float:  # fmt: skip
    """One score in natural units, -inf where the key may not be read."""
    x, at = options.scale * product, i + length - rows
    if options.softcap is not None:
        x = options.softcap * math.tanh(x / options.softcap)
    if options.bias is not None:
        x += float(options.bias[0, head, i, key])
    if options.alibi is not None:
        x -= float(options.alibi[head]) * (at - key)
    readable = True
    if options.mask is not None:
        readable &= bool(options.mask[s, 0, i, key])
    if options.causal and options.tree is None:
        readable &= key <= at
    if options.window is not None:
        readable &= at - key < options.window
        readable &= options.causal or key - at < options.window
    if options.tree is not None and key >= length - rows:
        node = key - (length - rows)
        readable &= bool(options.tree[s, i, node // 32] >> (node % 32) & 1)
    return x if readable else -math.inf


@pytest.mark.parametrize("case", [c for c in CATALOGUE if c.rows < 30], ids=str)
def test_definition_is_softmax_over_decoded_keys(case: AttentionCase) -> None:
    """Equal to a plain softmax; rounded weights differ by at most half a level each."""
    queries, view, options = make_attention(case)
    cache, given = as_cache(view, queries.q.dtype), as_options(options)
    o, lse = attention.attend(dense_queries(queries), queries.lengths.numpy(), cache, given)
    expected_o, expected_lse = dense(case)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-12, atol=1e-12)
    exact = case.precision == "float" or case.format.value.map == "float"
    largest = max(
        np.abs(tile.value_codes * tile.value_scales).max(initial=0)
        for s in range(view.num_sequences)
        for head in range(cache.heads)
        for tile in cache.tiles(s, head)
    )
    levels = {"int8": 127.0, "int16": 32512.0, "e4m3": 16.0}.get(case.precision, 1.0)
    # Σ over tiles of 64 weights, each off by half a level of the tile's largest, which is <= 1.
    tolerance = 1e-12 if exact else 0.5 / levels * 64 * largest
    np.testing.assert_allclose(o, expected_o, rtol=1e-11, atol=tolerance)
    assert exact or np.abs(o - expected_o).mean() < 0.01


def test_merge_is_the_union_and_takes_empty_parts() -> None:
    rng = np.random.default_rng(3)
    s, v = rng.standard_normal((5, 40)) * 3, rng.standard_normal((40, 6))

    def part(keys: slice) -> tuple[Array, Array]:
        weights = np.exp(s[:, keys])
        total = weights.sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num(weights @ v[keys] / total[:, None]), np.log(total)

    whole = part(slice(None))
    pieces = [part(slice(0, 7)), part(slice(7, 7)), part(slice(7, 30)), part(slice(30, 40))]
    merged = attention.merge(pieces)
    nested = attention.merge([attention.merge(pieces[:2]), attention.merge(pieces[2:])])
    for got in (merged, nested):
        np.testing.assert_allclose(got[0], whole[0], rtol=1e-13)
        np.testing.assert_allclose(got[1], whole[1], rtol=1e-13)
    empty = attention.merge([pieces[1], pieces[1]])
    assert not empty[0].any()
    assert np.isneginf(empty[1]).all()


def test_nan_stays_where_it_was_read() -> None:
    """A NaN key breaks the rows that read its page in its head, and no others."""
    case = AttentionCase("int8/int8", "2/2", "32/32", 80, "144", "bf16", "float", "causal")
    queries, view, options = make_attention(case)
    number = int(view.table[0, 1])  # the page of positions 64 .. 127
    field = view.format.fields["key_scales"]
    nan = torch.frombuffer(bytearray(np.float32(np.nan).tobytes()), dtype=torch.uint8)
    view.records[number, 1, field.offset : field.offset + 4] = nan
    cache, given = as_cache(view, queries.q.dtype), as_options(options)
    o, _ = attention.attend(dense_queries(queries), queries.lengths.numpy(), cache, given)
    assert np.isfinite(o[0, 0]).all()
    assert np.isnan(o[0, 1]).all()  # rows stand at 64 .. 143: all of them read that page
    first = AttentionCase("int8/int8", "2/2", "32/32", 144, "144", "bf16", "float", "causal")
    queries, view, options = make_attention(first)
    view.records[int(view.table[0, 1]), 1, field.offset : field.offset + 4] = nan
    cache, given = as_cache(view, queries.q.dtype), as_options(options)
    o, _ = attention.attend(dense_queries(queries), queries.lengths.numpy(), cache, given)
    assert np.isfinite(o[0, 1, :64]).all()
    assert np.isnan(o[0, 1, 64:]).all()
