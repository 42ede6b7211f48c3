"""Selectors that score pages: Quest, the centroid, and PagedEviction's norms."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lath.formats.page_pool import SideTable
from lath.formats.pages import PAGE, SUBPAGE, PageFormat
from lath.formats.selection import PageScore
from lath.selectors.base import Request, Scored, Selector, hide, pool
from lath.verbs.page_decode import decode_pages, mean_over_tokens, read_field
from lath.verbs.select_backends import page_scores


def _pages_by(request: Request, kind: str, extremes: Tensor | None = None) -> Tensor:
    scores = page_scores(
        request.queries, request.view, kind,  # type: ignore[arg-type]
        request.scale, request.backend, extremes,
    )  # fmt: skip
    return hide(request, scores)


class _FromIndex(Selector):
    """Selectors whose pages have bounds from their index rows."""

    def mass_bounds(self, request: Request) -> tuple[Tensor, Tensor]:
        upper = _pages_by(request, "bound") + request.view.counts.log()[:, None, None]
        return _pages_by(request, "floor"), upper


@dataclass(frozen=True)
class Quest(_FromIndex):
    """Pages by the largest score that one of their keys can have (Tang et al., 2406.10774).

    subpages: bound each sub-page of 16 tokens by itself and take the largest: tighter, for 8 D more
    bytes of a page. Text form "quest", "quest-16".
    """

    subpages: bool = False
    name: ClassVar[str] = "quest"

    @classmethod
    def parse(cls, option: str) -> Quest:
        if option not in ("", str(SUBPAGE), str(PAGE)):
            raise ValueError(f"the option of selector 'quest' is {SUBPAGE} or none, got {option!r}")
        return cls(option == str(SUBPAGE))

    @property
    def option(self) -> str:
        return str(SUBPAGE) if self.subpages else ""

    @property
    def page_score(self) -> PageScore | None:
        return None if self.subpages else "bound"

    def scores(self, request: Request) -> Scored:
        extremes = subpage_extremes(request) if self.subpages else None
        return Scored(pool(_pages_by(request, "bound", extremes), request.lists, full=request.full))


@dataclass(frozen=True)
class Centroid(_FromIndex):
    """Pages by the score of their mean key, which every page has.

    mass: by the estimate of log Σ exp(score) that repair uses, mean and spread together. Text form
    "centroid", "centroid-mass".
    """

    mass: bool = False
    name: ClassVar[str] = "centroid"

    @classmethod
    def parse(cls, option: str) -> Centroid:
        if option not in ("", "mass"):
            raise ValueError(f"the option of selector 'centroid' is mass or none, got {option!r}")
        return cls(option == "mass")

    @property
    def option(self) -> str:
        return "mass" if self.mass else ""

    @property
    def page_score(self) -> PageScore:
        return "mass" if self.mass else "mean"

    def scores(self, request: Request) -> Scored:
        own = _pages_by(request, self.page_score)
        return Scored(pool(own, request.lists, full=request.full))


@dataclass(frozen=True)
class PagedEviction(_FromIndex):
    """Pages by the mean over their tokens of |v| / |k|, whatever the query (PagedEviction,
    2509.04377). Text form "paged_eviction". `lath.PagedEviction` evicts by the same score."""

    name: ClassVar[str] = "paged_eviction"

    def scores(self, request: Request) -> Scored:
        view = request.view
        (ratios,) = norm_ratios(request)
        own = ratios[view.table.long()].transpose(1, 2)  # [S, Hkv, P]
        own = own.masked_fill((view.counts == 0)[:, None], -math.inf)
        if request.hidden is not None:
            own = own.masked_fill(request.hidden[:, None], -math.inf)
        if request.lists == 1:
            return Scored(own.mean(dim=1, keepdim=True))
        return Scored(own.repeat_interleave(request.lists // own.shape[1], dim=1))


def norm_ratios(request: Request) -> tuple[Tensor, ...]:
    """(fp32 [N, Hkv],): the mean over a page's tokens of |v| / |k|."""
    kv = request.kv
    compute = functools.partial(_norm_ratios, kv.format, kv.dtype, kv.key_channel_scales)
    table = kv.pool.side_tables.setdefault("norm_ratios", SideTable(compute))
    return table.of(kv.pool, request.pages, request.view.table)


def _norm_ratios(
    fmt: PageFormat, dtype: torch.dtype, scales: Tensor | None, records: Tensor, index: Tensor
) -> tuple[Tensor]:
    keys, values = decode_pages(records, index, fmt, dtype)
    keys = keys if scales is None else keys * scales[:, None]
    ratios = values.norm(dim=-1) / keys.norm(dim=-1).clamp(min=1e-30)
    return (mean_over_tokens(ratios, index, fmt).float(),)


def _numbers(index: Tensor, fmt: PageFormat) -> Tensor:
    return read_field(index, fmt.index_fields["numbers"], torch.float32)


def _tokens_written(index: Tensor, fmt: PageFormat) -> Tensor:
    written: Tensor = _numbers(index, fmt)[..., 1]
    return written


def subpage_extremes(request: Request) -> Tensor:
    """int8 [N, Hkv, 4, 2, D]: see `reference.select.subpage_extremes`."""
    kv = request.kv
    table = kv.pool.side_tables.setdefault(
        "subpage_extremes", SideTable(functools.partial(_extremes, kv.format, kv.dtype))
    )
    return table.of(kv.pool, request.pages, request.view.table)[0]


def _extremes(fmt: PageFormat, dtype: torch.dtype, records: Tensor, index: Tensor) -> tuple[Tensor]:
    keys, _ = decode_pages(records, index, fmt, dtype)
    mean = read_field(index, fmt.index_fields["mean"], torch.bfloat16).double()
    unit = _numbers(index, fmt)[..., 0].double()
    step = torch.where(torch.isfinite(unit), unit, 1.0)[..., None, None, None]
    y = torch.nan_to_num(keys - mean[..., None, : fmt.key_dim], nan=0, posinf=0, neginf=0)
    y = y.reshape(*y.shape[:-2], PAGE // SUBPAGE, SUBPAGE, y.shape[-1])
    slots = torch.arange(PAGE, device=index.device).view(-1, SUBPAGE)
    used = (slots < _tokens_written(index, fmt)[..., None, None])[..., None]
    largest = torch.where(used, y, -math.inf).amax(-2)
    smallest = torch.where(used, y, math.inf).amin(-2)
    # A sub-page without tokens takes what the whole page has.
    blank = ~used.any(-2)
    largest = torch.where(blank, largest.amax(-2, keepdim=True), largest)
    smallest = torch.where(blank, smallest.amin(-2, keepdim=True), smallest)
    step = step[..., 0]
    # A quotient that is a whole number but for its rounding is that number.
    highest = torch.ceil(torch.round(largest / step, decimals=6))
    lowest = torch.floor(torch.round(smallest / step, decimals=6))
    return (torch.stack([highest, lowest], dim=-2).to(torch.int8),)
