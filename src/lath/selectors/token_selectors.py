"""Selectors that score tokens by all channels of their keys: TokenSelect and HGCA."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lath.formats.attention import Queries
from lath.formats.pages import PAGE
from lath.formats.selection import Granularity, Heads
from lath.selectors.base import Request, Scored, Selector, hide, parse_count, part_mass, pool
from lath.verbs.attention_options import choose_query
from lath.verbs.select_backends import token_scores


def _tokens_by(request: Request) -> Tensor:
    query = choose_query("auto", request.view.format)
    scores = token_scores(request.queries, request.view, request.scale, query, request.backend)
    return hide(request, scores)


class _AllChannels(Selector):
    """Selectors that know every score: the share of the softmax that a list holds is exact."""

    granularity: ClassVar[Granularity] = "token"
    claims_mass: ClassVar[bool] = True

    def mass_bounds(self, request: Request) -> tuple[Tensor, Tensor] | None:
        scores = _tokens_by(request)
        return scores, scores


@dataclass(frozen=True)
class TokenSelect(_AllChannels):
    """Tokens by a soft vote: the softmax of each query head, summed over the heads of the layer,
    which share one list (Wu et al., 2411.02886). Several rows (a chunk of a prompt) vote with their
    mean query. Text form "tokenselect"."""

    name: ClassVar[str] = "tokenselect"
    default_heads: ClassVar[Heads] = "layer"

    def scores(self, request: Request) -> Scored:
        if request.rows > 1:
            request = dataclasses.replace(request, queries=mean_query(request.queries))
        rows, parts = _tokens_by(request), part_mass(request)
        return Scored(pool(rows, request.lists, parts), rows, parts)


def mean_query(queries: Queries) -> Queries:
    """One row for each sequence: the mean of its own."""
    q = queries.q
    own = torch.arange(q.shape[2], device=q.device) < queries.lengths[:, None]
    total = (q.float() * own[:, None, :, None]).sum(dim=2, keepdim=True)
    mean = total / queries.lengths.clamp(min=1)[:, None, None, None]
    return Queries(mean.to(q.dtype), queries.lengths.clamp(max=1), 1)


@dataclass(frozen=True)
class HGCA(_AllChannels):
    """Recent pages densely, of the older tokens those with more than `share` times the mean weight
    of the softmax, as many as each head has of them (HGCA, 2507.03153, whose exact threshold is not
    given in its abstract). The dense and the sparse part are one list here; `lath.merge` joins them
    where they are kept on different devices.

    window: tokens that are read densely, in whole pages. Text form "hgca", "hgca-512" (the window).
    """

    window: int = 256
    share: float = 1.0
    name: ClassVar[str] = "hgca"
    default_heads: ClassVar[Heads] = "query"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be 1 or more tokens, got {self.window}")
        if not 0 <= self.share < math.inf:
            raise ValueError(f"share must be 0 or more, got {self.share}")

    @classmethod
    def parse(cls, option: str) -> HGCA:
        return cls(parse_count(cls.name, option, 256))

    @property
    def option(self) -> str:
        return "" if self.window == 256 else str(self.window)

    @property
    def has_bounds(self) -> bool:
        return self.share == 0  # else it leaves tokens out

    def mass_bounds(self, request: Request) -> tuple[Tensor, Tensor] | None:
        return super().mass_bounds(request) if self.has_bounds else None

    @property
    def recent(self) -> int:
        return -(-self.window // PAGE)

    def scores(self, request: Request) -> Scored:
        rows, parts = _tokens_by(request), part_mass(request)
        total = torch.logaddexp(torch.logsumexp(rows, dim=-1), parts)[..., None]
        weights = torch.exp(rows - total.masked_fill(total == -math.inf, 0))
        grouped = weights.reshape(
            weights.shape[0], request.lists, -1, weights.shape[-1]
        )  # the rows of a list
        votes = grouped.mean(dim=2)
        tokens = request.view.lengths.clamp(min=1)[:, None, None]
        salient = (votes * tokens > self.share) | votes.isnan()
        return Scored(votes.masked_fill(~salient, -math.inf), rows, parts)
