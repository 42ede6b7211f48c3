"""Reading a sequence of a `PagedKV` back, and the edits that quantise pages anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lath.formats.pages import PAGE
from lath.verbs.page_decode import decode_pages

if TYPE_CHECKING:
    from lath.verbs.paged_kv import PagedKV


def dequantize(kv: PagedKV, s: int) -> tuple[Tensor, Tensor]:
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


def _decoded(kv: PagedKV, s: int) -> tuple[Tensor, Tensor]:
    """fp64 [pages, Hkv, 64, D] and [pages, Hkv, 64, E] as stored (divided by channel scales)."""
    pages = torch.tensor(kv.spans[s].pages, dtype=torch.int64, device=kv.device)
    return decode_pages(kv.pool.records[pages], kv.pool.index[pages], kv.format, kv.dtype)


def _quantise(kv: PagedKV, keys: Tensor, values: Tensor) -> list[tuple[int, int]]:
    """Tokens [Hkv, n, D] and [Hkv, n, E] of `_working`'s dtype as new pages: (number, count)."""
    starts = range(0, keys.shape[1], PAGE)
    counts = [min(PAGE, keys.shape[1] - start) for start in starts]
    pages = kv.pool.take(len(counts))
    if pages:
        jobs = [(0, *job) for job in zip(starts, counts, pages, strict=True)]
        kv.write_pages(
            keys[None].contiguous(),
            values[None].contiguous(),
            torch.tensor(jobs, dtype=torch.int32, device=kv.device),
        )
    return list(zip(pages, counts, strict=True))


def compact(kv: PagedKV, s: int, keep: list[int]) -> None:
    """Keep the ascending positions `keep` of sequence s."""
    span = kv.spans[s]
    if len(keep) == span.length:
        return
    tail_at = span.first + span.paged
    head = [position for position in keep if position < span.first]
    tail = [position - tail_at for position in keep if position >= tail_at]
    inside = keep[len(head) : len(keep) - len(tail)]
    pages: list[tuple[int, int]] = []
    loose: list[tuple[Tensor, Tensor]] = []
    for page, slots in _kept_slots(kv, s, inside):
        whole = _prefix(slots)
        if whole:
            pages += _quantise_loose(kv, loose)
            pages.append((page, whole))
        if len(slots) > whole:
            loose.append(_tokens(kv, page, slots[whole:]))
    moved = sum(keys.shape[1] for keys, _ in loose)
    if moved + len(tail) >= PAGE:
        pages += _quantise_loose(kv, loose)
        moved = 0
    kv.replace_pages(s, pages)
    if kv.keep_first:
        _gather(kv.first_keys, kv.first_values, s, head, 0)
    _gather(kv.last_keys, kv.last_values, s, tail, moved)
    if moved:
        for part, side in ((kv.last_keys, 0), (kv.last_values, 1)):
            part[s, :, :moved] = torch.cat([tokens[side] for tokens in loose], dim=1).to(kv.dtype)
    span.first, span.last = len(head), moved + len(tail)
    kv.changed()


def _kept_slots(kv: PagedKV, s: int, positions: list[int]) -> list[tuple[int, list[int]]]:
    """(page, the slots of it that are kept) for each page of sequence s that keeps any."""
    span = kv.spans[s]
    kept, start, at = [], span.first, 0
    for page, count in zip(span.pages, span.counts, strict=True):
        slots = []
        while at < len(positions) and positions[at] < start + count:
            slots.append(positions[at] - start)
            at += 1
        start += count
        if slots:
            kept.append((page, slots))
    return kept


def _prefix(slots: list[int]) -> int:
    """How many tokens of a page stay where they are: the first n, if those are all that is kept or
    at least half a page (or a cache that is often thinned out would come to hold slivers)."""
    run = 0
    while run < len(slots) and slots[run] == run:
        run += 1
    return run if run == len(slots) or run >= PAGE // 2 else 0


def _quantise_loose(kv: PagedKV, loose: list[tuple[Tensor, Tensor]]) -> list[tuple[int, int]]:
    """The tokens as new pages; empties the list."""
    if not loose:
        return []
    keys, values = (torch.cat(side, dim=1) for side in zip(*loose, strict=True))
    loose.clear()
    return _quantise(kv, keys, values)


def _tokens(kv: PagedKV, page: int, slots: list[int]) -> tuple[Tensor, Tensor]:
    """The decoded tokens [Hkv, n, ...] of a page."""
    keys, values = decode_pages(kv.pool.records[page], kv.pool.index[page], kv.format, kv.dtype)
    return keys[:, slots].to(_working(kv)), values[:, slots].to(_working(kv))


def _working(kv: PagedKV) -> torch.dtype:
    """What decoded numbers are quantised from: fp32, or the cache's dtype where pages hold it."""
    holds_floats = "float" in (kv.format.key.map, kv.format.value.map)
    return kv.dtype if holds_floats else torch.float32


def _gather(keys: Tensor, values: Tensor, s: int, slots: list[int], at: int) -> None:
    """The tokens at `slots` of a float part go to `at` and on."""
    for part in (keys, values):
        part[s, :, at : at + len(slots)] = part[s][:, slots]


def rerotate(kv: PagedKV, s: int, delta: int, inverse_frequencies: Tensor) -> None:
    """Turn the keys of sequence s by `delta` positions."""
    span = kv.spans[s]
    if delta == 0 or span.length == 0:
        return
    angles = delta * inverse_frequencies.detach().to(kv.device, torch.float64)
    keys, values = _decoded(kv, s)
    turned, values = _turn(kv, keys, angles).to(_working(kv)), values.to(_working(kv))
    pages: list[tuple[int, int]] = []
    for i, count in enumerate(span.counts):
        pages += _quantise(kv, turned[i, :, :count], values[i, :, :count])
    kv.replace_pages(s, pages)
    if kv.keep_first:
        kv.first_keys[s] = _turn(kv, kv.first_keys[s].double(), angles).to(kv.dtype)
    kv.last_keys[s] = _turn(kv, kv.last_keys[s].double(), angles).to(kv.dtype)


def _turn(kv: PagedKV, keys: Tensor, angles: Tensor) -> Tensor:
    """fp64 keys [..., Hkv, n, D], turned in the units before channel scales."""
    half = angles.shape[0]
    scales = kv.key_channel_scales
    if scales is not None:
        keys = keys * scales[:, None]
    a, b, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
    return turned if scales is None else turned / scales[:, None]
