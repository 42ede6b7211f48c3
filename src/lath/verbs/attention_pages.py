"""Dense or packed keys and values as pages, and attention over them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lath.formats.attention import PageView, Queries, ScoreOptions
from lath.formats.pages import PAGE, PageCodec, PageFormat
from lath.formats.plan import Backend
from lath.verbs.page_backends import attend, write_pages

# precision of P·V → codec of the values. Keys are int8: 8 bits without an exponent hold a centred
# key four times closer than E4M3 does.
VALUE_CODECS = {"float": "float", "int8": "int8", "int16": "int8", "e4m3": "e4m3"}


@dataclass(frozen=True)
class Layout:
    """Where the sequences lie: row of k and v, first key and number of keys, first row of q and
    number of rows."""

    batch_rows: list[int]
    key_starts: list[int]
    key_counts: list[int]
    query_counts: list[int]
    query_starts: list[int] | None = None  # None: sequence s has the rows of q[s]

    @staticmethod
    def dense(query_counts: list[int], key_counts: list[int]) -> Layout:
        batch = len(key_counts)
        return Layout(list(range(batch)), [0] * batch, key_counts, query_counts)

    @staticmethod
    def packed(query_ends: list[int], key_ends: list[int]) -> Layout:
        """From cumulative lengths that begin with 0."""
        return Layout(
            [0] * (len(key_ends) - 1),
            key_ends[:-1],
            np.diff(key_ends).tolist(),
            np.diff(query_ends).tolist(),
            query_ends[:-1],
        )


def run_attention(
    q: Tensor, k: Tensor, v: Tensor, options: ScoreOptions, layout: Layout, backend: Backend
) -> tuple[Tensor, Tensor]:
    """`attention` with its arguments checked: o [B, Hq, Lq, E], lse fp32 [B, Hq, Lq]."""
    pages = paginate(k, v, layout, options, backend)
    if options.mask is not None or options.bias is not None:
        options = dataclasses.replace(
            options,
            mask=None if options.mask is None else options.mask[..., : pages.longest],
            bias=None if options.bias is None else options.bias.detach()[..., : pages.longest],
        )
    starts = layout.query_starts
    queries = Queries(
        q if q.stride(3) == 1 else q.contiguous(),
        _integers(layout.query_counts, q),
        max(layout.query_counts, default=0),
        None if starts is None else _integers(starts, q),
    )
    return attend(queries, pages, options, backend)


def paginate(
    k: Tensor, v: Tensor, layout: Layout, options: ScoreOptions, backend: Backend
) -> PageView:
    """Keys [B, Hkv, Lk, D] and values [B, Hkv, Lk, E] as pages and float parts.

    The first 64 tokens of a sequence (attention sinks) stay as they are, and where values are
    rounded so does what remains after the last full page: few tokens share a channel's scale badly.
    """
    codec = PageCodec(VALUE_CODECS[options.precision])
    fmt = PageFormat(PageCodec("int8"), codec, k.shape[3], v.shape[3], k.element_size())
    k = k if k.stride(3) == 1 else k.contiguous()
    v = v if v.stride(3) == 1 else v.contiguous()
    lengths = np.array(layout.key_counts, np.int64)
    rounds_values = options.precision != "float"
    first = np.minimum(lengths, PAGE)
    last = (lengths - first) % PAGE if rounds_values else np.zeros_like(lengths)
    structure, jobs = _divide(layout, lengths, first, last)
    total = max(len(jobs), 1)
    records = torch.empty((total, k.shape[1], fmt.record_bytes), dtype=torch.uint8, device=k.device)
    index = torch.empty((total, k.shape[1], fmt.index_bytes), dtype=torch.uint8, device=k.device)
    if len(jobs):
        write_pages(k, v, fmt, records, index, torch.from_numpy(jobs).to(k.device), backend)
    table, starts, counts = torch.from_numpy(structure).to(k.device).unbind()
    return PageView(
        fmt, records, index, table, starts, counts,
        _integers((structure[2] > 0).sum(axis=1).tolist(), k), _integers(layout.key_counts, k),
        int(lengths.max(initial=0)),
        *_float_part(k, v, layout, np.zeros_like(first), first),
        *(_float_part(k, v, layout, lengths - last, last) if rounds_values else (None,) * 3),
    )  # fmt: skip


def _divide(
    layout: Layout,
    lengths: NDArray[np.int64],
    first: NDArray[np.int64],
    last: NDArray[np.int64],
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """table, starts and counts as int32 [3, S, P], and jobs int32 [J, 4]."""
    paged = lengths - first - last
    width = max(-(-int(paged.max(initial=0)) // PAGE), 1)
    at = np.arange(width) * PAGE
    counts = np.clip(paged[:, None] - at, 0, PAGE)
    used = counts > 0
    starts = np.where(used, first[:, None] + at, 0)
    table = np.where(used, np.cumsum(used).reshape(used.shape) - 1, 0)
    rows, origin = np.array(layout.batch_rows, np.int64), np.array(layout.key_starts, np.int64)
    jobs = np.stack(
        [
            np.broadcast_to(rows[:, None], used.shape)[used],
            (starts + origin[:, None])[used],
            counts[used],
            table[used],
        ],
        axis=1,
    )
    return np.stack([table, starts, counts]).astype(np.int32), jobs.astype(np.int32)


def _float_part(
    k: Tensor,
    v: Tensor,
    layout: Layout,
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [S, Hkv, 64, ...] of `counts` tokens from `starts`, and the counts."""
    parts = []
    for side in (k, v):
        part = side.new_zeros((len(counts), side.shape[1], PAGE, side.shape[3]))
        for s, (row, origin) in enumerate(zip(layout.batch_rows, layout.key_starts, strict=True)):
            begin, count = origin + int(starts[s]), int(counts[s])
            part[s, :, :count] = side[row, :, begin : begin + count]
        parts.append(part)
    return parts[0], parts[1], _integers(counts.tolist(), k)


def _integers(numbers: list[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=like.device)
