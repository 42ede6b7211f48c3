"""Where pages lie: records and index rows of one layer, counted by reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lath.formats.memory import zeros
from lath.formats.pages import PageFormat


class PagePool:
    """Pages by number. A page is free, or held once for each time that `take` or `retain` named it.

    records: uint8 [N, Hkv, record_bytes]. index: uint8 [N, Hkv, index_bytes]. Both are replaced
    when the pool grows (by doubling), so that nothing may keep them across a `take`. generations:
    how often each page was taken, so that who keeps something of a page knows when it is another.
    side_tables: what selectors keep of each page, by name; constants: what else they keep.
    """

    def __init__(self, fmt: PageFormat, num_kv_heads: int, device: torch.device) -> None:
        self.format = fmt
        self.records = torch.zeros(
            (1, num_kv_heads, fmt.record_bytes), dtype=torch.uint8, device=device
        )
        self.index = torch.zeros(
            (1, num_kv_heads, fmt.index_bytes), dtype=torch.uint8, device=device
        )
        self.references = [0]
        self.generations = [0]
        self.side_tables: dict[str, SideTable] = {}
        self.constants: dict[str, Any] = {}
        self._free = [0]

    @property
    def device(self) -> torch.device:
        return self.records.device

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all KV heads, index included."""
        return (self.format.record_bytes + self.format.index_bytes) * int(self.records.shape[1])

    @property
    def nbytes(self) -> int:
        tables = sum(table.nbytes for table in self.side_tables.values())
        return self.records.nbytes + self.index.nbytes + tables

    @property
    def pages_in_use(self) -> int:
        return len(self.references) - len(self._free)

    def take(self, count: int) -> list[int]:
        """Numbers of `count` free pages, each held once."""
        if count > len(self._free):
            self.reserve(self.pages_in_use + count)
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self.references[page] = 1
            self.generations[page] += 1
        return taken

    def reserve(self, pages: int) -> None:
        """Room for `pages` pages in all, at least twice the present room if that is not enough."""
        size = len(self.references)
        if pages <= size:
            return
        grown = max(pages, 2 * size)
        for name in ("records", "index"):
            old = getattr(self, name)
            new = zeros((grown, *old.shape[1:]), self.device)
            new[:size] = old
            setattr(self, name, new)
        self.references += [0] * (grown - size)
        self.generations += [0] * (grown - size)
        self._free = list(range(grown - 1, size - 1, -1)) + self._free

    def retain(self, pages: Iterable[int]) -> None:
        """Hold each page once more."""
        for page in pages:
            assert self.references[page] > 0, f"page {page} is free"
            self.references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Hold each page once less; one that nobody holds is free."""
        for page in pages:
            assert self.references[page] > 0, f"page {page} is free"
            self.references[page] -= 1
            if self.references[page] == 0:
                self._free.append(page)


class SideTable:
    """A few numbers of each page, worked out once from its record and index row.

    compute: (records uint8 [n, Hkv, ...], index uint8 [n, Hkv, ...]) → a tuple of tensors
    [n, Hkv, ...], the numbers of n pages.
    """

    def __init__(self, compute: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> None:
        self._compute = compute
        self._generations: list[int] = []
        self._tensors: tuple[Tensor, ...] = ()
        self._seen: object = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors)

    def of(
        self, pool: PagePool, pages: Callable[[], Iterable[int]], stamp: object
    ) -> tuple[Tensor, ...]:
        """The tensors [N, Hkv, ...] by page number, good for `pages()`.

        stamp: an object that is another one whenever the pages are others.
        """
        if self._tensors and stamp is self._seen:
            return self._tensors
        self._seen = stamp
        known = self._generations
        known += [-1] * (len(pool.generations) - len(known))
        new = [page for page in set(pages()) if known[page] != pool.generations[page]]
        if new or not self._tensors:
            numbers = torch.tensor(new, dtype=torch.int64, device=pool.device)
            rows = self._compute(pool.records[numbers], pool.index[numbers])
            self._tensors = self._grown(rows, len(pool.generations))
            for tensor, own in zip(self._tensors, rows, strict=True):
                tensor[numbers] = own
            for page in new:
                known[page] = pool.generations[page]
        return self._tensors

    def _grown(self, rows: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
        """Room for `size` pages, with what there was."""
        if self._tensors and self._tensors[0].shape[0] == size:
            return self._tensors
        grown = tuple(row.new_zeros((size, *row.shape[1:])) for row in rows)
        for new, old in zip(grown, self._tensors, strict=False):
            new[: old.shape[0]] = old
        return grown
