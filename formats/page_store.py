"""The data of a key-value cache of one layer: pages in a pool, and each sequence's share of them.

A sequence is, in the order of its positions: a first float part (at most 64 tokens, the attention
sinks), pages, and a last float part (fewer than 64 tokens, the tail). A page is written once, when
the tail fills, and never again: what shortens a sequence lowers the number of a page's tokens that
count, for that sequence alone. Stores that come from one another by `fork` share a pool.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lath.formats.attention import PageView
from lath.formats.page_pool import PagePool
from lath.formats.pages import PAGE, PageFormat


@dataclass
class Span:
    """What one sequence holds: tokens of the first part, pages with counts, tokens of the last."""

    first: int = 0
    pages: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    paged: int = 0  # the sum of counts
    last: int = 0

    @property
    def length(self) -> int:
        return self.first + self.paged + self.last

    def add_page(self, page: int, count: int) -> None:
        self.pages.append(page)
        self.counts.append(count)
        self.paged += count

    def copy(self) -> Span:
        return Span(self.first, list(self.pages), list(self.counts), self.paged, self.last)


class _Copy(NamedTuple):
    """`tokens` tokens of the input from `source` on go to `target` .. of a float part."""

    target: int
    source: int
    tokens: int


class PageStore:
    """Pages and float parts of `batch` sequences; `write_pages` is what a subclass brings.

    format: the layout of a page. num_kv_heads, batch: sizes. dtype: of the float parts and of what
    is appended. keep_first: whether the first 64 tokens of a sequence stay in `dtype`.
    """

    def __init__(
        self,
        fmt: PageFormat,
        num_kv_heads: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        keep_first: bool = True,
    ) -> None:
        self.format = fmt
        self.num_kv_heads = num_kv_heads
        self.dtype = dtype
        self.keep_first = keep_first
        self.pool = PagePool(fmt, num_kv_heads, device)
        self.spans = [Span() for _ in range(batch)]
        self.first_keys, self.first_values = self._float_part(batch if keep_first else 0)
        self.last_keys, self.last_values = self._float_part(batch)
        self._structure: _Structure | None = None

    def _float_part(self, batch: int) -> tuple[Tensor, Tensor]:
        shape = (batch, self.num_kv_heads, PAGE)
        return (
            torch.zeros((*shape, self.format.key_dim), dtype=self.dtype, device=self.device),
            torch.zeros((*shape, self.format.value_dim), dtype=self.dtype, device=self.device),
        )

    def write_pages(self, keys: Tensor, values: Tensor, jobs: Tensor) -> None:
        """Write pool records from keys [B, Hkv, L, D] and values [B, Hkv, L, E].

        jobs: int32 [J, 4] on the store's device, each (row b, first token, count, page number).
        """
        raise NotImplementedError("PageStore holds pages; a subclass writes them")

    # What there is

    @property
    def device(self) -> torch.device:
        return self.pool.device

    @property
    def batch(self) -> int:
        return len(self.spans)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [span.length for span in self.spans]

    def __len__(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths, default=0)

    def __bool__(self) -> bool:
        return True  # an empty cache is a cache

    @property
    def nbytes(self) -> int:
        """Bytes allocated: the whole pool (shared with forks), float parts and tables."""
        parts = (self.first_keys, self.first_values, self.last_keys, self.last_values)
        tables = 0 if self._structure is None else self._structure.nbytes
        return self.pool.nbytes + sum(part.nbytes for part in parts) + tables

    @property
    def nbytes_in_use(self) -> int:
        """Bytes of this store's own pages, each counted once, and of its tokens in float parts."""
        pages = {page for span in self.spans for page in span.pages}
        tokens = sum(span.first + span.last for span in self.spans)
        per_token = (self.format.key_dim + self.format.value_dim) * self.dtype.itemsize
        return len(pages) * self.pool.page_bytes + tokens * self.num_kv_heads * per_token

    def view(self, draft: bool = False) -> PageView:
        """What attention reads; good until the store next changes.

        draft: read the upper planes of "int8-planes" alone.
        """
        if self._structure is None:
            self._structure = _Structure.build(self.spans, self.device)
        s = self._structure
        kept = self.keep_first
        return PageView(
            self.format, self.pool.records, self.pool.index,
            s.table, s.starts, s.counts, s.page_counts, s.lengths, len(self),
            self.first_keys if kept else None,
            self.first_values if kept else None,
            s.first_lengths if kept else None,
            self.last_keys, self.last_values, s.last_lengths, draft,
        )  # fmt: skip

    # Adding

    def append_tokens(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> None:
        """Add the first counts[s] tokens of keys [B, Hkv, L, D] and values [B, Hkv, L, E].

        Both of the store's dtype and device, last stride 1, already checked.
        """
        if self._append_in_step(keys, values, counts):
            return
        heads = [self._first_copy(span, n) for span, n in zip(self.spans, counts, strict=True)]
        fills: list[_Copy] = []
        rests: list[_Copy] = []
        from_tail: list[tuple[int, int]] = []
        from_input: list[tuple[int, int]] = []
        for s, (span, n) in enumerate(zip(self.spans, counts, strict=True)):
            done, last = heads[s].tokens, span.last
            if last + n - done < PAGE:
                fills.append(_Copy(last, done, n - done))
                rests.append(_Copy(0, 0, 0))
                continue
            fill = PAGE - last if last else 0
            fills.append(_Copy(last, done, fill))
            if fill:
                from_tail.append((s, 0))
                done += fill
            while n - done >= PAGE:
                from_input.append((s, done))
                done += PAGE
            rests.append(_Copy(0, done, n - done))
        self._copy_in(self.first_keys, self.first_values, keys, values, heads)
        self._copy_in(self.last_keys, self.last_values, keys, values, fills)
        pages = self.pool.take(len(from_tail) + len(from_input))
        try:
            self._write(self.last_keys, self.last_values, from_tail, pages[: len(from_tail)])
            self._write(keys, values, from_input, pages[len(from_tail) :])
        except BaseException:
            self.pool.release(pages)  # nothing was entered yet: the store is as it was
            raise
        self._copy_in(self.last_keys, self.last_values, keys, values, rests)
        self._account(heads, fills, rests, from_tail + from_input, pages)

    def _append_in_step(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> bool:
        """Lengthen every tail alike, as decoding does; False where a sequence needs more."""
        if not counts:
            return True
        count, last = counts[0], self.spans[0].last
        if last + count >= PAGE:
            return False
        for span, n in zip(self.spans, counts, strict=True):
            if n != count or span.last != last or self._first_copy(span, n).tokens:
                return False
        self.last_keys.narrow(2, last, count).copy_(keys.narrow(2, 0, count))
        self.last_values.narrow(2, last, count).copy_(values.narrow(2, 0, count))
        for span in self.spans:
            span.last += count
        if self._structure is not None:
            self._structure.lengthen(count)
        return True

    def _first_copy(self, span: Span, count: int) -> _Copy:
        open_end = self.keep_first and not span.pages and not span.last
        return _Copy(span.first, 0, min(count, PAGE - span.first) if open_end else 0)

    def _account(
        self,
        heads: list[_Copy],
        fills: list[_Copy],
        rests: list[_Copy],
        jobs: list[tuple[int, int]],
        pages: list[int],
    ) -> None:
        """Enter what was written into the spans."""
        for span, head, fill in zip(self.spans, heads, fills, strict=True):
            span.first += head.tokens
            span.last += fill.tokens
        for (s, _), page in zip(jobs, pages, strict=True):
            span = self.spans[s]
            span.add_page(page, PAGE)
            span.last = rests[s].tokens
        self._structure = None

    def _copy_in(
        self,
        to_keys: Tensor,
        to_values: Tensor,
        keys: Tensor,
        values: Tensor,
        copies: list[_Copy],
    ) -> None:
        if not any(copy.tokens for copy in copies):
            return
        batch = len(copies)
        if len(set(copies)) == 1:  # sequences in step: one copy for the batch
            rows = [(0, batch, copies[0])]
        else:
            rows = [(s, 1, copy) for s, copy in enumerate(copies) if copy.tokens]
        for s, many, (target, source, count) in rows:
            for to, tokens in ((to_keys, keys), (to_values, values)):
                if many != batch:
                    to, tokens = to.narrow(0, s, many), tokens.narrow(0, s, many)
                to.narrow(2, target, count).copy_(tokens.narrow(2, source, count))

    def _write(
        self, keys: Tensor, values: Tensor, starts: list[tuple[int, int]], pages: list[int]
    ) -> None:
        if pages:
            rows = [(s, at, PAGE, page) for (s, at), page in zip(starts, pages, strict=True)]
            self.write_pages(
                keys, values, torch.tensor(rows, dtype=torch.int32, device=self.device)
            )

    # Taking away, and rearranging

    def cut(self, lengths: Sequence[int]) -> None:
        """Shorten sequence s to lengths[s] tokens, 0 <= lengths[s] <= its length."""
        for span, length in zip(self.spans, lengths, strict=True):
            excess = span.length - length
            if excess == 0:
                continue
            self._structure = None
            dropped = min(excess, span.last)
            span.last -= dropped
            excess -= dropped
            while excess and span.pages:
                dropped = min(excess, span.counts[-1])
                span.counts[-1] -= dropped
                span.paged -= dropped
                excess -= dropped
                if span.counts[-1] == 0:
                    span.counts.pop()
                    self.pool.release([span.pages.pop()])
            span.first -= excess

    def take_sequences(self, indices: Sequence[int]) -> None:
        """Make sequence i what sequence indices[i] was; the batch becomes len(indices)."""
        spans = [self.spans[i].copy() for i in indices]
        for span in spans:
            self.pool.retain(span.pages)
        for span in self.spans:
            self.pool.release(span.pages)
        self.spans = spans
        rows = torch.tensor(list(indices), dtype=torch.int64, device=self.device)
        if self.keep_first:
            self.first_keys = self.first_keys.index_select(0, rows)
            self.first_values = self.first_values.index_select(0, rows)
        self.last_keys = self.last_keys.index_select(0, rows)
        self.last_values = self.last_values.index_select(0, rows)
        self._structure = None

    def replace_pages(self, s: int, pages: Iterable[tuple[int, int]]) -> None:
        """Make (page number, count) pairs the pages of sequence s; new ones are taken already."""
        span, pairs = self.spans[s], list(pages)
        kept = set(span.pages) & {page for page, _ in pairs}
        self.pool.release([page for page in span.pages if page not in kept])
        span.pages, span.counts, span.paged = [], [], 0
        for page, count in pairs:
            span.add_page(page, count)
        self._structure = None

    def changed(self) -> None:
        """Say that spans were edited: the next view is built anew."""
        self._structure = None

    def adopt(self, other: PageStore) -> None:
        """Become a copy of `other`: its pages shared, its float parts copied."""
        self.pool = other.pool
        self.spans = [span.copy() for span in other.spans]
        for span in self.spans:
            self.pool.retain(span.pages)
        for name in ("first_keys", "first_values", "last_keys", "last_values"):
            setattr(self, name, getattr(other, name).clone())
        self._structure = None

    def move(self, device: torch.device) -> None:
        """Copy the own pages into a pool of one's own on `device`, and the float parts."""
        old = self.pool
        numbers = sorted({page for span in self.spans for page in span.pages})
        self.pool = PagePool(self.format, self.num_kv_heads, device)
        taken = dict(zip(numbers, self.pool.take(len(numbers)), strict=True))
        if numbers:
            source = torch.tensor(numbers, device=old.device)
            target = torch.tensor([taken[number] for number in numbers], device=device)
            self.pool.records[target] = old.records[source].to(device)
            self.pool.index[target] = old.index[source].to(device)
        holders = [[taken[page] for page in span.pages] for span in self.spans]
        for span, pages in zip(self.spans, holders, strict=True):
            self.pool.retain(pages)
            old.release(span.pages)
            span.pages = pages
        self.pool.release(list(taken.values()))  # what `take` counted; the spans hold them now
        for name in ("first_keys", "first_values", "last_keys", "last_values"):
            setattr(self, name, getattr(self, name).to(device))
        self._structure = None

    def __del__(self) -> None:
        # Pages shared with a fork go back to the pool when their last holder does.
        for span in getattr(self, "spans", ()):
            self.pool.release(span.pages)


@dataclass
class _Structure:
    """The integer tensors of a `PageView`, slices of one buffer: one transfer builds them."""

    buffer: Tensor
    table: Tensor
    starts: Tensor
    counts: Tensor
    page_counts: Tensor
    lengths: Tensor
    first_lengths: Tensor
    last_lengths: Tensor

    @staticmethod
    def build(spans: list[Span], device: torch.device) -> _Structure:
        width = max((len(span.pages) for span in spans), default=0) or 1
        batch = len(spans)
        table, starts, counts = [], [], []
        for span in spans:
            unused = [0] * (width - len(span.pages))
            table += span.pages + unused
            counts += span.counts + unused
            position = span.first
            for count in span.counts:
                starts.append(position)
                position += count
            starts += unused
        rows = [len(span.pages) for span in spans] + [span.length for span in spans]
        rows += [span.first for span in spans] + [span.last for span in spans]
        buffer = torch.tensor(table + starts + counts + rows, dtype=torch.int32).to(device)
        wide, narrow = buffer[: 3 * batch * width], buffer[3 * batch * width :]
        return _Structure(
            buffer, *wide.view(3, batch, width).unbind(), *narrow.view(4, batch).unbind()
        )

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    def lengthen(self, count: int) -> None:
        """Every sequence's tail grew by `count` tokens."""
        self.lengths.add_(count)
        self.last_lengths.add_(count)
