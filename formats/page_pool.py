"""Where pages lie: records and index rows of one layer, counted by reference."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lath.formats.pages import PageFormat


class PagePool:
    """Pages by number. A page is free, or held once for each time that `take` or `retain` named it.

    records: uint8 [N, Hkv, record_bytes]. index: uint8 [N, Hkv, index_bytes]. Both are replaced
    when the pool grows (by doubling), so that nothing may keep them across a `take`.
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
        return self.records.nbytes + self.index.nbytes

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
        return taken

    def reserve(self, pages: int) -> None:
        """Room for `pages` pages in all, at least twice the present room if that is not enough."""
        size = len(self.references)
        if pages <= size:
            return
        grown = max(pages, 2 * size)
        for name in ("records", "index"):
            old = getattr(self, name)
            new = old.new_zeros((grown, *old.shape[1:]))
            new[:size] = old
            setattr(self, name, new)
        self.references += [0] * (grown - size)
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
