"""Where tables are printed. Needs rich."""

from __future__ import annotations

from rich.console import Console


def wide_console() -> Console:
    """A console as wide as its reader: lines that go into a file are not broken at 80 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=160)
