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
    """Positions of what one sequence holds, all below `length`, one more than its last position."""

    length: int = 0
    first_at: Positions = NOWHERE
    pages: list[int] = field(default_factory=list)
    pages_at: list[Positions] = field(default_factory=list)
    last_at: Positions = NOWHERE

    @property
    def first(self) -> int:
        """Tokens of the first part."""
        return len(self.first_at)

    @property
    def counts(self) -> list[int]:
        """Tokens of each page."""
        return [len(places) for places in self.pages_at]

    @property
    def starts(self) -> list[int]:
        """Position of each page's first token."""
        return [places[0] for places in self.pages_at]

    @property
    def last(self) -> int:
        """Tokens of the last part."""
        return len(self.last_at)

    @property
    def tokens(self) -> int:
        return len(self.first_at) + len(self.last_at) + sum(map(len, self.pages_at))

    @property
    def positions(self) -> list[int]:
        """Of every token held."""
        inside = [position for places in self.pages_at for position in places]
        return [*self.first_at, *inside, *self.last_at]

    @property
    def exact_from(self) -> int:
        """From this position on attention takes every token to stand where it does."""
        if self.last_at:
            run = len(self.last_at)  # the tail's tokens up to the one before the run at its end
            while run and self.last_at[run - 1] == self.length - (len(self.last_at) - run) - 1:
                run -= 1
            if run:
                return self.length - (len(self.last_at) - run)
        for places in reversed(self.pages_at):
            if not isinstance(places, range):
                return places[-1] + 1
        if self.first_at and self.first_at != range(len(self.first_at)):
            return self.first_at[-1] + 1
        return 0

    def add_page(self, page: int, places: Positions) -> None:
        self.pages.append(page)
        self.pages_at.append(places)

    def copy(self) -> Span:
        return Span(self.length, self.first_at, list(self.pages), list(self.pages_at), self.last_at)

    def cut(self, length: int) -> list[int]:
        """Forget the positions from `length` on; the pages of which nothing is left."""
        gone = []
        self.last_at = below(self.last_at, length)
        while self.pages and self.pages_at[-1][0] >= length:
            gone.append(self.pages.pop())
            self.pages_at.pop()
        if self.pages:
            self.pages_at[-1] = below(self.pages_at[-1], length)
        self.first_at = below(self.first_at, length)
        self.length = length
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
