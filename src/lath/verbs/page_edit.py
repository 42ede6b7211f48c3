"""Reading a sequence of a `PagedKV` back, and the edits that quantise pages anew."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lath.formats.page_span import NOWHERE, Positions, as_positions, joined
from lath.formats.pages import PAGE
from lath.verbs.page_decode import decode_pages

if TYPE_CHECKING:
    from lath.verbs.store_operations import StoreOperations


def dequantize(kv: StoreOperations, s: int) -> tuple[Tensor, Tensor]:
    """Keys [Hkv, n, D] and values [Hkv, n, E] of sequence s, fp32, channel scales multiplied in."""
    span = kv.spans[s]
    keys, values = _decoded(kv, s)
    parts_k, parts_v = [], []
    if kv.keep_first:
        parts_k.append(kv.first_keys[s, :, : span.first].float())
        parts_v.append(kv.first_values[s, :, : span.first].float())
    for i, count in enumerate(span.counts):
        parts_k.append(keys[i, :, :count].float())
        parts_v.append(values[i, :, :count].float())
    parts_k.append(kv.last_keys[s, :, : span.last].float())
    parts_v.append(kv.last_values[s, :, : span.last].float())
    k, v = torch.cat(parts_k, dim=1), torch.cat(parts_v, dim=1)
    if kv.key_channel_scales is not None:
        k = k * kv.key_channel_scales[:, None]
    return k, v


def _decoded(kv: StoreOperations, s: int) -> tuple[Tensor, Tensor]:
    """fp64 [pages, Hkv, 64, D] and [pages, Hkv, 64, E] as stored (divided by channel scales)."""
    return decode_numbered(kv, kv.spans[s].pages)


def decode_numbered(kv: StoreOperations, pages: list[int]) -> tuple[Tensor, Tensor]:
    """Likewise, of pages of the pool."""
    numbers = torch.tensor(pages, dtype=torch.int64, device=kv.device)
    return decode_pages(kv.pool.records[numbers], kv.pool.index[numbers], kv.format, kv.dtype)


def quantise(kv: StoreOperations, keys: Tensor, values: Tensor) -> list[int]:
    """Tokens [Hkv, n, D] and [Hkv, n, E] of `working`'s dtype as new pages, the last not full."""
    starts = range(0, keys.shape[1], PAGE)
    jobs = [(0, start, min(PAGE, keys.shape[1] - start)) for start in starts]
    return _write_new(kv, keys[None], values[None], jobs)


def rewrite_keys(kv: StoreOperations, pages: list[int], keys: Tensor) -> list[int]:
    """Copies of pages with other keys [n, Hkv, 64, D], their values bit for bit."""
    if not pages:
        return []
    old = torch.tensor(pages, dtype=torch.int64, device=kv.device)
    span = kv.format.index_fields["numbers"]
    numbers = kv.pool.index[old, 0, span.offset : span.end].contiguous().view(torch.float32)
    jobs = [(row, 0, int(count)) for row, count in enumerate(numbers[:, 1].tolist())]
    unused = keys.new_zeros((*keys.shape[:3], kv.format.value_dim))
    written = _write_new(kv, keys, unused, jobs)
    new = torch.tensor(written, dtype=torch.int64, device=kv.device)
    for rows, fields in (
        (kv.pool.records, kv.format.fields),
        (kv.pool.index, kv.format.index_fields),
    ):
        for name, field in fields.items():
            if name.startswith("value"):
                rows[new, :, field.offset : field.end] = rows[old, :, field.offset : field.end]
    return written


def _write_new(
    kv: StoreOperations, keys: Tensor, values: Tensor, jobs: list[tuple[int, int, int]]
) -> list[int]:
    """Pages of keys and values [B, Hkv, L, ...]; jobs: row, first token and count of each."""
    if not jobs:
        return []
    pages = kv.pool.take(len(jobs))
    rows = [(*job, page) for job, page in zip(jobs, pages, strict=True)]
    try:
        kv.write_pages(
            keys.contiguous(),
            values.contiguous(),
            torch.tensor(rows, dtype=torch.int32, device=kv.device),
        )
    except BaseException:
        kv.pool.release(pages)
        raise
    return pages


class _Loose(NamedTuple):
    """Decoded tokens [Hkv, n, ...] that no page holds any more, and where they stand."""

    keys: Tensor
    values: Tensor
    places: Positions

    @staticmethod
    def together(parts: list[_Loose]) -> _Loose:
        places: Positions = parts[0].places
        for part in parts[1:]:
            places = joined(places, part.places)
        keys = torch.cat([part.keys for part in parts], dim=1)
        return _Loose(keys, torch.cat([part.values for part in parts], dim=1), places)


def compact(kv: StoreOperations, s: int, keep: list[int], renumber: bool) -> None:
    """Keep the ascending positions `keep` of sequence s; position keep[i] becomes i where
    `renumber`."""
    span = kv.spans[s]
    head, head_at = _kept(span.first_at, keep, renumber)
    tail, tail_at = _kept(span.last_at, keep, renumber)
    inside = [_kept(places, keep, renumber) for places in span.pages_at]
    length = len(keep) if renumber else span.length
    left = len(head) + len(tail) + sum(len(slots) for slots, _ in inside)
    if length == span.length and left == span.tokens:
        return
    pages: list[tuple[int, Positions]] = []
    loose: list[_Loose] = []
    for page, (slots, places) in zip(span.pages, inside, strict=True):
        whole = _prefix(slots)
        if whole:
            pages += _quantise_loose(kv, loose)
            pages.append((page, as_positions(places[:whole])))
        if len(slots) > whole:
            loose.append(_tokens(kv, page, list(slots[whole:]), as_positions(places[whole:])))
    joins = _Loose.together(loose) if loose and _joins(loose, tail_at) else None
    if joins is None:
        pages += _quantise_loose(kv, loose)
    kv.replace_pages(s, pages)
    if kv.keep_first:
        _gather(kv.first_keys, kv.first_values, s, list(head), 0)
    moved = 0 if joins is None else len(joins.places)
    _gather(kv.last_keys, kv.last_values, s, list(tail), moved)
    if joins is not None:
        kv.last_keys[s, :, :moved] = joins.keys.to(kv.dtype)
        kv.last_values[s, :, :moved] = joins.values.to(kv.dtype)
        tail_at = joined(joins.places, tail_at)
    span.place(length, head_at, tail_at)
    kv.changed()


def _kept(places: Positions, keep: list[int], renumber: bool) -> tuple[Sequence[int], Positions]:
    """Which slots of a part are kept, and where they stand then."""
    if not places:
        return NOWHERE, NOWHERE
    begin, end = bisect_left(keep, places[0]), bisect_right(keep, places[-1])
    if isinstance(places, range) and end - begin == len(places):
        return range(len(places)), range(begin, end) if renumber else places
    slot_of = {position: slot for slot, position in enumerate(places)}
    chosen = [i for i in range(begin, end) if keep[i] in slot_of]
    positions = chosen if renumber else [keep[i] for i in chosen]
    return [slot_of[keep[i]] for i in chosen], as_positions(positions)


def _joins(loose: list[_Loose], tail_at: Positions) -> bool:
    """Whether decoded tokens go to the tail: it has room, and no position becomes inexact by it."""
    places = _Loose.together(loose).places
    return len(places) + len(tail_at) < PAGE and (not tail_at or tail_at[0] == places[-1] + 1)


def _prefix(slots: Sequence[int]) -> int:
    """How many tokens of a page stay where they are: the first n, if those are all that is kept or
    at least half a page (or a cache that is often thinned out would come to hold slivers)."""
    if isinstance(slots, range):
        return len(slots)
    run = 0
    while run < len(slots) and slots[run] == run:
        run += 1
    return run if run == len(slots) or run >= PAGE // 2 else 0


def _quantise_loose(kv: StoreOperations, loose: list[_Loose]) -> list[tuple[int, Positions]]:
    """The tokens as new pages; empties the list."""
    if not loose:
        return []
    keys, values, places = _Loose.together(loose)
    loose.clear()
    pages = quantise(kv, keys, values)
    return [(page, as_positions(places[PAGE * i :][:PAGE])) for i, page in enumerate(pages)]


def _tokens(kv: StoreOperations, page: int, slots: list[int], places: Positions) -> _Loose:
    """Tokens of a page, decoded."""
    keys, values = decode_pages(kv.pool.records[page], kv.pool.index[page], kv.format, kv.dtype)
    return _Loose(keys[:, slots].to(working(kv)), values[:, slots].to(working(kv)), places)


def working(kv: StoreOperations) -> torch.dtype:
    """What decoded numbers are quantised from: fp32, or the cache's dtype where pages hold it."""
    holds_floats = "float" in (kv.format.key.map, kv.format.value.map)
    return kv.dtype if holds_floats else torch.float32


def _gather(keys: Tensor, values: Tensor, s: int, slots: list[int], at: int) -> None:
    """The tokens at `slots` of a float part go to `at` and on."""
    for part in (keys, values):
        part[s, :, at : at + len(slots)] = part[s][:, slots]


def rerotate(kv: StoreOperations, s: int, delta: int, inverse_frequencies: Tensor) -> None:
    """Turn the keys of sequence s by `delta` positions."""
    span = kv.spans[s]
    if delta == 0 or span.length == 0:
        return
    angles = delta * inverse_frequencies.detach().to(kv.device, torch.float64)
    turned = _turn(kv, _decoded(kv, s)[0], angles).to(working(kv))
    pages = rewrite_keys(kv, span.pages, turned)
    kv.replace_pages(s, zip(pages, list(span.pages_at), strict=True))
    if kv.keep_first:
        kv.first_keys[s] = _turn(kv, kv.first_keys[s].double(), angles).to(kv.dtype)
    kv.last_keys[s] = _turn(kv, kv.last_keys[s].double(), angles).to(kv.dtype)


def _turn(kv: StoreOperations, keys: Tensor, angles: Tensor) -> Tensor:
    """fp64 keys [..., Hkv, n, D], turned in the units before channel scales."""
    half = angles.shape[0]
    scales = kv.key_channel_scales
    if scales is not None:
        keys = keys * scales[:, None]
    a, b, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
    return turned if scales is None else turned / scales[:, None]
