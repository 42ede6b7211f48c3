"""A progress bar that appears only where it is seen: on a terminal, with rich installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

# Called with the number of steps done since the last call.
Advance = Callable[[int], None]


def shows_progress() -> bool:
    """Whether standard error is a terminal."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def progress_bar(description: str, total: int, enabled: bool | None = None) -> Iterator[Advance]:
    """Show `description` and a bar of `total` steps while the block runs; yields `advance(steps)`.

    enabled: None shows it on a terminal only. Without rich, nothing is shown.
    """
    if not (shows_progress() if enabled is None else enabled):
        yield lambda steps: None
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        yield lambda steps: None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    # Transient: the bar leaves no line behind, so what a command prints stays one table.
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda steps: progress.advance(task, steps)
