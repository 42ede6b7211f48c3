"""A program: kernels that run one after another in a single call, each with its own arguments.

A row of a program is six int64: the address of a kernel(begin, end, arguments), its first unit and
the one behind its last, the address of its arguments, how its units are shared among threads, and
whether the threads wait for each other behind it. One thread runs all units of every row.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from lath.kernels.simd.compile import call_kernel, driver, kernel_key, load_integer

ROW = 6  # int64 of a row


class Program:
    """Rows, to be run again and again; what their arguments point to is the caller's to keep."""

    def __init__(self, rows: Sequence[tuple[int, ...]]) -> None:
        self._rows: NDArray[np.int64] = np.array(rows, np.int64).reshape(-1, ROW)
        self._call = (self._rows.ctypes.data, len(self._rows))
        self._run = serial_runner()

    def __len__(self) -> int:
        return len(self._rows)

    def run(self) -> None:
        self._run(*self._call)


class Pieces:
    """Rows and calls of Python, run in their order: rows that follow one another as one program."""

    def __init__(self, parts: Sequence[tuple[int, ...] | Callable[[], None]]) -> None:
        self._calls: list[Callable[[], None]] = []
        for is_call, group in itertools.groupby(parts, callable):
            members: list[Any] = list(group)
            self._calls += members if is_call else [Program(members).run]

    def __len__(self) -> int:
        return len(self._calls)

    def run(self) -> None:
        for call in self._calls:
            call()


def row(kernel: Any, units: int, arguments: int) -> tuple[int, ...]:
    """The row of a kernel over the units 0 .. units - 1."""
    return (kernel if isinstance(kernel, int) else kernel.address, 0, units, arguments, 0, 1)


@functools.cache
def serial_runner() -> Any:
    """run(address of the rows, how many)."""
    key = kernel_key()

    def run(rows, count):
        for i in range(count):
            at = rows + 8 * ROW * i
            call_kernel(
                key, load_integer(at), load_integer(at + 8), load_integer(at + 16),
                load_integer(at + 24),
            )  # fmt: skip

    return driver(types.void(types.int64, types.int64))(run)
