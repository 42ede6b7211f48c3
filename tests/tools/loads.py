"""How many bytes interpreted kernels load from given tensors; a part of `tools.sanitizer`.

with sanitize(watch={"records": records}) as report:
    launcher(...)
report.loads["records"].bytes, report.loads["records"].lines * LINE
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch

from tools.narrow_floats import Array

# Bytes that a GPU's cache fetches together.
LINE = 128

Program = tuple[int, tuple[int, int, int]]  # number of the launch, indices in its grid


@dataclasses.dataclass
class Loads:
    """Loads of one tensor's memory by all programs.

    bytes: of the elements of each load that its mask admits; loaded twice, counted twice. lines:
    different lines of 128 bytes, counted from the tensor's first, that a program touched, summed
    over programs.
    """

    bytes: int = 0
    lines: int = 0


class Watch:
    """Counts loads from tensors by their memory, through whatever view a kernel got."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.loads = {name: Loads() for name in tensors}
        self._spans: dict[str, tuple[int, int]] = {}
        self._seen: dict[tuple[str, Program], Array] = {}
        for name, tensor in tensors.items():
            if not tensor.is_contiguous():
                raise ValueError(f"watched {name} must be contiguous, got {tensor.stride()}")
            start = tensor.data_ptr()
            self._spans[name] = (start, start + tensor.nbytes)

    def load(self, program: Program, addresses: Array, size: int) -> None:
        """A program read elements of `size` bytes at `addresses` (uint64 [n], aligned)."""
        for name, (start, stop) in self._spans.items():
            inside = addresses[(addresses >= np.uint64(start)) & (addresses < np.uint64(stop))]
            if not inside.size:
                continue
            lines = np.unique((inside - np.uint64(start)) // np.uint64(LINE))
            seen = self._seen.get((name, program))
            total = lines if seen is None else np.union1d(seen, lines)
            self._seen[name, program] = total
            self.loads[name].bytes += inside.size * size
            self.loads[name].lines += total.size - (0 if seen is None else seen.size)
