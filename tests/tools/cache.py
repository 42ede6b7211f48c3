"""The kept folder of compiled kernels and of what was read from their machine code."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import triton


def cache_folder() -> Path:
    """LATH_CACHE_DIR, or ~/.cache/lath/aot; created if missing."""
    folder = Path(os.environ.get("LATH_CACHE_DIR") or Path.home() / ".cache" / "lath" / "aot")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def triton_cache() -> Iterator[None]:
    """Keep Triton's own compile cache in our folder, unless TRITON_CACHE_DIR says otherwise."""
    with triton.knobs.cache.scope():
        if "TRITON_CACHE_DIR" not in os.environ:
            triton.knobs.cache.dir = str(cache_folder() / "triton")
        yield


def remember(kind: str, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`compute()`, or the JSON object that an earlier call stored under (kind, key)."""
    path = cache_folder() / kind / key[:2] / f"{key}.json"
    if path.exists():
        stored: dict[str, Any] = json.loads(path.read_text())
        return stored
    value = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: another test process may read at the same moment.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(value, file)
    os.replace(file.name, path)
    return value
