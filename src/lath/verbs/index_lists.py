"""`IndexList`s: made from a user's own numbers, and applied to what attention reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lath.formats.attention import PageView
from lath.formats.pages import PAGE
from lath.formats.selection import Granularity, IndexList
from lath.verbs.attention_options import check_choice, integers
from lath.verbs.paged_kv import PagedKV

_BITS = PAGE - 1


def index_list(
    indices: Sequence[Sequence[Sequence[int]]] | Tensor, kv: PagedKV, granularity: str = "page"
) -> IndexList:
    """An `IndexList` of the caller's own choice, checked against a cache.

    indices: of each sequence and head ([B][H][...], H = 1, Hkv, or any multiple of Hkv for query
    heads) ascending numbers: entries of the sequence's page table ("page"; `kv.page_counts`), or
    positions of tokens ("token"; those in the cache's float parts are read in any case). Or an
    integer tensor [B, H, K] with -1 behind the last. ValueError for a number that is out of range,
    repeated or out of order.
    """
    kind: Granularity = check_choice("granularity", granularity, ("page", "token"))  # type: ignore[assignment]
    lists = _as_lists(indices, kv)
    taken = [
        [_check_list(kv, s, head, own, kind) for head, own in enumerate(rows)]
        for s, rows in enumerate(lists)
    ]
    width = max((len(own) for rows in taken for own in rows), default=0)
    padded = [[own + [-1] * (width - len(own)) for own in rows] for rows in taken]
    heads = len(taken[0]) if taken else 1
    shape = (len(taken), heads, width)
    tensor = torch.tensor(padded, dtype=torch.int32, device=kv.device).reshape(shape)
    return IndexList(tensor, (tensor >= 0).sum(-1, dtype=torch.int32), kind)


def _as_lists(indices: Any, kv: PagedKV) -> list[list[list[int]]]:
    if isinstance(indices, Tensor):
        if indices.dim() != 3 or indices.is_floating_point() or indices.dtype == torch.bool:
            raise ValueError(
                f"indices must be an integer tensor [B, H, K] or nested lists, got "
                f"{indices.dtype} of shape {[*indices.shape]}"
            )
        indices = [[[i for i in own if i != -1] for own in rows] for rows in indices.tolist()]
    if len(indices) != kv.batch:
        raise ValueError(f"indices must hold {kv.batch} sequences, got {len(indices)}")
    heads = {len(rows) for rows in indices}
    if len(heads) > 1 or any(h != 1 and h % kv.num_kv_heads for h in heads) or 0 in heads:
        raise ValueError(
            f"indices must hold 1 list for each sequence, or one per KV head ({kv.num_kv_heads}) "
            f"or query head, as many for every sequence, got {sorted(heads)}"
        )
    return [
        [integers(f"indices[{s}][{head}]", own) for head, own in enumerate(rows)]
        for s, rows in enumerate(indices)
    ]


def _check_list(kv: PagedKV, s: int, head: int, own: list[int], kind: Granularity) -> list[int]:
    """A list in the numbers of an `IndexList`."""
    span = kv.spans[s]
    limit = len(span.pages) if kind == "page" else kv.lengths[s]
    what = "pages of the sequence" if kind == "page" else "positions of the sequence"
    for number in own:
        if not 0 <= number < limit:
            raise ValueError(
                f"indices[{s}][{head}] must hold {what}, 0 .. {limit - 1}, got {number}"
            )
    for before, after in pairwise(own):
        if before >= after:
            kind_of = "repeats" if before == after else "puts out of order"
            raise ValueError(f"indices[{s}][{head}] must ascend, but {kind_of} {after}")
    return own if kind == "page" else _slots(kv, s, own)


def _slots(kv: PagedKV, s: int, positions: list[int]) -> list[int]:
    """64 * entry + token of positions in pages; others are in float parts, or were dropped."""
    slot_of = {
        position: PAGE * entry + token
        for entry, places in enumerate(kv.spans[s].pages_at)
        for token, position in enumerate(places)
    }
    return [slot_of[position] for position in positions if position in slot_of]


def check_lists(ids: Any, view: PageView, query_heads: int) -> IndexList:
    """`ids` as an `IndexList` that fits a view."""
    if not isinstance(ids, IndexList):
        raise TypeError(
            f"pages must be a lath.IndexList (lath.select, lath.index_list), got "
            f"{type(ids).__name__}"
        )
    sequences, heads, _ = ids.indices.shape
    if sequences != view.num_sequences or heads not in (1, view.num_kv_heads, query_heads):
        raise ValueError(
            f"pages must hold lists for {view.num_sequences} sequences and 1, "
            f"{view.num_kv_heads} (KV) or {query_heads} (query) heads, got shape "
            f"{[*ids.indices.shape]}"
        )
    return ids


def choose(view: PageView, ids: IndexList) -> PageView:
    """What attention reads after a selection."""
    if ids.granularity == "page":
        chosen = _Chosen.of_entries(view, ids.indices, ids.counts)
    else:
        masks = token_masks(view, ids)
        width = min(masks.shape[2], ids.indices.shape[2])
        # Entries that hold a chosen token, first and in order: a stable sort by absence.
        order = torch.argsort((masks == 0).to(torch.uint8), dim=2, stable=True)[..., :width]
        counts = (masks != 0).sum(-1, dtype=torch.int32)
        chosen = _Chosen.of_entries(view, order, counts, masks)
    kv_heads = view.num_kv_heads
    if ids.num_heads == 1 and kv_heads > 1:
        chosen = chosen.expand(kv_heads)
    parts = sum(PAGE for part in (view.first_keys, view.last_keys) if part is not None)
    pages = int(chosen.table.shape[2]) * PAGE
    return dataclasses.replace(
        view, table=chosen.table, starts=chosen.starts, counts=chosen.counts,
        page_counts=chosen.page_counts, tokens=chosen.tokens,
        listed=min(pages + parts, max(view.longest, 1)),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """The lists of a `PageView`."""

    table: Tensor
    starts: Tensor
    counts: Tensor
    page_counts: Tensor
    tokens: Tensor | None

    @staticmethod
    def of_entries(
        view: PageView, entries: Tensor, number: Tensor, masks: Tensor | None = None
    ) -> _Chosen:
        """entries: [S, H, K], of which the first `number` [S, H] are in use."""
        if entries.shape[2] == 0:
            entries = entries.new_zeros((*entries.shape[:2], 1))
        at = entries.long().clamp_(min=0)
        used = torch.arange(at.shape[2], device=at.device) < number[..., None]
        lists = [
            source[:, None].expand(-1, at.shape[1], -1).gather(2, at)
            for source in (view.table, view.starts, view.counts)
        ]
        tokens = None if masks is None else masks.gather(2, at)
        return _Chosen(lists[0], lists[1], lists[2] * used, number, tokens)

    def expand(self, heads: int) -> _Chosen:
        def wide(tensor: Tensor) -> Tensor:
            return tensor.expand(-1, heads, -1)

        tokens = None if self.tokens is None else wide(self.tokens)
        return _Chosen(
            wide(self.table), wide(self.starts), wide(self.counts),
            self.page_counts.expand(-1, heads), tokens,
        )  # fmt: skip


def token_masks(view: PageView, ids: IndexList) -> Tensor:
    """int64 [S, H, P]: bit t of an entry is set where the list holds its token t."""
    sequences, heads, _ = ids.indices.shape
    slots = ids.indices.long()
    bits = torch.where(slots >= 0, torch.ones_like(slots) << (slots & _BITS), 0)
    masks = slots.new_zeros((sequences, heads, view.table.shape[1]))
    # No slot is in a list twice, so that adding the bits is setting them.
    return masks.scatter_add_(2, slots.clamp(min=0) // PAGE, bits)


def unread_quantiles(kv: PagedKV, view: PageView, ids: IndexList, rows: int) -> Tensor:
    """fp32 [S, H, P]: `reference.select.unread_quantile` of every entry.

    An entry that some of the `rows` last positions may not read wholly counts as read.
    """
    unread = _all_unread(kv, view, rows)[:, None].expand(-1, ids.num_heads, -1)
    width = unread.shape[2]
    if ids.granularity == "page":
        # A column more, for what stands behind the last of a list.
        wide = torch.nn.functional.pad(unread, (0, 1))
        at = torch.where(ids.indices >= 0, ids.indices, width).long()
        return wide.scatter_(2, at, -math.inf)[..., :width].contiguous()
    counts = view.counts[:, None].expand_as(unread)
    read = torch.zeros(unread.shape, dtype=torch.float64, device=unread.device)
    entries = ids.indices.long().clamp(min=0) // PAGE
    read.scatter_add_(2, entries, (ids.indices >= 0).double())
    share = (read / counts.clamp(min=1)).clamp(max=1)
    return torch.minimum(torch.special.ndtri(1 - share).float(), unread)


def _all_unread(kv: PagedKV, view: PageView, rows: int) -> Tensor:
    """fp32 [S, P]: inf for the entries that all rows may read wholly, else -inf."""
    known = kv.derived
    if rows <= 1 and "unread" in known:
        unread: Tensor = known["unread"]
        return unread
    absent = view.counts == 0
    if rows > 1:
        absent = absent | (view.starts + view.counts > (view.lengths - rows + 1)[:, None])
    unread = torch.where(absent, -math.inf, math.inf)
    if rows <= 1:
        known["unread"] = unread
    return unread
