"""What one sequence holds and where it stands, and the tensors that say so to attention.

The positions of a part (the first float part, a page, the last float part) are a `range` where its
tokens stand one after another, else the ascending positions themselves. Attention takes a part as
one run: the first part from 0, a page from its first position, the last part up to the length.
Where that is not so, tokens are placed wrongly, but still in their order, and all of them before
`exact_from`, where they belong.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Positions = Sequence[int]  # ascending: a range where they are consecutive, else a tuple
NOWHERE = range(0)


def as_positions(ascending: Sequence[int]) -> Positions:
    if isinstance(ascending, range):
        return ascending
    if not ascending:
        return NOWHERE
    if ascending[-1] - ascending[0] == len(ascending) - 1:
        return range(ascending[0], ascending[-1] + 1)
    return tuple(ascending)


def joined(a: Positions, b: Positions) -> Positions:
    """Those of a, then those of b, which all come later."""
    if not a or not b:
        return a or b
    if isinstance(a, range) and isinstance(b, range) and a.stop == b.start:
        return range(a.start, b.stop)
    return (*a, *b)


def below(positions: Positions, limit: int) -> Positions:
    return as_positions(positions[: bisect_left(positions, limit)])


@dataclass
class Span:
    """What one sequence holds: tokens of the first part, pages with counts, tokens of the last.

    length: one more than the last position. starts: position of each page's first token.
    ..._scattered: the positions of a part whose tokens do not stand where attention takes them to,
    else None. Lengths are plain numbers: `torch.compile` can follow a token that is appended.
    """

    length: int = 0
    first: int = 0
    pages: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    last: int = 0
    first_scattered: tuple[int, ...] | None = None
    pages_scattered: list[tuple[int, ...] | None] = field(default_factory=list)
    last_scattered: tuple[int, ...] | None = None

    @property
    def first_at(self) -> Positions:
        """Positions of the first part."""
        return range(self.first) if self.first_scattered is None else self.first_scattered

    @property
    def pages_at(self) -> list[Positions]:
        """Positions of each page."""
        parts = zip(self.starts, self.counts, self.pages_scattered, strict=True)
        return [range(start, start + n) if own is None else own for start, n, own in parts]

    @property
    def last_at(self) -> Positions:
        """Positions of the last part."""
        run = range(self.length - self.last, self.length)
        return run if self.last_scattered is None else self.last_scattered

    @property
    def tokens(self) -> int:
        return self.first + sum(self.counts) + self.last

    @property
    def positions(self) -> list[int]:
        """Of every token held."""
        inside = [position for places in self.pages_at for position in places]
        return [*self.first_at, *inside, *self.last_at]

    @property
    def exact_from(self) -> int:
        """From this position on attention takes every token to stand where it does."""
        if self.last_scattered is not None:
            run = self.last  # the tail's tokens up to the one before the run at its end
            while run and self.last_scattered[run - 1] == self.length - (self.last - run) - 1:
                run -= 1
            return self.length - (self.last - run)
        for own in reversed(self.pages_scattered):
            if own is not None:
                return own[-1] + 1
        return 0 if self.first_scattered is None else self.first_scattered[-1] + 1

    def add_page(self, page: int, places: Positions) -> None:
        self.pages.append(page)
        self.starts.append(places[0])
        self.counts.append(len(places))
        self.pages_scattered.append(None if isinstance(places, range) else tuple(places))

    def _pop_page(self) -> tuple[int, Positions]:
        page, start, count = self.pages.pop(), self.starts.pop(), self.counts.pop()
        scattered = self.pages_scattered.pop()
        return page, range(start, start + count) if scattered is None else scattered

    def clear_pages(self) -> None:
        self.pages, self.starts, self.counts, self.pages_scattered = [], [], [], []

    def place(self, length: int, first: Positions, last: Positions) -> None:
        """Set the length, and where the tokens of the float parts stand."""
        self.length, self.first, self.last = length, len(first), len(last)
        in_order = first == range(len(first))
        self.first_scattered = None if in_order else tuple(first)
        at_the_end = last == range(length - len(last), length)
        self.last_scattered = None if at_the_end else tuple(last)

    def lengthen(self, count: int) -> None:
        """Count tokens of the last part that were added at the end."""
        if self.last_scattered is not None:
            self.last_scattered += tuple(range(self.length, self.length + count))
        self.last += count
        self.length += count

    def skip(self, count: int) -> None:
        """Count positions that hold nothing."""
        self.place(self.length + count, self.first_at, self.last_at)

    def copy(self) -> Span:
        lists = (list(self.pages), list(self.starts), list(self.counts))
        return Span(
            self.length, self.first, *lists, self.last,
            self.first_scattered, list(self.pages_scattered), self.last_scattered,
        )  # fmt: skip

    def cut(self, length: int) -> list[int]:
        """Forget the positions from `length` on; the pages of which nothing is left."""
        gone = []
        while self.pages and self.starts[-1] >= length:
            gone.append(self._pop_page()[0])
        if self.pages:
            page, places = self._pop_page()
            self.add_page(page, below(places, length))
        self.place(length, below(self.first_at, length), below(self.last_at, length))
        return gone


@dataclass
class Structure:
    """The integer tensors of a `PageView`, slices of one buffer: one transfer builds them."""

    buffer: Tensor
    table: Tensor
    starts: Tensor
    counts: Tensor
    page_counts: Tensor
    lengths: Tensor
    first_lengths: Tensor
    last_lengths: Tensor
    exact_from: list[int]  # of each span; it does not change while only tails grow
    derived: dict[str, Any] = field(default_factory=dict)  # what readers work out of the tables

    @staticmethod
    def build(spans: list[Span], device: torch.device) -> Structure:
        width = max((len(span.pages) for span in spans), default=0) or 1
        batch = len(spans)
        wide_rows: list[list[int]] = [[], [], []]
        for span in spans:
            unused = [0] * (width - len(span.pages))
            for row, own in zip(wide_rows, (span.pages, span.starts, span.counts), strict=True):
                row += own + unused
        rows = [len(span.pages) for span in spans] + [span.length for span in spans]
        rows += [span.first for span in spans] + [span.last for span in spans]
        numbers = [*wide_rows[0], *wide_rows[1], *wide_rows[2], *rows]
        buffer = torch.tensor(numbers, dtype=torch.int32).to(device)
        wide, narrow = buffer[: 3 * batch * width], buffer[3 * batch * width :]
        table, starts, counts = wide.view(3, batch, width).unbind()
        page_counts, lengths, first_lengths, last_lengths = narrow.view(4, batch).unbind()
        return Structure(
            buffer, table, starts, counts, page_counts, lengths, first_lengths, last_lengths,
            [span.exact_from for span in spans],
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    def lengthen(self, count: int) -> None:
        """Every sequence's tail grew by `count` tokens."""
        self.lengths.add_(count)
        self.last_lengths.add_(count)
