"""The definition of strata in NumPy: groups of tokens with index rows of their own.

A stratum is to scores and repair what a page is: `cut` and `by_members` make caches whose "pages"
are strata, for `reference.select.page_scores` and `repair`. Its index row is that of a page with
just those keys and values, as they are decoded.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lath.formats.pages import PAGE, PageFormat
from lath.reference.attention import Array, Cache
from lath.reference.pages import index_row, key_mean, read_page, widest_unit
from lath.reference.select import read_index


def stratum_row(keys: Array, values: Array, fmt: PageFormat) -> NDArray[np.uint8]:
    """The index row of decoded keys [n, D] and values [n, E], n >= 1.

    The mean is rounded to bfloat16; max, min and deviation are counted in amax / 120 of the keys
    less that mean.
    """
    mean = key_mean(keys.astype(np.float64))
    with np.errstate(invalid="ignore"):
        centred = keys - mean.astype(np.float64)
    value_mean = values.astype(np.float64).mean(axis=0).astype(np.float32)
    return index_row(fmt, mean, centred, centred, widest_unit(centred), value_mean)


def cut(cache: Cache, unit: int) -> Cache:
    """The cache's pages cut into units of `unit` tokens: page n becomes entries n * 64/unit and up,
    of which those behind its last token have count 0."""
    per_page = PAGE // unit
    pages, heads, width = cache.index.shape
    index = np.zeros((pages * per_page, heads, width), np.uint8)
    used = {entry[0] for s in range(len(cache.lengths)) for entry in cache.entries(s, 0)}
    for number, head in ((n, h) for n in used for h in range(heads)):
        row = cache.index[number, head]
        page = read_page(cache.records[number, head], row, cache.format, cache.dtype, cache.draft)
        written = read_index(row, cache.format).tokens
        for i, first in enumerate(range(0, written, unit)):
            own = slice(first, min(first + unit, written))
            index[number * per_page + i, head] = stratum_row(
                page.keys[own], page.values[own], cache.format
            )
    inside = np.arange(per_page, dtype=np.int32)

    def flat(array: NDArray[np.int32]) -> NDArray[np.int32]:
        return array.reshape(len(array), -1)

    return replace(
        cache, index=index, table=flat(cache.table[..., None] * per_page + inside),
        starts=flat(cache.starts[..., None] + inside * unit),
        counts=flat(np.clip(cache.counts[..., None] - inside * unit, 0, unit)),
        page_counts=cache.page_counts * per_page,
    )  # fmt: skip
