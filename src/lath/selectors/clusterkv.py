"""ClusterKV: tokens in clusters of like keys, read cluster by cluster."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lath.formats.attention import PageView
from lath.formats.pages import PAGE
from lath.formats.selection import Granularity, Strata
from lath.selectors.base import Request, Scored, Selector, parse_count, pool
from lath.verbs.page_decode import decode_pages
from lath.verbs.paged_kv import PagedKV
from lath.verbs.strata import Places, index_rows, written

# Pages that are clustered together at most: k-means over n tokens costs n² / tokens_per_cluster.
_MOST_PAGES = 64
_ROUNDS = 10  # of Lloyd's algorithm

Key = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Segment:
    """Clusters of the tokens of some pages: centroids fp32 [Hkv, C, D], the means of their keys;
    cluster_of int64 [Hkv, tokens]; their index rows uint8 [Hkv, C, index_bytes]."""

    centroids: Tensor
    cluster_of: Tensor
    rows: Tensor


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
            for segment in self._segments(request.kv, s):
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

    def strata(self, kv: PagedKV, view: PageView) -> Strata:
        """The clusters of each sequence and head."""
        known, name = kv.derived, f"strata-{self}"
        if name not in known:
            segments = [self._segments(kv, s) for s in range(view.num_sequences)]
            known[name] = strata_of_segments(segments, view)
        found: Strata = known[name]
        lengths = view.lengths.repeat_interleave(view.num_kv_heads)  # these grow with each token
        return dataclasses.replace(found, view=dataclasses.replace(found.view, lengths=lengths))

    def _segments(self, kv: PagedKV, s: int) -> list[Segment]:
        """The clustered segments of a sequence's pages, in order; new ones are made here."""
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
                found[key] = self._cluster(kv, pages[at : at + size])
            segments.append(found[key])
            at += size
        return segments

    def _new_size(self, left: int, at: int, step: int) -> int:
        """Pages of a new segment: as many as there are, or whole windows of later ones."""
        if at == 0:
            return min(left, _MOST_PAGES)
        return min(left // step * step, _MOST_PAGES // step * step)

    def _cluster(self, kv: PagedKV, pages: list[int]) -> Segment:
        numbers = torch.tensor(pages, dtype=torch.int64, device=kv.device)
        index = kv.pool.index[numbers]
        keys, values = (
            side.transpose(0, 1).flatten(1, 2)  # [Hkv, tokens, D or E]
            for side in decode_pages(kv.pool.records[numbers], index, kv.format, kv.dtype)
        )
        count = max(keys.shape[1] // self.tokens_per_cluster, 1)
        centroids, cluster_of = k_means(keys.float(), count, _ROUNDS)
        there = written(index, kv.format).transpose(0, 1).flatten(1)
        members = Places(cluster_of.masked_fill(~there, count), count)
        return Segment(centroids, cluster_of, index_rows(keys, values, members, kv.format))


def strata_of_segments(segments: list[list[Segment]], view: PageView) -> Strata:
    """Strata of each head: S * Hkv sequences of one head, whose pages are its clusters."""
    heads, slots = view.num_kv_heads, view.table.shape[1] * PAGE
    device = view.table.device
    sizes = [sum(own.rows.shape[1] for own in each) for each in segments]
    width = max([*sizes, 1])
    table = torch.zeros((len(segments), heads, width), dtype=torch.int32, device=device)
    of = torch.full((len(segments), heads, slots), -1, device=device)
    rows: list[Tensor] = []
    placed: dict[int, int] = {}  # sequences may share segments
    for s, each in enumerate(segments):
        at = entry = 0
        for own in each:
            clusters, tokens = own.rows.shape[1], own.cluster_of.shape[1]
            if id(own) not in placed:
                placed[id(own)] = sum(map(len, rows))
                rows.append(own.rows.flatten(0, 1))
            first = placed[id(own)]
            numbers = torch.arange(first, first + heads * clusters, device=device)
            table[s, :, entry : entry + clusters] = numbers.view(heads, clusters)
            of[s, :, at : at + tokens] = own.cluster_of + entry
            at, entry = at + tokens, entry + clusters
    index = torch.cat(rows)[:, None] if rows else view.index[:1, :1]
    slot = torch.arange(PAGE, device=device)
    there = (slot < view.counts[..., None]).flatten(1)[:, None] & (of >= 0)
    of = of.masked_fill(~there, -1)
    places = torch.where(there, of, width)
    ends = (view.starts[..., None] + slot + 1).flatten(1)[:, None].expand_as(of)
    wide = (len(segments), heads, width + 1)
    counts = of.new_zeros(wide).scatter_add_(2, places, there.long())[..., :width]
    last = of.new_zeros(wide).scatter_reduce_(2, places, ends.long(), "amax")[..., :width]
    lists = [own.int().flatten(0, 1) for own in (table, last - counts, counts)]
    numbers = torch.tensor(sizes, dtype=torch.int32, device=device)
    return Strata(
        dataclasses.replace(
            view, records=index, index=index, page_counts=numbers.repeat_interleave(heads),
            table=lists[0], starts=lists[1], counts=lists[2],
        ),
        of,
    )  # fmt: skip


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
