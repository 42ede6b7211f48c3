"""`lath.Selection`: a selector, a budget and when to use them; what a patched model goes by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lath.formats.selection import Heads, IndexList, PageChoice
from lath.selectors import Selector
from lath.selectors import selector as parse_selector
from lath.verbs.attention_options import integers
from lath.verbs.budgets import Budget, TopMass, budget_tokens, budget_units, parse_budget
from lath.verbs.checks import check_flag, check_size
from lath.verbs.paged_kv import PagedKV
from lath.verbs.repairs import parse_repair
from lath.verbs.select import check_bounds, check_whose, select

# Rows of a step that still counts as decoding (drafts that are verified together).
DECODE_ROWS = 16


@dataclass(frozen=True)
class Selection:
    """Which selector, how much it may read, and when.

    selector, budget, heads, recent: as for `lath.select`; layer_budgets: one budget per layer in
    place of `budget` (`lath.prefix_kv_budgets`, `lath.scale_kv_budgets`). repair: as for
    `lath.decode_attention`. dense_below: caches of up to so many tokens are read whole.
    dense_layers: layers that always are. reuse: steps that a list serves, as long as no page fills;
    reuse_cosine: it serves only while every sequence's query keeps at least this cosine to the one
    that it was made for (TokenSelect: 0.9; looks at the numbers, so a GPU is waited for). chunks:
    also select for more than 16 rows at once (later pieces of a prompt).
    """

    selector: Selector
    budget: Budget = 1024
    heads: Heads | None = None
    recent: int | None = None
    repair: bool | str = False
    dense_below: int = 0
    dense_layers: frozenset[int] = frozenset()
    layer_budgets: tuple[Budget, ...] | None = None
    reuse: int = 1
    reuse_cosine: float | None = None
    chunks: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.selector, Selector):
            raise TypeError(f"selector must be a Selector, got {type(self.selector).__name__}")
        for budget in (self.budget, *(self.layer_budgets or ())):
            check_bounds(self.selector, parse_budget(budget))
        if self.heads is not None:
            check_whose(self.heads)
        if self.recent is not None:
            check_size("recent", self.recent)
        repair = parse_repair(self.repair)
        if repair is not None and repair.kind == "mean" and not self.selector.claims_mass:
            raise ValueError(
                f"repair='mean' needs a selector that says what mass its lists hold, like 'sparq', "
                f"'tokenselect' or 'hgca', got {str(self.selector)!r}"
            )
        check_size("dense_below", self.dense_below)
        if check_size("reuse", self.reuse) == 0:
            raise ValueError("reuse must be 1 step or more, got 0")
        if self.reuse_cosine is not None and not -1 <= self.reuse_cosine <= 1:
            raise ValueError(f"reuse_cosine must lie between -1 and 1, got {self.reuse_cosine}")
        check_flag("chunks", self.chunks)

    @staticmethod
    def parse(given: str | Selection, **options: Any) -> Selection:
        """A selection, or its text "quest:1024", "sparq-32:12.5%", "centroid:p0.95"; without a
        budget: 1024 tokens. options: other fields. TypeError or ValueError otherwise."""
        if isinstance(given, Selection):
            return replace(given, **options) if options else given
        if not isinstance(given, str):
            raise TypeError(
                f"select must be a str or a lath.Selection, got {type(given).__name__}: {given!r}"
            )
        name, colon, budget = given.partition(":")
        if colon:
            options = {"budget": parse_budget(budget), **options}
        return Selection(parse_selector(name), **options)

    def __str__(self) -> str:
        budget = self.budget
        text = f"{100 * budget:g}%" if isinstance(budget, float) else str(budget)
        return f"{self.selector}:{text}" + (" with repair" if self.repair else "")

    def budget_of(self, layer: int) -> Budget:
        if self.layer_budgets is None:
            return self.budget
        if layer >= len(self.layer_budgets):
            raise ValueError(
                f"layer_budgets must have one budget per layer, got {len(self.layer_budgets)} and "
                f"layer {layer}"
            )
        return self.layer_budgets[layer]


def page_choice(
    selection: Selection, layer: int, kv_heads: int, query_heads: int
) -> PageChoice | None:
    """What a step of one token takes of a layer's pages, where that is a vote over pages within a
    budget in tokens, made anew for each step; None where more is asked."""
    wish, budget = selection, selection.budget_of(layer)
    score = wish.selector.page_score
    plain = (wish.repair, wish.dense_below, wish.reuse, wish.reuse_cosine) == (False, 0, 1, None)
    if score is None or not plain or not isinstance(budget, int) or layer in wish.dense_layers:
        return None
    whose = wish.selector.default_heads if wish.heads is None else wish.heads
    lists = {"kv": kv_heads, "query": query_heads, "layer": 1}[whose]
    recent = wish.selector.recent if wish.recent is None else wish.recent
    return PageChoice(score, lists, budget_units(budget), recent)


class Selecting:
    """A selection at work on one layer's cache: remembers the last list."""

    def __init__(self, selection: Selection, layer: int = 0) -> None:
        self.selection = selection
        self.layer = layer
        self._ids: IndexList | None = None
        self._q: Tensor | None = None
        self._table: Tensor | None = None
        self._lengths: Any = None
        self._served = 0

    def lists(
        self,
        q: Tensor,
        kv: PagedKV,
        *,
        scale: float | None = None,
        query_lengths: Any = None,
        backend: str = "auto",
    ) -> IndexList | None:
        """The lists for a step, q [B, Hq, Lq, D]; None where everything is to be read."""
        wish, rows = self.selection, q.shape[2]
        if self._is_dense(kv, rows):
            return None
        lengths = None if query_lengths is None else integers("query_lengths", query_lengths)
        if lengths == self._lengths and self._is_good(q, kv):
            self._served += 1
            return self._ids
        self._ids = select(
            q, kv, wish.selector, wish.budget_of(self.layer), heads=wish.heads, recent=wish.recent,
            scale=scale, query_lengths=query_lengths, backend=backend,
        )  # fmt: skip
        self._q, self._table, self._served = q, kv.view().table, 1
        self._lengths = lengths
        return self._ids

    def _is_dense(self, kv: PagedKV, rows: int) -> bool:
        wish = self.selection
        if self.layer in wish.dense_layers or rows == 0:
            return True
        if rows > DECODE_ROWS and not wish.chunks:
            return True
        tokens, budget = max(kv.tokens, default=0), wish.budget_of(self.layer)
        if tokens <= wish.dense_below:
            return True
        return not isinstance(budget, TopMass) and budget_tokens(budget, len(kv)) >= tokens

    def _is_good(self, q: Tensor, kv: PagedKV) -> bool:
        """Whether the last list may serve once more."""
        wish = self.selection
        if self._ids is None or self._q is None or self._table is not kv.view().table:
            return False
        if self._q.shape != q.shape or (wish.reuse_cosine is None and self._served >= wish.reuse):
            return False
        if wish.reuse_cosine is None:
            return True
        if wish.reuse > 1 and self._served >= wish.reuse:
            return False
        cosine = torch.cosine_similarity(q.float().flatten(1), self._q.float().flatten(1), dim=1)
        return bool((cosine >= wish.reuse_cosine).all())
