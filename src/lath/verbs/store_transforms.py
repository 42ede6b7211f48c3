"""Edits that change the numbers of a cache: low frequencies along tokens, thresholded deltas."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lath.formats.page_span import as_positions
from lath.formats.pages import PAGE
from lath.verbs.page_edit import decode_numbered, quantise, rewrite_keys, working

if TYPE_CHECKING:
    from lath.verbs.store_operations import StoreOperations

BLOCK = 512  # coefficients at a time: a whole matrix of 32k tokens would be gigabytes


def compact_frequencies(
    kv: StoreOperations, s: int, keep: int | float, first: int, last: int
) -> None:
    """See `PagedKV.compact_frequencies`; of sequence s."""
    span = kv.spans[s]
    begin, end = _middle(kv, s, first, last)
    pages = span.pages[begin:end]
    places = [position for part in span.pages_at[begin:end] for position in part]
    tokens = len(places)
    wanted = keep if isinstance(keep, int) else math.ceil(keep * tokens)
    if wanted >= tokens:
        return
    counts = span.counts[begin:end]
    mixed = [
        low_frequencies(_rows(side, counts), wanted).transpose(0, 1).to(working(kv))
        for side in decode_numbered(kv, pages)
    ]
    new = quantise(kv, mixed[0], mixed[1])
    stand = [places[(2 * m + 1) * tokens // (2 * wanted)] for m in range(wanted)]
    entries = [(page, as_positions(stand[PAGE * i :][:PAGE])) for i, page in enumerate(new)]
    old = list(zip(span.pages, span.pages_at, strict=True))
    kv.replace_pages(s, old[:begin] + entries + old[end:])


def _middle(kv: StoreOperations, s: int, first: int, last: int) -> tuple[int, int]:
    """The entries begin .. end - 1 that lie wholly between the first and the last tokens held."""
    span = kv.spans[s]
    counts, at = span.counts, span.first
    begin, end = 0, 0
    for i, count in enumerate(counts):
        if at < first:
            begin = i + 1
        at += count
        if at <= span.tokens - last:
            end = i + 1
    return begin, max(begin, end)


def _rows(pages: Tensor, counts: list[int]) -> Tensor:
    """[pages, Hkv, 64, C] → [tokens, Hkv, C], those that count."""
    pairs = zip(pages, counts, strict=True)
    return torch.cat([page[:, :count].transpose(0, 1) for page, count in pairs])


def low_frequencies(x: Tensor, kept: int) -> Tensor:
    """fp64 [N, ...] → [kept, ...]: the lowest coefficients of the DCT-II along the first axis, back
    by the inverse of size `kept`, times sqrt(kept / N)."""
    tokens, flat = x.shape[0], x.reshape(x.shape[0], -1)
    out = flat.new_zeros((kept, flat.shape[1]))
    for low in range(0, kept, BLOCK):
        rows = range(low, min(low + BLOCK, kept))
        out += cosines(rows, kept, x.device).T @ (cosines(rows, tokens, x.device) @ flat)
    return (out * math.sqrt(kept / tokens)).reshape(kept, *x.shape[1:])


def cosines(rows: range, size: int, device: torch.device) -> Tensor:
    """Rows of the orthonormal DCT-II matrix of a size, fp64 [rows, size]."""
    frequency = torch.arange(rows.start, rows.stop, device=device)[:, None]
    # The angle (2n + 1) k π / 2N, reduced while it is a whole number.
    angle = (2 * torch.arange(size, device=device) + 1) * frequency % (4 * size)
    matrix = (angle.double() * (math.pi / (2 * size))).cos() * math.sqrt(2 / size)
    return torch.where(frequency == 0, math.sqrt(1 / size), matrix)


def threshold_deltas(kv: StoreOperations, s: int, threshold: float, window: int) -> tuple[int, int]:
    """See `PagedKV.threshold_deltas`; deltas of sequence s that are 0, and all of them."""
    span = kv.spans[s]
    horizon = span.length - window
    old = [i for i, places in enumerate(span.pages_at) if places[-1] < horizon]
    if not old:
        return 0, 0
    keys = decode_numbered(kv, [span.pages[i] for i in old])[0]
    scales = kv.key_channel_scales
    unit = 1.0 if scales is None else scales.double()  # of a stored number, in those appended
    thinned = keys.clone()
    reference: Tensor | None = None
    zero = torch.zeros((), dtype=torch.int64, device=kv.device)
    for row, i in enumerate(old):
        for slot in range(len(span.pages_at[i])):
            key = keys[row, :, slot]
            if reference is not None:
                repeats = ((key - reference) * unit).abs() <= threshold
                zero += repeats.sum()
                key = torch.where(repeats, reference, key)
            thinned[row, :, slot] = reference = key
    changed = (thinned != keys).flatten(1).any(dim=1).tolist()
    rows = [row for row, is_new in enumerate(changed) if is_new]
    new = rewrite_keys(kv, [span.pages[old[row]] for row in rows], thinned[rows].to(working(kv)))
    table = list(zip(span.pages, span.pages_at, strict=True))
    for row, page in zip(rows, new, strict=True):
        table[old[row]] = page, span.pages_at[old[row]]
    kv.replace_pages(s, table)
    of = sum(len(span.pages_at[i]) for i in old) * keys.shape[1] * keys.shape[3]
    return int(zero), of
