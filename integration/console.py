"""Where tables are printed. Needs rich."""

from __future__ import annotations

from rich.console import Console


def wide_console() -> Console:
    """A console as wide as its reader: lines that go into a file are not broken at 80 columns.

    What is printed is text: "lath[cpu]" and lists of names are no markup.
    """
    console = Console(markup=False, emoji=False)
    return console if console.is_terminal else Console(width=160, markup=False, emoji=False)
