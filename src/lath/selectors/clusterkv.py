"""ClusterKV: tokens in clusters of like keys, read cluster by cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lath.formats.pages import PAGE
from lath.formats.selection import Granularity
from lath.selectors.base import Request, Scored, Selector, parse_count, pool
from lath.verbs.page_decode import decode_pages

# Pages that are clustered together at most: k-means over n tokens costs n² / tokens_per_cluster.
_MOST_PAGES = 64
_ROUNDS = 10  # of Lloyd's algorithm

Key = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Segment:
    """Clusters of the tokens of some pages: centroids fp32 [Hkv, C, D], the means of their keys;
    cluster_of int64 [Hkv, tokens]."""

    centroids: Tensor
    cluster_of: Tensor


@dataclass(frozen=True)
class ClusterKV(Selector):
    """Clusters by q·centroid; whole clusters until the budget is full, of the last one the first
    tokens (Liu et al., 2412.03213). Clusters are of each KV head, by cosine, and are made of the
    pages that are there, then of every `window` tokens more; younger pages are read in any case.

    tokens_per_cluster: the mean size. Text form "clusterkv", "clusterkv-40".
    """

    tokens_per_cluster: int = 40
    window: int = 320
    name: ClassVar[str] = "clusterkv"
    granularity: ClassVar[Granularity] = "token"

    def __post_init__(self) -> None:
        if self.tokens_per_cluster < 1:
            raise ValueError(f"tokens_per_cluster must be 1 or more, got {self.tokens_per_cluster}")
        if self.window < PAGE or self.window % PAGE:
            raise ValueError(f"window must be a multiple of {PAGE}, got {self.window}")

    @classmethod
    def parse(cls, option: str) -> ClusterKV:
        return cls(parse_count(cls.name, option, 40))

    @property
    def option(self) -> str:
        return "" if self.tokens_per_cluster == 40 else str(self.tokens_per_cluster)

    @property
    def recent(self) -> int:
        return self.window // PAGE  # a segment's worth may not be clustered yet

    def scores(self, request: Request) -> Scored:
        view, q = request.view, request.queries.q.float()
        sequences, heads, rows, dim = q.shape
        own = q.reshape(sequences, view.num_kv_heads, request.group * rows, dim)
        scores = q.new_full(
            (sequences, view.num_kv_heads, own.shape[2], view.table.shape[1] * PAGE), -math.inf
        )
        for s in range(sequences):
            at = 0
            for segment in self._segments(request, s):
                ranked = own[s] @ segment.centroids.transpose(-1, -2) * request.scale
                places = segment.cluster_of[:, None].expand(-1, own.shape[2], -1)
                width = places.shape[2]
                scores[s, :, :, at : at + width] = ranked.gather(2, places)
                at += width
        slots = torch.arange(PAGE, device=q.device) < view.counts[..., None]
        scores = scores.masked_fill(~slots.flatten(1)[:, None, None], -math.inf)
        scores = scores.reshape(sequences, heads, rows, -1)
        # The tokens of a cluster share its score: the largest k are whole clusters, and of the last
        # one the first tokens.
        return Scored(pool(scores, request.lists))

    def _segments(self, request: Request, s: int) -> list[Segment]:
        """The clustered segments of a sequence's pages, in order; new ones are made here."""
        kv = request.kv
        found: dict[Key, Segment] = kv.pool.constants.setdefault(str(self), {})
        pages = kv.spans[s].pages
        keys = tuple((page, kv.pool.generations[page]) for page in pages)
        segments, at = [], 0
        step = self.window // PAGE
        while at < len(pages):
            sizes = [size for size in range(1, _MOST_PAGES + 1) if keys[at : at + size] in found]
            size = sizes[-1] if sizes else self._new_size(len(pages) - at, at, step)
            if size == 0:
                break
            key = keys[at : at + size]
            if key not in found:
                _forget(found, kv.pool.generations)
                found[key] = self._cluster(request, pages[at : at + size])
            segments.append(found[key])
            at += size
        return segments

    def _new_size(self, left: int, at: int, step: int) -> int:
        """Pages of a new segment: as many as there are, or whole windows of later ones."""
        if at == 0:
            return min(left, _MOST_PAGES)
        return min(left // step * step, _MOST_PAGES // step * step)

    def _cluster(self, request: Request, pages: list[int]) -> Segment:
        kv = request.kv
        numbers = torch.tensor(pages, dtype=torch.int64, device=kv.device)
        keys, _ = decode_pages(
            kv.pool.records[numbers], kv.pool.index[numbers], kv.format, kv.dtype
        )
        flat = keys.transpose(0, 1).flatten(1, 2).float()  # [Hkv, tokens, D]
        count = max(flat.shape[1] // self.tokens_per_cluster, 1)
        return Segment(*k_means(flat, count, _ROUNDS))


def _forget(found: dict[Key, Segment], generations: list[int]) -> None:
    """Drop segments of pages that hold something else by now."""
    for key in [key for key in found if any(generations[page] != g for page, g in key)]:
        del found[key]


def k_means(x: Tensor, clusters: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Cosine k-means of x fp32 [H, n, D]: (centroids [H, C, D], cluster of each token [H, n]).

    Deterministic: begins at tokens that stand evenly apart, `rounds` rounds; a tie goes to the
    lower cluster, an empty cluster keeps its direction. A centroid is the mean of its tokens as
    they are, not normalised (0 of an empty one).
    """
    heads, tokens, dim = x.shape
    directions = torch.nn.functional.normalize(torch.nan_to_num(x), dim=-1)
    first = torch.arange(clusters, device=x.device) * tokens // clusters
    centres = directions[:, first]
    cluster_of = torch.zeros((heads, tokens), dtype=torch.int64, device=x.device)
    for _ in range(rounds):
        cluster_of = (directions @ centres.transpose(-1, -2)).argmax(dim=-1)
        sums = x.new_zeros((heads, clusters, dim)).scatter_add_(
            1, cluster_of[..., None].expand(-1, -1, dim), directions
        )
        moved = torch.nn.functional.normalize(sums, dim=-1)
        centres = torch.where((sums.abs().sum(-1, keepdim=True) > 0), moved, centres)
    cluster_of = (directions @ centres.transpose(-1, -2)).argmax(dim=-1)
    places = cluster_of[..., None].expand(-1, -1, dim)
    sums = x.new_zeros((heads, clusters, dim)).scatter_add_(1, places, torch.nan_to_num(x))
    sizes = x.new_zeros((heads, clusters)).scatter_add_(1, cluster_of, x.new_ones(heads, tokens))
    return sums / sizes.clamp(min=1)[..., None], cluster_of
