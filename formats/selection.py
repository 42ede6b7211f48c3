"""What a selection says: which pages or tokens of a cache are read. Pure data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lath.formats.attention import PageView
from lath.formats.pages import PAGE

Granularity = Literal["page", "token"]
Heads = Literal["kv", "query", "layer"]
PageScore = Literal["bound", "mean", "mass", "floor"]
UNITS = (8, 16, 32, PAGE)  # tokens that a selector of pages may choose together

# Scores of n tokens with a normal spread σ: log mean exp is σ²/2 only while the tokens that carry
# that mean are among the n. From σ = sqrt(2 ln n) on, the largest token alone carries it, and it
# grows linearly (Derrida's random energy model, Phys. Rev. B 24, 2613).
FREEZING = math.sqrt(2 * math.log(PAGE))
# 1 / (1 + exp(-1.702 x)) is within 0.0095 of the normal distribution function everywhere.
LOGISTIC = 1.702


@dataclass(frozen=True)
class PageChoice:
    """A selection of pages by nothing but their scores: for each of `lists` lists (1, Hkv or Hq)
    the `pages` pages of the most votes by `score`, and the last `recent`."""

    score: PageScore
    lists: int
    pages: int
    recent: int


@dataclass(frozen=True)
class Strata:
    """Groups of a cache's tokens, each with an index row as if it were a page.

    view: these pages, for scores and repair alone: records hold nothing, starts are those of the
    first token. Where each KV head has groups of its own, it has S * Hkv sequences of one head.
    of: int64 [S, Hkv, W], for each slot of tokens the entry of its group; -1 for one in no group,
    or that holds no token.
    """

    view: PageView
    of: Tensor

    @property
    def per_head(self) -> bool:
        return self.view.num_sequences != self.of.shape[0]


@dataclass(frozen=True)
class IndexList:
    """Lists of pages or tokens, one of each sequence and head.

    indices: int32 [S, H, K], ascending, -1 behind the last. counts: int32 [S, H]. granularity:
    "page": an index is an entry of the sequence's page table (0 for its first page); "token": it is
    64 * entry + token. H is 1 (all heads of the layer), Hkv or Hq. What the float parts of the
    cache hold (first 64 tokens, unfilled last page) is read always and has no index.
    mass: fp32 [S, Hq, L], the share of the softmax that the selector takes its list (and the float
    parts) to hold; None where it makes no such estimate. always: bool [S, 1, W] over entries or
    slots of tokens, those that were listed whatever their score; None for none.
    """

    indices: Tensor
    counts: Tensor
    granularity: Granularity
    mass: Tensor | None = None
    always: Tensor | None = None
    strata: Callable[[Any, PageView], Strata | None] | None = None

    @property
    def num_heads(self) -> int:
        return int(self.indices.shape[1])

    @property
    def most_tokens(self) -> int:
        """How many tokens a list can hold, known to the host."""
        return int(self.indices.shape[2]) * (PAGE if self.granularity == "page" else 1)

    def tolist(self) -> list[list[list[int]]]:
        """The lists as Python ints, [S][H][...]; waits for the device."""
        return [
            [row[:count] for row, count in zip(rows, counts, strict=True)]
            for rows, counts in zip(self.indices.tolist(), self.counts.tolist(), strict=True)
        ]
