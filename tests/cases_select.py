"""Caches, and the definition's lists for them, that the tests of selection share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lath
from cases_attention import as_array, as_cache
from lath.formats.pages import PAGE
from lath.reference import select as reference
from lath.reference import selectors as definition
from lath.reference import strata
from lath.verbs.backends import is_installed

BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not is_installed("numba"), reason="numba")),
]
HEADS, GROUP, DIM = 2, 2, 32


def make_cache(
    tokens: int = 700,
    batch: int = 1,
    backend: str = "reference",
    seed: int = 0,
    codec: str = "int8",
) -> tuple[lath.PagedKV, Tensor]:
    """A cache of biased keys, and queries [batch, Hq, 1, D]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    kv = lath.PagedKV(HEADS, DIM, batch, codec, codec, dtype=torch.float32, backend=backend)
    keys = normal(batch, HEADS, tokens, DIM) + normal(batch, HEADS, 1, DIM)
    kv.append(keys, normal(batch, HEADS, tokens, DIM) + 0.3)
    return kv, 2 * normal(batch, HEADS * GROUP, 1, DIM)


def spelled(name: str) -> str:
    return {"sparq": "sparq-8", "double_sparsity": "double_sparsity-6"}.get(name, name)


def defined(name: str, q: Tensor, kv: lath.PagedKV, wish: definition.Wish) -> Any:
    """The lists of the definition for a text form."""
    cache, rows = as_cache(kv.view(), q.dtype), np.full(q.shape[0], q.shape[2], np.int32)
    array = as_array(q)
    inner, _, suffix = name.partition("+")
    kind, _, option = inner.partition("-")
    size = int(digits) if (digits := option.removeprefix("mass").removeprefix("-")) else PAGE
    score: Any = "bound" if kind == "quest" else "mass" if option.startswith("mass") else "mean"
    if suffix:  # of Quest or the centroid
        own = cache if size == PAGE else strata.cut(cache, size)
        scores = reference.page_scores(array, rows, own, score, wish.scale)
        pooled = reference.pool(definition.hide(scores, cache, PAGE // size), wish.lists)
        if suffix == "outliers":
            return definition.with_outliers(pooled, cache, wish, q.shape[2], PAGE // size)
        factor = int(suffix.removeprefix("tokens-"))
        return definition.refined(array, rows, cache, wish, pooled, factor, "int8")
    if kind in ("quest", "centroid"):
        return definition.by_page(array, rows, cache, wish, score, size)
    if kind == "tokenselect":
        return definition.token_select(array, rows, cache, wish, "int8")
    if kind == "hgca":
        return definition.hgca(array, rows, cache, wish, "int8", 1.0)
    if kind == "paged_eviction":
        return definition.paged_eviction(array, rows, cache, wish, size)
    if kind == "clusterkv":
        segments = [[min(len(span.pages), 64)] for span in kv.spans]
        return definition.cluster_kv(array, rows, cache, wish, segments, 40)
    count = int(option)
    if kind == "sparq":
        every = np.tile(np.arange(DIM, dtype=np.int32), (HEADS, 1))
        rows_of = definition.sparq_rows(array, count)
        return definition.by_channels(array, rows, cache, wish, every, rows_of, 8, True)
    channels = most_spread(cache, count)
    rows_of = np.tile(np.arange(count, dtype=np.int32), (*q.shape[:2], 1))
    return definition.by_channels(array, rows, cache, wish, channels, rows_of, 8, False)


def most_spread(cache: Any, count: int) -> Any:
    pages = definition.pages_of(cache)
    channels = []
    for head in range(HEADS):
        keys = np.concatenate([page.keys for (_, h), page in pages.items() if h == head])
        order = np.argsort(-keys.var(axis=0), kind="stable")[:count]
        channels.append(np.sort(order))
    return np.array(channels, np.int32)


def hard_scores(rows: int, width: int) -> Tensor:
    """Ties, both zeros, NaN of both signs, infinities, neighbours in the last bit."""
    scores = torch.randn(rows, width)
    scores[torch.rand(rows, width) < 0.2] = 0.5
    scores[torch.rand(rows, width) < 0.1] = 0.0
    scores[torch.rand(rows, width) < 0.1] = -0.0
    scores[torch.rand(rows, width) < 0.1] = -math.inf
    scores[torch.rand(rows, width) < 0.05] = math.inf
    scores[torch.rand(rows, width) < 0.05] = math.nan
    scores[torch.rand(rows, width) < 0.05] = -torch.tensor(math.nan)
    scores[torch.rand(rows, width) < 0.1] = float(np.nextafter(np.float32(0.5), np.float32(1)))
    return scores


def extreme_rows(width: int) -> Tensor:
    """Scores [8, width], each row of one kind."""
    rows = {
        "all equal": torch.full((width,), 1.5),
        "nothing": torch.full((width,), -math.inf),
        "one": torch.full((width,), -math.inf).index_fill(0, torch.tensor([width - 1]), -3.0),
        "all nan": torch.full((width,), math.nan),
        "zeros": torch.tensor([0.0, -0.0] * (width // 2)),
        "falling": -torch.arange(width, dtype=torch.float32),
        "subnormal": torch.arange(width, dtype=torch.float32) * 2.0**-149,
        "smallest": torch.full((width,), -torch.finfo(torch.float32).max),
    }
    return torch.stack(list(rows.values()))
