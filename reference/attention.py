"""The definition of attention over pages in NumPy, float64 inside.

For query row i and head h, over the keys n that it may read,

    s[n] = softcap(scale * q·k[n]) + bias[n] - slope * (position(i) - n)
    o = Σ exp(s[n]) v[n] / (Σ exp(s[n]) + exp(sink))        lse = log(Σ exp(s[n]) + exp(sink))

A *tile* is a page or a float part of the cache. What a tile's codes change in this:

* quantised keys: q·k = q̂·code * scale + q·μ, where q̂ is q rounded per row (int8 or E4M3) and μ the
  mean that was removed from the page's keys (SageAttention, 2410.02367, with one mean per page);
* quantised values, precision "int8": the weights are rounded relative to the tile's own largest,
  P = rint(127 exp(s - max)), for every row; "int16": 127*256 levels; "e4m3": P = E4M3(256 exp(s -
  max)); "float": not rounded. The denominator is not rounded.

A row that reads nothing has o = 0 and lse = -inf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lath.formats.activations import SMALLEST_ABSMAX
from lath.formats.attention import Precision, QueryFormat
from lath.formats.pages import Map, PageFormat
from lath.reference import floats
from lath.reference.pages import Page, read_page

Array = NDArray[np.float64]
LEVELS = {"int8": 127.0, "int16": 32512.0, "e4m3": 256.0}


@dataclass(frozen=True)
class Options:
    """`lath.formats.attention.ScoreOptions` with arrays: see there."""

    scale: float
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    mask: NDArray[np.bool_] | None = None
    bias: NDArray[np.float32] | None = None
    alibi: NDArray[np.float32] | None = None
    sink: NDArray[np.float32] | None = None
    tree: NDArray[np.int32] | None = None
    query: QueryFormat = "int8"
    precision: Precision = "float"


@dataclass(frozen=True)
class Tile:
    """Keys [n, D] and values [n, E] at the positions start, start + 1, … of one KV head.

    key = key_codes * key_scales + mean; value = value_codes * value_scales. readable: bool [n],
    which tokens a selection admits; None for all.
    """

    start: int
    key_map: Map
    value_map: Map
    key_codes: Array
    key_scales: Array
    mean: Array
    value_codes: Array
    value_scales: Array
    readable: NDArray[np.bool_] | None = None

    @property
    def positions(self) -> slice:
        return slice(self.start, self.start + len(self.key_codes))


def float_tile(start: int, keys: NDArray[np.float32], values: NDArray[np.float32]) -> Tile:
    """Keys [n, D] and values [n, E] that are used as they are."""
    count, channels = keys.shape
    return Tile(
        start, "float", "float", keys.astype(np.float64), np.ones(count), np.zeros(channels),
        values.astype(np.float64), np.ones(values.shape[1]),
    )  # fmt: skip


def page_tile(
    start: int,
    count: int,
    page: Page,
    fmt: PageFormat,
    readable: NDArray[np.bool_] | None = None,
) -> Tile:
    """The first `count` tokens of a page."""
    return Tile(
        start, fmt.key.map, fmt.value.map, page.key_codes[:count],
        page.key_scales[:count].astype(np.float64), page.mean.astype(np.float64),
        page.value_codes[:count], page.value_scales.astype(np.float64), readable,
    )  # fmt: skip


def round_query(q: NDArray[np.float32], query: QueryFormat) -> Array:
    """q [..., D] rounded per row: int8 as activations are, or E4M3 with amax/448.

    A row with NaN or infinity becomes NaN, one below 2**-100 becomes 0.
    """
    if query == "float":
        return q.astype(np.float64)
    largest = np.float32(127 if query == "int8" else floats.E4M3_LARGEST)
    finite = np.isfinite(q).all(axis=-1, keepdims=True)
    amax = np.abs(np.where(np.isfinite(q), q, 0)).max(axis=-1, keepdims=True, initial=0)
    usable = finite & (amax >= np.float32(SMALLEST_ABSMAX))
    safe = np.where(usable, amax, np.float32(1)).astype(np.float32)
    scaled = np.where(usable, q, np.float32(0)) * (largest / safe)
    codes = np.rint(scaled).astype(np.float64) if query == "int8" else floats.round_e4m3(scaled)
    return np.where(finite, codes * (safe / largest), np.nan)


def raw_scores(q: NDArray[np.float32], tile: Tile, query: QueryFormat) -> Array:
    """q·k [R, n] of rows q [R, D], before the factor `scale`."""
    with np.errstate(invalid="ignore"):
        if tile.key_map == "float":
            return q.astype(np.float64) @ tile.key_codes.T
        products = round_query(q, query) @ tile.key_codes.T * tile.key_scales
        return products + (q.astype(np.float64) @ tile.mean)[:, None]


def scores(q: NDArray[np.float32], tiles: list[list[Tile]], length: int, options: Options) -> Array:
    """s [Hq, Lq, length] of one sequence in natural units, -inf where a key may not be read.

    q: [Hq, Lq, D]. tiles: of each KV head, or of each query head, at positions 0 .. length - 1; a
    position that no tile holds is not read.
    """
    heads, rows, _ = q.shape
    group = heads // max(len(tiles), 1)
    s = np.full((heads, rows, length), -np.inf)
    held = np.zeros((heads, 1, length), np.bool_)
    for head in range(heads):
        for tile in tiles[head // group]:
            s[head, :, tile.positions] = options.scale * raw_scores(q[head], tile, options.query)
            held[head, :, tile.positions] = True if tile.readable is None else tile.readable
    query_at = np.arange(rows)[:, None] + length - rows
    distance = query_at - np.arange(length)[None, :]
    with np.errstate(invalid="ignore"):
        if options.softcap is not None:
            s = options.softcap * np.tanh(s / options.softcap)
        if options.bias is not None:
            s = s + options.bias.astype(np.float64)
        if options.alibi is not None:
            s = s - options.alibi.astype(np.float64)[:, None, None] * distance
    readable = may_read(distance, options) & held
    if options.mask is not None:
        readable = readable & options.mask
    return np.where(readable, s, -np.inf)


def may_read(distance: NDArray[np.int64], options: Options) -> NDArray[np.bool_]:
    """Which keys the order of positions admits; distance = query position - key position."""
    rows, length = distance.shape
    readable = np.ones((rows, length), np.bool_)
    if options.causal and options.tree is None:
        readable &= distance >= 0
    if options.window is not None:
        readable &= distance < options.window
        if not options.causal:
            readable &= -distance < options.window
    if options.tree is not None:
        nodes = np.arange(length) - (length - rows)
        own = nodes >= 0
        words = options.tree.astype(np.int64)[:, nodes[own] // 32]
        readable[:, own] &= (words >> (nodes[own] % 32)) & 1 == 1
    return readable


def attend_sequence(
    q: NDArray[np.float32], tiles: list[list[Tile]], length: int, options: Options
) -> tuple[Array, Array]:
    """q [Hq, Lq, D] → o [Hq, Lq, E], lse [Hq, Lq], of one sequence."""
    heads, rows, _ = q.shape
    group = heads // max(len(tiles), 1)
    width = next((t.value_codes.shape[1] for own in tiles for t in own), 0)
    s = scores(q, tiles, length, options)
    sink = np.full(heads, -np.inf) if options.sink is None else options.sink.astype(np.float64)
    sinks = np.broadcast_to(sink[:, None], (heads, rows))
    largest = np.maximum(s.max(axis=2, initial=-np.inf), sinks)
    shift = np.where(np.isneginf(largest), 0, largest)
    with np.errstate(invalid="ignore", divide="ignore"):
        total = np.exp(s - shift[..., None]).sum(axis=2) + np.exp(sinks - shift)
        o = np.zeros((heads, rows, width))
        for head in range(heads):
            for tile in tiles[head // group]:
                part = s[head, :, tile.positions]
                weights, tile_max = tile_weights(part, tile, options.precision)
                factor = np.exp(tile_max - shift[head])
                summed = weights @ tile.value_codes * tile.value_scales
                read = ~np.isneginf(part).all(axis=1)  # a tile that is not read adds nothing
                o[head][read] += (summed * factor[:, None])[read]
        o = np.where(total[..., None] == 0, 0, o / total[..., None])
        return o, shift + np.log(total)


def tile_weights(s: Array, tile: Tile, precision: Precision) -> tuple[Array, Array]:
    """exp(s - max) [R, n] of one tile, rounded as the precision says, and max [R]."""
    tile_max = s.max(axis=1, initial=-np.inf)
    tile_max = np.where(np.isneginf(tile_max), 0, tile_max)
    weights = np.exp(s - tile_max[:, None])
    if tile.value_map == "float" or precision == "float":
        return weights, tile_max
    levels = LEVELS[precision]
    if precision == "e4m3":
        finite = np.nan_to_num(weights * levels)
        rounded = np.where(np.isnan(weights), np.nan, floats.round_e4m3(finite))
        return rounded / levels, tile_max
    return np.rint(weights * levels) / levels, tile_max


@dataclass(frozen=True)
class Cache:
    """`lath.formats.attention.PageView` with arrays: see there. Floats are fp32 arrays.

    dtype: "fp16", "bf16" or "fp32", what float codecs of the records hold.
    """

    format: PageFormat
    records: NDArray[np.uint8]
    index: NDArray[np.uint8]
    table: NDArray[np.int32]
    starts: NDArray[np.int32]
    counts: NDArray[np.int32]
    page_counts: NDArray[np.int32]
    lengths: NDArray[np.int32]
    dtype: str = "fp32"
    first_keys: NDArray[np.float32] | None = None
    first_values: NDArray[np.float32] | None = None
    first_lengths: NDArray[np.int32] | None = None
    last_keys: NDArray[np.float32] | None = None
    last_values: NDArray[np.float32] | None = None
    last_lengths: NDArray[np.int32] | None = None
    draft: bool = False
    tokens: NDArray[np.int64] | None = None

    @property
    def heads(self) -> int:
        """Lists of tiles of a sequence: KV heads, or query heads where each has its own list."""
        return int(self.table.shape[1]) if self.table.ndim == 3 else int(self.records.shape[1])

    def entries(self, sequence: int, head: int) -> list[tuple[int, int, int, Any]]:
        """Page number, start, count and readable tokens of each page of a list."""
        own = (sequence, head) if self.table.ndim == 3 else (sequence,)
        entries = []
        for i in range(int(self.page_counts[own])):
            number, start, count = (
                int(array[own][i]) for array in (self.table, self.starts, self.counts)
            )
            readable = None
            if self.tokens is not None:
                bits = int(self.tokens[own][i])
                readable = np.array([bits >> t & 1 == 1 for t in range(count)])
            entries.append((number, start, count, readable))
        return entries

    def tiles(self, sequence: int, list_head: int) -> list[Tile]:
        """The tiles of one sequence and list, in the order of their positions."""
        head = list_head // (self.heads // self.records.shape[1])
        tiles = []
        if self.first_keys is not None and self.first_lengths is not None:
            assert self.first_values is not None
            count = int(self.first_lengths[sequence])
            keys, values = self.first_keys[sequence, head], self.first_values[sequence, head]
            tiles.append(float_tile(0, keys[:count], values[:count]))
        for number, start, count, readable in self.entries(sequence, list_head):
            record, index = self.records[number, head], self.index[number, head]
            page = read_page(record, index, self.format, self.dtype, self.draft)
            tiles.append(page_tile(start, count, page, self.format, readable))
        if self.last_keys is not None and self.last_lengths is not None:
            assert self.last_values is not None
            count = int(self.last_lengths[sequence])
            keys, values = self.last_keys[sequence, head], self.last_values[sequence, head]
            start = int(self.lengths[sequence]) - count
            tiles.append(float_tile(start, keys[:count], values[:count]))
        return [tile for tile in tiles if len(tile.key_codes)]


def attend(
    q: NDArray[np.float32], query_lengths: NDArray[np.int32], cache: Cache, options: Options
) -> tuple[Array, Array]:
    """q [S, Hq, L, D] → o [S, Hq, L, E], lse [S, Hq, L], float64.

    Sequence s has the rows 0 .. query_lengths[s] - 1; the other rows come out as 0 and -inf. mask
    and bias: broadcastable to [S, Hq, L, max(lengths)]; tree: [S, L, W]. Rows of mask, bias and
    tree are those of q.
    """
    sequences, heads, rows, _ = q.shape
    o = np.zeros((sequences, heads, rows, cache.format.value_dim))
    lse = np.full((sequences, heads, rows), -np.inf)
    for s in range(sequences):
        count, length = int(query_lengths[s]), int(cache.lengths[s])
        own = sequence_options(options, s, count, length)
        tiles = [cache.tiles(s, head) for head in range(cache.heads)]
        if count and any(tiles):
            o[s, :, :count], lse[s, :, :count] = attend_sequence(
                q[s, :, :count], tiles, length, own
            )
        elif count and options.sink is not None:
            lse[s, :, :count] = options.sink.astype(np.float64)[:, None]
    return o, lse


def sequence_options(options: Options, sequence: int, rows: int, length: int) -> Options:
    """The options of one sequence: mask and bias [Hq or 1, rows or 1, length or 1]."""

    def own(array: Any) -> Any:
        if array is None:
            return None
        array = array.reshape((1,) * (4 - array.ndim) + array.shape)
        return array[sequence if array.shape[0] > 1 else 0][:, :rows, :length]

    tree = None if options.tree is None else options.tree[sequence, :rows]
    return Options(
        options.scale, options.causal, options.window, options.softcap,
        own(options.mask), own(options.bias),
        options.alibi, options.sink, tree, options.query, options.precision,
    )  # fmt: skip


def merge(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Outputs [..., E] and lses [...] of disjoint sets of keys → those of their union.

    A part with lse -inf read nothing; if no part read anything, 0 and -inf.
    """
    lses = np.stack([lse for _, lse in parts])
    largest = lses.max(axis=0)
    shift = np.where(np.isneginf(largest), 0, largest)
    weights = np.exp(lses - shift)
    total = weights.sum(axis=0)
    with np.errstate(divide="ignore"):
        lse = shift + np.log(total)
    summed = sum(
        w[..., None] * np.where(w[..., None] == 0, 0, o)
        for w, (o, _) in zip(weights, parts, strict=True)
    )
    return summed / np.where(total == 0, 1, total)[..., None], lse
