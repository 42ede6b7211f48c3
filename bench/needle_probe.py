"""Whether the lists of selectors hold a needle where attention looks for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lath.formats.pages import PAGE
from lath.formats.selection import IndexList
from lath.selectors import Request, Scored, Selector, TokenSelect
from lath.verbs.select import pick

BUDGET = 1024


@dataclass(frozen=True, eq=False)
class Probe(TokenSelect):
    """TokenSelect, which at BUDGET finds what dense attention finds, and on its way the lists that
    `others` would make of the same queries: what they lose here is lost by their own lists, not by
    those of the layers below.

    seen: of each layer the weights fp32 [S, Hq, W] of all slots of tokens, and by name of the
    selector what its lists hold of them.
    """

    others: tuple[Selector, ...] = ()
    seen: list[tuple[Tensor, dict[str, Tensor]]] = field(default_factory=list)

    def scores(self, request: Request) -> Scored:
        own = super().scores(request)
        assert own.rows is not None
        assert own.parts is not None
        total = torch.logaddexp(torch.logsumexp(own.rows, dim=-1), own.parts)
        weights = torch.exp(own.rows - total[..., None])[:, :, 0]
        self.seen.append((weights, {str(one): held(one, request, weights) for one in self.others}))
        return own


def held(selector: Selector, request: Request, weights: Tensor) -> Tensor:
    """The weights [S, Hq, W] that the selector's lists read; 0 elsewhere."""
    heads = weights.shape[1]
    lists = {"kv": request.view.num_kv_heads, "query": heads, "layer": 1}[selector.default_heads]
    asked = dataclasses.replace(request, lists=lists)
    read = slots(pick(selector, asked, BUDGET, selector.recent, 0), weights.shape[2])
    return weights * read.repeat_interleave(heads // lists, dim=1)


def slots(ids: IndexList, width: int) -> Tensor:
    """bool [S, H, width]: the slots of tokens that lists hold."""
    at = ids.indices.long()
    if ids.granularity == "page":
        inside = at[..., None] * PAGE + torch.arange(PAGE)
        at = torch.where(at[..., None] >= 0, inside, -1).flatten(2)
    read = torch.zeros(*at.shape[:2], width + 1, dtype=torch.bool)
    return read.scatter_(2, torch.where(at >= 0, at, width), True)[..., :width]


def place_of(ids: list[int], needle: list[int]) -> range | None:
    """The slots of a needle's tokens in a prompt's pages; None where it does not lie in full pages
    alone: the first 64 tokens and the last, unfilled page are no pages and are always read."""
    at = next(i for i in range(len(ids)) if ids[i : i + len(needle)] == needle)
    place = range(at - PAGE, at - PAGE + len(needle))
    return place if place.start >= 0 and place.stop <= len(ids) // PAGE * PAGE - PAGE else None


def needle_rows(probe: Probe, places: list[range | None]) -> list[dict[str, Any]]:
    """For each selector and each needle that lies in a page: its weight summed over the heads of
    all layers, and what of that is held. places: of each needle the slots of its tokens."""
    rows = []
    for number, place in enumerate(places):
        if place is None:
            continue
        span = slice(place.start, place.stop)
        mass = sum(float(weights[number, :, span].sum()) for weights, _ in probe.seen)
        for name in (str(one) for one in probe.others):
            own = sum(float(read[name][number, :, span].sum()) for _, read in probe.seen)
            rows.append({"selector": name, "needle": number, "mass": mass, "held": own})
    return rows
