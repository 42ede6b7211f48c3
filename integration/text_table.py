"""Plain-text tables: columns of equal width, no dependence on a terminal library."""

from __future__ import annotations

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]], left: Sequence[bool]) -> list[str]:
    """Lines of cells, each column as wide as its widest cell and, where `left`, left-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if on_the_left else cell.rjust(width)
            for cell, width, on_the_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    ]
