"""What a selector is: scores of pages or tokens, of which the largest are read.

Everything else is common: which pages are read in any case, the budget, the list (`lath.select`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lath.formats.attention import PageView, Queries
from lath.formats.pages import PAGE
from lath.formats.plan import Backend
from lath.formats.selection import Granularity, Heads, PageScore, Strata
from lath.verbs.paged_kv import PagedKV


@dataclass(frozen=True)
class Request:
    """What is asked of a selector.

    queries: as attention reads the cache's keys. lists: how many lists a sequence has, 1, Hkv or
    Hq. hidden: bool [S, P], pages that some row may not read wholly; None where there are none.
    budget: tokens that a list may hold besides what is read in any case; 0 where a mass decides.
    """

    queries: Queries
    kv: PagedKV
    view: PageView
    scale: float
    backend: Backend
    lists: int
    hidden: Tensor | None = None
    budget: int = 0

    @property
    def rows(self) -> int:
        return int(self.queries.q.shape[2])

    @property
    def group(self) -> int:
        return int(self.queries.q.shape[1]) // self.view.num_kv_heads

    @property
    def full(self) -> bool:
        """Whether every entry of the tables is a page that the last row of its sequence reads."""
        width = int(self.view.table.shape[1])
        whole = all(len(span.pages) == width for span in self.kv.spans)
        return whole and self.rows == 1 and self.queries.longest == 1

    @property
    def whole(self) -> bool:
        """Whether all of its pages hold 64 tokens that count."""
        return all(count == PAGE for span in self.kv.spans for count in span.counts)

    def pages(self) -> list[int]:
        """Page numbers of all sequences."""
        return [page for span in self.kv.spans for page in span.pages]


@dataclass(frozen=True)
class Scored:
    """scores: fp32 [S, H, W], the larger the sooner read; -inf: not. rows: fp32 [S, Hq, L, W] and
    parts: fp32 [S, Hq, L], where a selector knows them: estimates of the scores of each row, and of
    log Σ exp(score) over the float parts, from which the share of the softmax follows."""

    scores: Tensor
    rows: Tensor | None = None
    parts: Tensor | None = None


class Selector(ABC):
    """A way to choose what attention reads. Frozen and without state of its own; what it keeps of
    pages lies in the cache's pool.

    granularity: whether its lists are of pages or of tokens. default_heads: whose list it is.
    claims_mass: whether `scores` says what share of the softmax a list holds (`Scored.rows` and
    `parts`). recent: how many of the last full pages it wants read in any case. unit: how many
    tokens side by side a score is for: W counts the 64 / unit of every page.
    """

    name: ClassVar[str]
    granularity: ClassVar[Granularity] = "page"
    default_heads: ClassVar[Heads] = "kv"
    claims_mass: ClassVar[bool] = False

    @property
    def recent(self) -> int:
        return 1

    @property
    def unit(self) -> int:
        return PAGE if self.granularity == "page" else 1

    @abstractmethod
    def scores(self, request: Request) -> Scored:
        """Scores for each list of `request`."""

    def strata(self, kv: PagedKV, view: PageView) -> Strata | None:
        """The groups of tokens that it chooses by, where they say more of what it does not choose
        than the pages do: repair goes by them."""
        return None

    def mass_bounds(self, request: Request) -> tuple[Tensor, Tensor] | None:
        """fp32 [S, Hq, L, W] twice: lower and upper bounds of log Σ exp(score) of each entry; None
        where the selector has none."""
        return None

    @property
    def has_bounds(self) -> bool:
        """Whether `mass_bounds` gives any."""
        return type(self).mass_bounds is not Selector.mass_bounds

    @classmethod
    def parse(cls, option: str) -> Selector:
        """The selector with the option of its text form, "" for none. ValueError otherwise."""
        if option:
            raise ValueError(f"selector {cls.name!r} takes no option, got {option!r}")
        return cls()

    @property
    def page_score(self) -> PageScore | None:
        """The score of pages that `scores` is the vote of, where it is just that."""
        return None

    @property
    def option(self) -> str:
        return ""

    def __str__(self) -> str:
        return f"{self.name}-{self.option}" if self.option else self.name


@dataclass(frozen=True)
class Around(Selector):
    """A selector of tokens that is made of another, whose lists, strata and pages that are read in
    any case it takes over."""

    inner: Selector
    granularity: ClassVar[Granularity] = "token"

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Selector):
            raise TypeError(f"inner must be a Selector, got {type(self.inner).__name__}")

    @property
    def default_heads(self) -> Heads:  # type: ignore[override]
        return self.inner.default_heads

    @property
    def recent(self) -> int:
        return self.inner.recent

    def strata(self, kv: PagedKV, view: PageView) -> Strata | None:
        return self.inner.strata(kv, view)


def parse_count(name: str, option: str, default: int) -> int:
    """The whole number >= 1 of a text form's option."""
    if not option:
        return default
    if not option.isdecimal() or int(option) < 1:
        raise ValueError(f"the option of selector {name!r} is a whole number >= 1, got {option!r}")
    return int(option)


def pool(scores: Tensor, lists: int, extra: Tensor | None = None, *, full: bool = False) -> Tensor:
    """[S, Hq, L, W] → [S, lists, W]: see `reference.select.pool`.

    full: it is known that no entry is -inf in all rows of a list.
    """
    sequences, query_heads, rows, width = scores.shape
    grouped = scores.reshape(sequences, lists, query_heads // lists * rows, width)
    if grouped.shape[2] == 1:
        return grouped[:, :, 0]
    if extra is None and width:
        # A row without any entry: softmax gives NaN, and its entries are -inf in all rows anyway
        # unless other rows of the list read them.
        votes = torch.softmax(grouped, dim=-1)
        if rows > 1 or sequences > 1:
            empty = (grouped == -math.inf).all(dim=-1, keepdim=True)
            votes = votes.masked_fill(empty, 0)
    else:
        others = grouped.new_full(grouped.shape[:3], -math.inf)
        if extra is not None:
            others = extra.reshape(grouped.shape[:3])
        total = torch.logaddexp(torch.logsumexp(grouped, dim=-1), others)[..., None]
        votes = torch.exp(grouped - total.masked_fill(total == -math.inf, 0))
    total_votes = votes.sum(dim=2)
    if full:
        return total_votes
    return total_votes.masked_fill((grouped == -math.inf).all(dim=2), -math.inf)


def part_mass(request: Request, q: Tensor | None = None, scale: Tensor | float = 0.0) -> Tensor:
    """fp32 [S, Hq, L]: log Σ exp(score) over the float parts, which are read in any case.

    q: fp32 [S, Hq, L, D] in place of the request's rows, with their own scale.
    """
    view = request.view
    factor: Tensor | float = request.scale
    if q is None:
        q = request.queries.q.float()
    else:
        factor = scale
    sequences, heads, rows, dim = q.shape
    grouped = q.reshape(sequences, view.num_kv_heads, request.group * rows, dim)
    total = q.new_full((sequences, heads, rows), -math.inf)
    for keys, lengths in (
        (view.first_keys, view.first_lengths),
        (view.last_keys, view.last_lengths),
    ):
        if keys is None or lengths is None:
            continue
        products = grouped @ keys.float().transpose(-1, -2)
        products = products.reshape(sequences, heads, rows, PAGE) * factor
        absent = torch.arange(PAGE, device=q.device) >= lengths[:, None]
        products = products.masked_fill(absent[:, None, None], -math.inf)
        total = torch.logaddexp(total, torch.logsumexp(products, dim=-1))
    return total


def hide(request: Request, scores: Tensor) -> Tensor:
    """Scores [S, Hq, L, W] with -inf for pages that some row may not read wholly."""
    if request.hidden is None:
        return scores
    width = scores.shape[-1] // request.hidden.shape[1]
    hidden = request.hidden.repeat_interleave(width, dim=1)
    return scores.masked_fill(hidden[:, None, None], -math.inf)
