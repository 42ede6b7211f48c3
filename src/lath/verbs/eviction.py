"""Eviction: which pages of a cache go for good, by a rule that is applied after every append.

    policy = lath.PagedEviction(budget=1024)
    kv.append(k, v, keep=policy.keep(k, v))     # the prompt
    for …:
        kv.append(k, v)
        policy.step(kv)
        o = lath.decode_attention(q, kv)

Positions go on counting, as `PagedKV.drop_pages` has it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lath.formats.page_pool import SideTable
from lath.formats.pages import PAGE, PageFormat
from lath.verbs.attention_options import check_device, check_number, integers
from lath.verbs.backends import resolve_backend
from lath.verbs.checks import check_size, check_tensor
from lath.verbs.page_decode import decode_pages, mean_over_tokens
from lath.verbs.paged_kv import PagedKV
from lath.verbs.queries import check_query, queries_of, scaled_query
from lath.verbs.select_backends import page_scores


@dataclass(frozen=True)
class PagedEviction:
    """PagedEviction (2509.04377): the page goes whose values are smallest for their keys.

    A token's score is |v|₂ / |k|₂ (decoded; 0/0 is NaN), a page's the mean over its tokens and all
    KV heads. No query is asked. budget: how many tokens a sequence may hold after `step`, those of
    its float parts counted; when it holds more, the page with the lowest score goes (of equal ones
    the earlier), until it does not. Where budget + 1 is a whole number of pages, that is the moment
    at which a page fills. recent: how many of the newest pages never go; the first float part and
    the unfilled last page never do. NaN is the highest score: what is broken stays and is seen.
    """

    budget: int
    recent: int = 1

    def __post_init__(self) -> None:
        check_size("recent", self.recent)
        _check_budget(
            self.budget, PAGE * (self.recent + 2), f"64 * (recent + 2), recent {self.recent}"
        )

    def keep(self, k: Tensor, v: Tensor) -> list[list[int]]:
        """Which tokens of a prompt to store: the argument `keep` of `PagedKV.append`.

        k: [B, Hkv, L, D], v: [B, Hkv, L, E]. All where L <= budget; else `budget` of them: the
        first 64, the last 64 * recent, and of the others those with the highest scores (of equal
        ones the earlier). Waits for the device.
        """
        for name, tensor in (("k", check_tensor("k", k)), ("v", check_tensor("v", v))):
            if tensor.dim() != 4 or tensor.shape[:3] != k.shape[:3]:
                raise ValueError(
                    f"{name} must be [B, Hkv, L, channels], alike for k and v, got shape "
                    f"{[*tensor.shape]}"
                )
        check_device("v", v, k.device)
        batch, _, tokens, _ = k.shape
        if tokens <= self.budget:
            return [list(range(tokens)) for _ in range(batch)]
        scores = _ratios(k.detach().double(), v.detach().double()).mean(dim=1)
        scores = torch.where(scores.isnan(), math.inf, scores)
        scores[:, :PAGE] = math.inf
        free = slice(PAGE, tokens - PAGE * self.recent)
        order = torch.sort(scores[:, free], dim=1, descending=True, stable=True).indices + PAGE
        chosen = order[:, : self.budget - PAGE * (1 + self.recent)].sort(dim=1).values.tolist()
        ends = range(free.stop, tokens)
        return [[*range(PAGE), *own, *ends] for own in chosen]

    def step(self, kv: PagedKV, q: Tensor | None = None) -> None:
        """Drop pages of every sequence that holds more than the budget. q is not looked at.

        Waits for the device when something has to go. A page is decoded once, for its score.
        """
        _check_cache(kv)
        surplus = [held - self.budget for held in kv.tokens]
        if all(n <= 0 for n in surplus):
            return
        scores = norm_ratios(kv)
        dropped = []
        for span, n in zip(kv.spans, surplus, strict=True):
            free = range(max(len(span.pages) - self.recent, 0))
            own = scores[span.pages].tolist() if n > 0 else []
            dropped.append(_lowest(own, span.counts, free, n))
        kv.drop_pages(dropped)


@dataclass(frozen=True)
class Scope:
    """SCOPE (2412.13649): what was there before decoding stays, and of what was decoded, the pages
    that the newest queries take to be heavy.

    budget: how many tokens at positions from `prefill` on a sequence may hold after `step`.
    prefill: length of the prompt, an int or one per sequence; pages that hold any of its tokens are
    not touched. interval: pages are chosen anew every `interval` tokens only; so that the budget
    holds in between, interval - 1 tokens of it are left free then. recent: how many of the newest
    pages never go; nor does the unfilled last page. scale: of q·k, default D**-0.5.

    A page's score is its estimated share of the softmax (score "mass": from its index row), summed
    over query heads and rows; the page with the lowest goes (of equal ones the earlier).
    """

    budget: int
    prefill: int | Sequence[int]
    interval: int = 1
    recent: int = 1
    scale: float | None = None

    def __post_init__(self) -> None:
        if check_size("interval", self.interval) == 0:
            raise ValueError("interval must be 1 or more tokens, got 0")
        check_size("recent", self.recent)
        if isinstance(self.prefill, int):
            check_size("prefill", self.prefill)
        else:
            lengths = tuple(check_size("prefill", n) for n in integers("prefill", self.prefill))
            object.__setattr__(self, "prefill", lengths)
        if self.scale is not None:
            check_number("scale", self.scale)
        least = PAGE * (self.recent + 2) + self.interval
        _check_budget(self.budget, least, f"64 * (recent + 2) + interval, recent {self.recent}")

    def step(self, kv: PagedKV, q: Tensor | None = None) -> None:
        """Drop decoded pages where `interval` tokens have gone by since the last time.

        q: [B, Hq, Lq, D], the queries of the Lq tokens that were just appended; their number says
        what went by, so that a policy has no state of its own. Waits for the device when something
        has to go.
        """
        _check_cache(kv)
        if q is None:
            raise TypeError("q must be the queries of the tokens just appended, got None")
        q = check_query(q, kv)
        starts = self._starts(kv)
        surplus = []
        for span, start in zip(kv.spans, starts, strict=True):
            decoded = span.length - start
            due = decoded // self.interval > (decoded - q.shape[2]) // self.interval
            held = sum(position >= start for position in span.positions) if due else 0
            surplus.append(held - (self.budget - self.interval + 1))
        if all(n <= 0 for n in surplus):
            return
        votes = self._votes(kv, q)
        dropped = []
        for s, (span, start, n) in enumerate(zip(kv.spans, starts, surplus, strict=True)):
            newest = max(len(span.pages) - self.recent, 0)
            begin = sum(first < start for first in span.starts)
            own = votes[s, : len(span.pages)].tolist() if n > 0 else []
            dropped.append(_lowest(own, span.counts, range(begin, max(begin, newest)), n))
        kv.drop_pages(dropped)

    def _starts(self, kv: PagedKV) -> Sequence[int]:
        if isinstance(self.prefill, int):
            return [self.prefill] * kv.batch
        if len(self.prefill) != kv.batch:
            raise ValueError(
                f"prefill must have one entry per sequence, {kv.batch}, got {len(self.prefill)}"
            )
        return self.prefill

    def _votes(self, kv: PagedKV, q: Tensor) -> Tensor:
        """[S, P]: shares of the softmax over the pages, summed over heads and rows."""
        scale = q.shape[3] ** -0.5 if self.scale is None else self.scale
        queries = queries_of(scaled_query(q, kv), None)
        backend = resolve_backend(kv.backend, kv.device)
        scores = page_scores(queries, kv.view(), "mass", scale, backend)
        empty = (scores == -math.inf).all(dim=-1, keepdim=True)
        return torch.softmax(scores, dim=-1).masked_fill(empty, 0).sum(dim=(1, 2))


def norm_ratios(kv: PagedKV) -> Tensor:
    """fp64 [N] by page number, of the cache's own pages: the mean over a page's tokens and KV heads
    of |v| / |k|, channel scales multiplied in. Worked out once for each page."""
    compute = functools.partial(_page_ratios, kv.format, kv.dtype, kv.key_channel_scales)
    table = kv.pool.side_tables.setdefault("norm_ratios_of_all_heads", SideTable(compute))
    (ratios,) = table.of(
        kv.pool, lambda: [page for span in kv.spans for page in span.pages], kv.view().table
    )
    return ratios


def _page_ratios(
    fmt: PageFormat, dtype: torch.dtype, scales: Tensor | None, records: Tensor, index: Tensor
) -> tuple[Tensor]:
    keys, values = decode_pages(records, index, fmt, dtype)
    if scales is not None:
        keys = keys * scales[:, None].double()
    return (mean_over_tokens(_ratios(keys, values), index, fmt).mean(dim=(1, 2)),)


def _ratios(keys: Tensor, values: Tensor) -> Tensor:
    norms = [torch.linalg.vector_norm(side, dim=-1) for side in (values, keys)]
    ratios: Tensor = norms[0] / norms[1]
    return ratios


def _lowest(scores: list[float], counts: list[int], free: range, surplus: int) -> list[int]:
    """Entries of `free`, the lowest scores first, until `surplus` tokens are gone; ascending."""
    gone: list[int] = []
    order = sorted(free, key=lambda i: (math.isnan(scores[i]), scores[i])) if surplus > 0 else []
    for entry in order:
        if surplus <= 0:
            break
        surplus -= counts[entry]
        gone.append(entry)
    return sorted(gone)


def _check_budget(budget: Any, least: int, why: str) -> None:
    if check_size("budget", budget) < least:
        raise ValueError(
            f"budget must be at least {least} tokens ({why}), as many as never go, got {budget}"
        )


def _check_cache(kv: Any) -> None:
    if not isinstance(kv, PagedKV):
        raise TypeError(f"kv must be a lath.PagedKV, got {type(kv).__name__}")
