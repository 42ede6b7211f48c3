"""Any selector in two steps: its pages, more than are read, and of their tokens the best ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lath.formats.attention import PageView
from lath.formats.pages import PAGE
from lath.selectors.base import Around, Request, Scored, part_mass, pool
from lath.selectors.outliers import Outliers
from lath.verbs.attention_options import choose_query
from lath.verbs.budgets import budget_units
from lath.verbs.select_backends import token_scores, top_k
from lath.verbs.strata import queries_of_heads

SUFFIX = "+tokens"


@dataclass(frozen=True)
class Refined(Around):
    """The tokens of the largest scores of `factor` times the budget of candidates: the pages that
    another selector ranks first, by the best that it says of their tokens.

    A page's index row cannot tell its tokens apart, so that pages are read for a few of them; here
    the keys of the candidates are read besides, and of no others. Scores are those of attention,
    the vote is that of `TokenSelect` over the candidates. Text form "quest+tokens",
    "quest+tokens-8" (the factor).
    """

    factor: int = 4
    name: ClassVar[str] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.inner, (Refined, Outliers)):
            raise ValueError(f"inner must be a selector by itself, got {str(self.inner)!r}")
        if isinstance(self.factor, bool) or self.factor < 1:
            raise ValueError(f"factor must be 1 or more, got {self.factor!r}")

    def __str__(self) -> str:
        return f"{self.inner}{SUFFIX}" + (f"-{self.factor}" if self.factor != 4 else "")

    def scores(self, request: Request) -> Scored:
        own = self.inner.scores(request).scores
        pages = own.reshape(*own.shape[:2], -1, PAGE // self.inner.unit).amax(-1)
        count = budget_units(self.factor * request.budget)
        entries = top_k(pages.contiguous(), count, request.backend)
        votes = _votes(request, entries)  # [S, H, 64 K]
        slots = entries.long()[..., None] * PAGE + torch.arange(PAGE, device=own.device)
        width = pages.shape[-1] * PAGE
        places = torch.where(entries[..., None] >= 0, slots, width).flatten(2)
        scores = votes.new_full((*own.shape[:2], width + 1), -math.inf)
        return Scored(scores.scatter_(2, places, votes)[..., :width].contiguous())


def _votes(request: Request, entries: Tensor) -> Tensor:
    """fp32 [S, H, 64 K]: the vote of each list's rows over the tokens of its entries [S, H, K]."""
    sequences, lists, count = entries.shape
    parts = part_mass(request).reshape(sequences * lists, -1, request.queries.q.shape[2])
    scores = token_scores(
        queries_of_heads(request.queries, lists), candidates(request.view, entries), request.scale,
        choose_query("auto", request.view.format), request.backend,
    )  # fmt: skip
    return pool(scores, 1, parts).reshape(sequences, lists, count * PAGE)


def candidates(view: PageView, entries: Tensor) -> PageView:
    """A view of the pages of lists [S, H, K], -1 behind the last: each list a sequence of its own
    with the one KV head that it is for; all heads where H is 1. Without float parts."""
    lists, heads = entries.shape[1], view.num_kv_heads
    at = entries.long().clamp(min=0)
    table, starts, counts = (
        source[:, None].expand(-1, lists, -1).gather(2, at)
        for source in (view.table, view.starts, view.counts)
    )
    there = entries >= 0
    records, index = view.records, view.index
    if lists > 1:  # records of each head lie one after the other
        head = torch.arange(lists, dtype=table.dtype, device=table.device) * heads // lists
        table = table * heads + head[:, None]
        records, index = (rows.flatten(0, 1)[:, None] for rows in (records, index))
    return PageView(
        view.format, records, index, table.flatten(0, 1), starts.flatten(0, 1),
        (counts * there).flatten(0, 1), there.sum(-1, dtype=torch.int32).flatten(),
        view.lengths.repeat_interleave(lists), view.longest, draft=view.draft,
    )  # fmt: skip
