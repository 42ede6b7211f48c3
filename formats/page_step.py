"""One token at a time into a PageStore whose numbers a kernel writes: places and bookkeeping.

`PageStore.append_tokens` copies numbers and counts them; here the counting stands alone.
"""

from __future__ import annotations

from typing import Literal

from lath.formats.page_span import Span
from lath.formats.page_store import PageStore
from lath.formats.pages import PAGE

Part = Literal["first", "last"]


def open_part(store: PageStore) -> tuple[Part, int]:
    """The float part that takes the next token of a store of one sequence, and the row in it."""
    span = store.spans[0]
    if store.keep_first and span.length == span.first < PAGE:
        return "first", span.first
    return "last", span.last


def is_plain(span: Span) -> bool:
    """Whether all tokens stand one after another."""
    scattered = (span.first_scattered, span.last_scattered, *span.pages_scattered)
    return all(own is None for own in scattered) and span.tokens == span.length


def count_tokens(span: Span, part: Part, count: int) -> None:
    """More tokens of the open part, which stays open; the store's tables are not told."""
    if part == "first":
        span.first += count
    else:
        span.last += count
    span.length += count


def close_page(store: PageStore) -> int:
    """Count the token that fills the last part and make a page of that; returns its number.

    The page's record is still to be written, from the 64 rows of the last part.
    """
    span = store.spans[0]
    assert span.last == PAGE - 1
    (page,) = store.pool.take(1)
    span.add_page(page, range(span.length - span.last, span.length + 1))
    span.last = 0
    span.length += 1
    store.changed()
    return page
