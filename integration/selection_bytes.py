"""Bytes that one step of decoding reads with a selection, from the plans of its kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lath.formats.device import DeviceDescription
from lath.formats.pages import PAGE, SUBPAGE, SUBPAGES, PageFormat
from lath.formats.plan import Backend
from lath.kernels.select.plan import plan_select
from lath.selectors import (
    HGCA,
    Centroid,
    ClusterKV,
    DoubleSparsity,
    Outliers,
    PagedEviction,
    Quest,
    Refined,
    Selector,
    SparQ,
    TokenSelect,
)
from lath.selectors.base import Around
from lath.verbs.budgets import TopMass, budget_tokens, budget_units
from lath.verbs.planning import plan_attention
from lath.verbs.repairs import parse_repair
from lath.verbs.selection import Selection


@dataclass(frozen=True)
class Step:
    """One layer's decoding of one token of one sequence of `context` tokens."""

    context: int
    query_heads: int
    kv_heads: int
    format: PageFormat
    dtype: torch.dtype
    device: DeviceDescription

    @property
    def pages(self) -> int:
        return max(self.context - PAGE, 0) // PAGE  # the first 64 tokens are no page

    @property
    def backend(self) -> Backend:
        return "cpu" if self.device.kind == "cpu" else "triton"

    def dense(self) -> int:
        """Bytes that reading everything moves."""
        return self._attention(self.context, None)

    def selected(self, selection: Selection, layer: int) -> int | None:
        """Bytes that the scores, the lists at their longest and repair move; not those of top-k.

        None where they are not known beforehand: budgets by mass, selectors of the user's own.
        """
        budget = selection.budget_of(layer)
        if isinstance(budget, TopMass):
            return None
        if max(selection.dense_below, budget_tokens(budget, self.context)) >= self.context:
            return self.dense()
        whose = selection.heads or selection.selector.default_heads
        made = {"kv": self.kv_heads, "query": self.query_heads, "layer": 1}[whose]
        scores = self.scored(selection.selector, budget_tokens(budget, self.context), made)
        if scores is None:
            return None
        lists = max(made, self.kv_heads)
        # A list that serves several steps is made once.
        shared = selection.reuse if selection.reuse_cosine is None else 1
        attention = self.attended(selection, budget, lists)
        return attention + scores // shared + self._repair(selection, lists)

    def attended(self, selection: Selection, budget: int | float, lists: int) -> int:
        """Bytes that attention over lists at their longest moves."""
        pages, subpages = self.touched(selection, budget)
        tokens = selection.selector.granularity == "token"
        return self._attention(
            self.context - self.pages * PAGE + pages * PAGE, lists, tokens=tokens,
            subpages=subpages if tokens else None,
        )  # fmt: skip

    def _repair(self, selection: Selection, lists: int) -> int:
        wanted = parse_repair(selection.repair)
        if wanted is None:
            return 0
        if wanted.kind == "mean":
            return 4 * self.kv_heads * self.pages * self.format.value_dim
        selector, given = selection.selector, {"spreads": wanted.kind == "spreads"}
        while isinstance(selector, Around):  # its strata are those of what it is made of
            selector = selector.inner
        unit = selector.unit if selector.unit > 1 else PAGE
        if isinstance(selector, ClusterKV):
            unit = selector.tokens_per_cluster
        return self._select("repair", unit, own_lists=lists != self.kv_heads, **given)

    def touched(self, selection: Selection, budget: int | float) -> tuple[int, int]:
        """Pages of which a list holds a token at most, and 16 tokens side by side: each unit within
        the budget lies in a page of its own."""
        selector = selection.selector
        recent = selector.recent if selection.recent is None else selection.recent
        recent = min(recent, self.pages)
        tokens, others = budget_tokens(budget, self.context), self.pages - recent
        inner = selector.inner if isinstance(selector, Outliers) else selector
        most = others  # pages of which more than an outlier is read
        if isinstance(inner, Refined):
            most = min(most, self._candidates(inner, tokens))
        if isinstance(selector, Outliers):
            pages = min(tokens, others)
            subpages = pages + min(
                _beside_outliers(inner.unit, tokens - pages), (SUBPAGES - 1) * most
            )
        else:
            units = budget_units(tokens, inner.unit)
            pages, subpages = min(units, most), min(units * _subpages(inner.unit), most * SUBPAGES)
        return pages + recent, subpages + SUBPAGES * recent

    def _candidates(self, selector: Refined, tokens: int) -> int:
        """Pages whose tokens are scored for each list."""
        return min(budget_units(selector.factor * tokens), self.pages)

    def _attention(self, keys: int, lists: int | None, **masks: Any) -> int:
        fmt = self.format
        return plan_attention(
            query_heads=self.query_heads, kv_heads=self.kv_heads, keys=keys, head_dim=fmt.key_dim,
            value_dim=fmt.value_dim, key_codec=fmt.key, value_codec=fmt.value, dtype=self.dtype,
            device=self.device, lists=lists, **masks,
        ).bytes_moved  # fmt: skip

    def _select(self, kind: Any, unit: int = PAGE, **options: Any) -> int:
        sizes = {
            "sequences": 1, "query_heads": self.query_heads, "kv_heads": self.kv_heads,
            "pages": self.pages * PAGE // unit,
        } | options  # fmt: skip
        return plan_select(
            queries=1, fmt=self.format, kind=kind, device=self.device, backend=self.backend, **sizes
        ).bytes_moved

    def scored(self, selector: Selector, tokens: int, lists: int) -> int | None:
        """Bytes that scores move. tokens: of the budget; lists: that are made."""
        if isinstance(selector, Around):
            inner = self.scored(selector.inner, tokens, lists)
            if inner is None:
                return None
            if isinstance(selector, Refined):
                return inner + self._scores_of_candidates(self._candidates(selector, tokens), lists)
            # A number of each page: which of its tokens lies farthest.
            return inner + self.kv_heads * self.pages if isinstance(selector, Outliers) else None
        return self._scores_alone(selector)

    def _scores_of_candidates(self, pages: int, lists: int) -> int:
        """To the kernel each list is a sequence of the one KV head that it is for."""
        heads = 1 if lists > 1 else self.kv_heads
        return self._select(
            "token", sequences=lists, query_heads=self.query_heads // lists, kv_heads=heads,
            pages=pages,
        )  # fmt: skip

    def _scores_alone(self, selector: Selector) -> int | None:
        """Of a selector that is made of no other."""
        dim = self.format.key_dim
        if isinstance(selector, Quest):
            return self._select("bound", selector.unit)
        if isinstance(selector, Centroid):
            return self._select("mass" if selector.mass else "mean", selector.unit)
        if isinstance(selector, SparQ):
            return self._select("label", labels=(selector.channels or max(dim // 4, 1), 8))
        if isinstance(selector, DoubleSparsity):
            channels = selector.channels or max(dim // 8, 1)
            return self._select("label", labels=(channels, selector.bits))
        if isinstance(selector, (TokenSelect, HGCA)):
            return self._select("token")
        if isinstance(selector, PagedEviction):
            return 4 * self.kv_heads * self.pages * PAGE // selector.unit
        if isinstance(selector, ClusterKV):
            clusters = self.pages * PAGE // selector.tokens_per_cluster
            return self.kv_heads * (4 * dim * clusters + 8 * self.pages * PAGE)
        return None


def _subpages(unit: int) -> int:
    """Those that a unit of tokens lies in."""
    return max(unit // SUBPAGE, 1)


def _beside_outliers(unit: int, tokens: int) -> int:
    """Further sub-pages at most that units take up until so many tokens are spent. A page that is
    read wholly has one token less left, and its outlier's sub-page is none."""
    whole, new = (PAGE - 1, SUBPAGES - 1) if unit == PAGE else (unit, _subpages(unit))
    units, rest = divmod(tokens, whole)
    return units * new + min(new, -(-rest // SUBPAGE))
