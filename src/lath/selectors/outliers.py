"""Any selector, and from every page the one token that its mean says least about."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lath.formats.page_pool import SideTable
from lath.formats.pages import PAGE, PageFormat
from lath.selectors.base import Around, Request, Scored
from lath.verbs.page_decode import decode_pages, read_field

SUFFIX = "+outliers"


@dataclass(frozen=True)
class Outliers(Around):
    """The tokens of another selector, and before them from every page the token whose key lies
    farthest from the page's mean, all within the budget: at 64 tokens a page a 64th of the context.

    On heavy tails single tokens carry the softmax, and an index row speaks for all of its page's
    tokens but those; with them read, repair has only to stand in for what is left. Lists are of
    tokens; pages (or units) of a selector of pages are read wholly until the budget is full. A
    budget of fewer tokens than there are pages holds outliers alone. Text form "quest+outliers".
    """

    name: ClassVar[str] = "outliers"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.inner, Outliers):
            raise ValueError(f"inner must not be one with outliers itself, got {str(self.inner)!r}")

    @property
    def claims_mass(self) -> bool:  # type: ignore[override]
        return self.inner.claims_mass

    def __str__(self) -> str:
        return f"{self.inner}{SUFFIX}"

    def scores(self, request: Request) -> Scored:
        found, view = self.inner.scores(request), request.view
        scores = found.scores
        scores = scores.repeat_interleave(self.inner.unit, dim=-1)
        slots = torch.arange(PAGE, device=scores.device) < view.counts[..., None]
        there = slots.flatten(1)[:, None]
        first = _of_lists(farthest(request), request.lists) & there
        scores = scores.masked_fill(~there, -torch.inf)
        # Behind what is read in any case, whose score is inf.
        scores = scores.masked_fill(first, torch.finfo(scores.dtype).max)
        return replace(found, scores=scores)


def _of_lists(chosen: Tensor, lists: int) -> Tensor:
    """bool [S, Hkv, W] → [S, lists, W]; a list of all heads takes what any of them does."""
    if lists == 1:
        return chosen.any(dim=1, keepdim=True)
    return chosen.repeat_interleave(lists // chosen.shape[1], dim=1)


def farthest(request: Request) -> Tensor:
    """bool [S, Hkv, 64 P]: the outlier of each page."""
    kv, view = request.kv, request.view
    compute = functools.partial(_farthest, kv.format, kv.dtype)
    table = kv.pool.side_tables.setdefault("outliers", SideTable(compute))
    (own,) = table.of(kv.pool, request.pages, view.table)
    numbers = own[view.table.long()].transpose(1, 2).long()  # [S, Hkv, P]
    return torch.nn.functional.one_hot(numbers, PAGE).bool().flatten(2)


def _farthest(fmt: PageFormat, dtype: torch.dtype, records: Tensor, index: Tensor) -> tuple[Tensor]:
    """uint8 [n, Hkv]: see `reference.selectors.farthest`."""
    keys, _ = decode_pages(records, index, fmt, dtype)
    mean = read_field(index, fmt.index_fields["mean"], torch.bfloat16).double()
    distances = (keys - mean[..., None, : fmt.key_dim]).square().sum(-1)
    written = read_field(index, fmt.index_fields["numbers"], torch.float32)[..., 1]
    slots = torch.arange(PAGE, device=index.device)
    distances = distances.masked_fill(slots >= written[..., None], -1.0)
    return (distances.argmax(dim=-1).to(torch.uint8),)
