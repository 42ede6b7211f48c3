"""The data of a key-value cache of one layer: pages in a pool, and each sequence's share of them.

A sequence is, in the order of its positions: a first float part (at most 64 tokens, the attention
sinks), pages, and a last float part (fewer than 64 tokens, the tail). A page is written once, when
the tail fills, and never again: what shortens a sequence lowers the number of a page's tokens that
count, for that sequence alone. Positions may have gaps, where tokens were dropped: the length of a
sequence is one more than its last position, whatever it holds. Stores that come from one another by
`fork` share a pool.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lath.formats.attention import PageView
from lath.formats.page_pool import PagePool
from lath.formats.page_span import Positions, Span, Structure, as_positions, joined
from lath.formats.pages import PAGE, PageFormat


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
        self._structure: Structure | None = None

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
        """One more than the last position of each sequence, dropped tokens counted."""
        return [span.length for span in self.spans]

    @property
    def tokens(self) -> list[int]:
        """Tokens that each sequence holds."""
        return [span.tokens for span in self.spans]

    @property
    def page_counts(self) -> list[int]:
        """Entries in the page table of each sequence."""
        return [len(span.pages) for span in self.spans]

    @property
    def exact_from(self) -> list[int]:
        """From this position on (0: everywhere) attention knows where each token of a sequence
        stands. Of earlier ones it knows the order, and that they are earlier."""
        return list(self._current().exact_from)

    @property
    def exact_positions(self) -> bool:
        """Whether attention knows the position of every token: what windows, alibi, bias and masks
        by position need. A page whose tokens do not stand one after another ends it."""
        return not any(self._current().exact_from)

    def __len__(self) -> int:
        """The largest of `lengths`."""
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
        s = self._current()
        kept = self.keep_first
        return PageView(
            self.format, self.pool.records, self.pool.index,
            s.table, s.starts, s.counts, s.page_counts, s.lengths, len(self),
            self.first_keys if kept else None,
            self.first_values if kept else None,
            s.first_lengths if kept else None,
            self.last_keys, self.last_values, s.last_lengths, draft,
        )  # fmt: skip

    @property
    def derived(self) -> dict[str, Any]:
        """What readers work out of the tables of `view`; empty again when they are others."""
        return self._current().derived

    def _current(self) -> Structure:
        if self._structure is None:
            self._structure = Structure.build(self.spans, self.device)
        return self._structure

    # Adding

    def append_tokens(
        self,
        keys: Tensor,
        values: Tensor,
        counts: Sequence[int],
        places: Sequence[Positions] | None = None,
    ) -> None:
        """Add the first counts[s] tokens of keys [B, Hkv, L, D] and values [B, Hkv, L, E].

        Both of the store's dtype and device, last stride 1, already checked. places: ascending
        positions of those tokens from the sequence's length on; None: they follow one another.
        """
        if places is None and self._append_in_step(keys, values, counts):
            return
        heads = [
            self._first_copy(span, n, None if places is None else places[s])
            for s, (span, n) in enumerate(zip(self.spans, counts, strict=True))
        ]
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
        self._account(counts, places, heads, [s for s, _ in from_tail + from_input], pages)

    def _append_in_step(self, keys: Tensor, values: Tensor, counts: Sequence[int]) -> bool:
        """Lengthen every tail alike, as decoding does; False where a sequence needs more."""
        if not counts:
            return True
        count, last = counts[0], self.spans[0].last
        if last + count >= PAGE:
            return False
        for span, n in zip(self.spans, counts, strict=True):
            if n != count or span.last != last or self._first_is_open(span):
                return False
        self.last_keys.narrow(2, last, count).copy_(keys.narrow(2, 0, count))
        self.last_values.narrow(2, last, count).copy_(values.narrow(2, 0, count))
        for span in self.spans:
            span.lengthen(count)
        if self._structure is not None:
            self._structure.lengthen(count)
        return True

    def _first_is_open(self, span: Span) -> bool:
        return self.keep_first and span.length == span.first < PAGE

    def _first_copy(self, span: Span, count: int, places: Positions | None) -> _Copy:
        """The tokens that follow the first part without a gap, while it is not full."""
        taken = min(count, PAGE - span.first) if self._first_is_open(span) else 0
        if places is not None:
            follows = [places[i] == span.first + i for i in range(taken)]
            taken = follows.index(False) if False in follows else taken
        return _Copy(span.first, 0, taken)

    def _account(
        self,
        counts: Sequence[int],
        places: Sequence[Positions] | None,
        heads: list[_Copy],
        owners: list[int],
        pages: list[int],
    ) -> None:
        """Enter what was written into the spans. owners: the sequence of each page, in order."""
        taken: list[list[int]] = [[] for _ in self.spans]
        for s, page in zip(owners, pages, strict=True):
            taken[s].append(page)
        for s, (span, new) in enumerate(zip(self.spans, taken, strict=True)):
            head = heads[s].tokens
            span.first += head
            span.length += head
            if places is None and span.last_scattered is None:
                span.pages += new
                start = span.length - span.last
                span.starts += [start + PAGE * i for i in range(len(new))]
                span.counts += [PAGE] * len(new)
                span.pages_scattered += [None] * len(new)
                span.last += counts[s] - head - PAGE * len(new)
                span.length += counts[s] - head
                continue
            end = span.length + counts[s] - head
            own: Positions = range(span.length, end) if places is None else places[s][head:]
            held = joined(span.last_at, as_positions(own))
            for page in new:
                span.add_page(page, as_positions(held[:PAGE]))
                held = held[PAGE:]
            length = own[-1] + 1 if own else span.length
            span.place(length, span.first_at, as_positions(held))
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
        """Shorten sequence s to the positions 0 .. lengths[s] - 1, 0 <= lengths[s] <= its length.

        Where that ends in a gap, what is appended afterwards still stands at lengths[s].
        """
        for span, length in zip(self.spans, lengths, strict=True):
            if length != span.length:
                self._structure = None
                self.pool.release(span.cut(length))

    def skip(self, counts: Sequence[int]) -> None:
        """Lengthen sequence s by counts[s] positions that hold nothing."""
        for span, count in zip(self.spans, counts, strict=True):
            span.skip(count)
        self._structure = None

    def drop_entries(self, s: int, entries: Iterable[int]) -> None:
        """Forget some entries of the page table of sequence s, and the positions of none."""
        gone = set(entries)
        span = self.spans[s]
        kept = [
            pair for i, pair in enumerate(zip(span.pages, span.pages_at, strict=True))
            if i not in gone
        ]  # fmt: skip
        self.replace_pages(s, kept)

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

    def replace_pages(self, s: int, pages: Iterable[tuple[int, Positions]]) -> None:
        """Give sequence s these pages, each with its tokens' positions; new ones are taken."""
        span, pairs = self.spans[s], list(pages)
        kept = {page for page, _ in pairs}
        self.pool.release([page for page in span.pages if page not in kept])
        span.clear_pages()
        for page, places in pairs:
            span.add_page(page, places)
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
