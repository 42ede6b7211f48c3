"""Selectors that score pages, or units of them: Quest, the centroid, PagedEviction's norms."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lath.formats.attention import PageView
from lath.formats.page_pool import SideTable
from lath.formats.pages import PAGE, PageFormat
from lath.formats.selection import UNITS, Granularity, PageScore, Strata
from lath.selectors.base import Request, Scored, Selector, hide, pool
from lath.verbs.page_decode import decode_pages, mean_over_tokens
from lath.verbs.paged_kv import PagedKV
from lath.verbs.select_backends import page_scores
from lath.verbs.strata import cut, units


def _scores_by(request: Request, kind: PageScore, unit: int) -> Tensor:
    """fp32 [S, Hq, L, W]: scores of units of `unit` tokens, by their index rows."""
    view = request.view if unit == PAGE else cut(request.kv, request.view, unit)
    scores = page_scores(request.queries, view, kind, request.scale, request.backend)
    if unit < PAGE and not request.whole:
        scores = scores.masked_fill((view.counts == 0)[:, None, None], -math.inf)
    return hide(request, scores)


class _FromIndex(Selector):
    """Selectors of pages, or of units of them, which have bounds from their index rows.

    size: tokens that are chosen together: 64, a page, or 32, 16 or 8 of one, with an index row of
    their own, which takes as many bytes as a page's. Lists are of tokens then.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size not in UNITS:
            raise ValueError(f"size must be one of {UNITS}, got {self.size!r}")

    @property
    def granularity(self) -> Granularity:  # type: ignore[override]
        return "page" if self.size == PAGE else "token"

    @property
    def unit(self) -> int:
        return self.size

    def strata(self, kv: PagedKV, view: PageView) -> Strata | None:
        return None if self.size == PAGE else units(kv, view, self.size)

    def mass_bounds(self, request: Request) -> tuple[Tensor, Tensor]:
        view = request.view if self.size == PAGE else cut(request.kv, request.view, self.size)
        upper = _scores_by(request, "bound", self.size) + view.counts.log()[:, None, None]
        return _scores_by(request, "floor", self.size), upper

    @property
    def option(self) -> str:
        return "" if self.size == PAGE else str(self.size)


def _parse_size(name: str, option: str) -> int:
    """The size of a text form's option, "" for a page."""
    if option in ("", *map(str, UNITS)):
        return int(option or PAGE)
    raise ValueError(f"the option of selector {name!r} is one of {UNITS} or none, got {option!r}")


@dataclass(frozen=True)
class Quest(_FromIndex):
    """Pages by the largest score that one of their keys can have (Tang et al., 2406.10774, whose
    pages hold 16 tokens). Text form "quest", "quest-16"."""

    size: int = PAGE
    name: ClassVar[str] = "quest"

    @classmethod
    def parse(cls, option: str) -> Quest:
        return cls(_parse_size(cls.name, option))

    @property
    def page_score(self) -> PageScore | None:
        return "bound" if self.size == PAGE else None

    def scores(self, request: Request) -> Scored:
        own = _scores_by(request, "bound", self.size)
        return Scored(pool(own, request.lists, full=request.full))


@dataclass(frozen=True)
class Centroid(_FromIndex):
    """Pages by the score of their mean key, which every page has.

    mass: by the estimate of log Σ exp(score) that repair uses, mean and spread together. Text form
    "centroid", "centroid-16", "centroid-mass", "centroid-mass-16".
    """

    mass: bool = False
    size: int = PAGE
    name: ClassVar[str] = "centroid"

    @classmethod
    def parse(cls, option: str) -> Centroid:
        kind, _, size = option.partition("-")
        if kind != "mass":
            return cls(False, _parse_size(cls.name, option))
        return cls(True, _parse_size(f"{cls.name}-mass", size))

    @property
    def option(self) -> str:
        return "-".join(["mass"] * self.mass + [super().option] * (self.size != PAGE))

    @property
    def _score(self) -> PageScore:
        return "mass" if self.mass else "mean"

    @property
    def page_score(self) -> PageScore | None:
        return self._score if self.size == PAGE else None

    def scores(self, request: Request) -> Scored:
        own = _scores_by(request, self._score, self.size)
        return Scored(pool(own, request.lists, full=request.full))


@dataclass(frozen=True)
class PagedEviction(_FromIndex):
    """Pages by the mean over their tokens of |v| / |k|, whatever the query (PagedEviction,
    2509.04377). Text form "paged_eviction", "paged_eviction-16". `lath.PagedEviction` evicts pages
    by the same score."""

    size: int = PAGE
    name: ClassVar[str] = "paged_eviction"

    @classmethod
    def parse(cls, option: str) -> PagedEviction:
        return cls(_parse_size(cls.name, option))

    def scores(self, request: Request) -> Scored:
        view, per_page = request.view, PAGE // self.size
        (ratios,) = norm_ratios(request, self.size)
        own = ratios[view.table.long()].transpose(1, 2).flatten(2)  # [S, Hkv, W]
        first = torch.arange(0, PAGE, self.size, device=own.device)
        absent = (view.counts[..., None] <= first).flatten(1)
        own = own.masked_fill(absent[:, None], -math.inf)
        if request.hidden is not None:
            hidden = request.hidden.repeat_interleave(per_page, dim=1)
            own = own.masked_fill(hidden[:, None], -math.inf)
        if request.lists == 1:
            return Scored(own.mean(dim=1, keepdim=True))
        return Scored(own.repeat_interleave(request.lists // own.shape[1], dim=1))


def norm_ratios(request: Request, size: int) -> tuple[Tensor, ...]:
    """(fp32 [N, Hkv, 64 / size],): the mean over the tokens of each unit of |v| / |k|."""
    kv = request.kv
    compute = functools.partial(_norm_ratios, kv.format, kv.dtype, kv.key_channel_scales, size)
    table = kv.pool.side_tables.setdefault(f"norm_ratios-{size}", SideTable(compute))
    return table.of(kv.pool, request.pages, request.view.table)


def _norm_ratios(
    fmt: PageFormat,
    dtype: torch.dtype,
    scales: Tensor | None,
    size: int,
    records: Tensor,
    index: Tensor,
) -> tuple[Tensor]:
    keys, values = decode_pages(records, index, fmt, dtype)
    keys = keys if scales is None else keys * scales[:, None]
    ratios = values.norm(dim=-1) / keys.norm(dim=-1).clamp(min=1e-30)
    return (mean_over_tokens(ratios, index, fmt, size).float(),)
