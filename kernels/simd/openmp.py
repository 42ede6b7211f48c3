"""torch's OpenMP runtime as Python sees it. Nothing here needs numba: a loop over tokens whose step
goes by modules asks for it too."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_RUNTIME = re.compile(r"lib(gomp|iomp5|omp)\b[^/]*\.so[^/]*$")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within it, what this Python thread asks of torch runs in it alone.

    For small operations between two runs of a program: torch's threads spin for some milliseconds
    behind each that is divided, on the cores that the program's helpers are to take.
    """
    limit = _limits()
    if limit is None or torch.get_num_threads() == 1:
        yield
        return
    threads = torch.get_num_threads()
    try:
        limit(1)
        yield
    finally:
        limit(threads)


@functools.cache
def _limits() -> Any:
    """omp_set_num_threads of torch's runtime, which speaks for the calling thread alone."""
    for path in loaded_runtimes():
        function = getattr(ctypes.CDLL(str(path)), "omp_set_num_threads", None)
        if function is not None:
            function.argtypes, function.restype = [ctypes.c_int], None
            return function
    return None


def loaded_runtimes() -> list[Path]:
    """OpenMP libraries in this process, torch's own first."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    lines = maps.read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if _RUNTIME.search(line)}
    home = str(Path(torch.__file__).resolve().parent)
    return [Path(path) for path in sorted(paths, key=lambda p: (not p.startswith(home), p))]
