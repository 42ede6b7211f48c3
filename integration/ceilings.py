"""What this CPU can do at most, measured beside what is compared: bytes read and int8 products."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

# Copies of a weight together exceed any cache met so far (eight times a 32 MB L3).
COLD_BYTES = 256 << 20
READ_BYTES = 16 << 20  # of a call
DOT_ROUNDS = 20_000


@dataclass(frozen=True)
class Ceilings:
    """gb_per_s: a plain read of cold memory. gops: int8 products (and sums) of operands that stay
    in registers, without VNNI in the first-level cache. Both of torch's threads together."""

    gb_per_s: float
    gops: float

    def of_read(self, gb_per_s: float) -> float:
        return gb_per_s / self.gb_per_s

    def of_dots(self, gops: float) -> float:
        return gops / self.gops


class CeilingCalls:
    """Calls to be timed in turn with others, and what their times come to."""

    def __init__(self) -> None:
        from lath.kernels.simd.ceilings import Dots, Read

        threads = torch.get_num_threads()
        unit = READ_BYTES // threads // 4096 * 4096 * threads
        self._read, self._dots = Read(_memory(), unit, threads), Dots(DOT_ROUNDS, threads)

    def calls(self) -> dict[str, Callable[[int], object]]:
        return {"read": self._read, "dots": self._dots}

    def sizes(self) -> dict[str, int]:
        """What one call does: bytes read, operations."""
        return {"read": self._read.nbytes, "dots": self._dots.operations}

    def take(self, seconds: dict[str, list[float]]) -> Ceilings:
        """The medians of `calls()`, whose times are taken out of `seconds`."""
        rates = [
            size / statistics.median(seconds.pop(name)) / 1e9 for name, size in self.sizes().items()
        ]
        return Ceilings(*rates)


@functools.cache
def _memory() -> NDArray[np.uint8]:
    return np.ones(max(COLD_BYTES, READ_BYTES), np.uint8)
