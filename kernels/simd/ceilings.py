"""What a core can do at most, as kernels: read memory, and add int8 products in registers.

Both are run by `workers.run_units`: a thread takes its share of the bytes, or its own rounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lath.kernels.simd.arguments import ArgumentBlock
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.emitter import LANES, Emitter
from lath.kernels.simd.isa import host_isa
from lath.kernels.simd.workers import Slots, run_units

FIELDS = ("start", "bytes", "rounds", "out", "task", "thread", "threads")
INDEX = {name: place for place, name in enumerate(FIELDS)}
SLOTS = Slots(INDEX["task"], INDEX["thread"], INDEX["threads"])

VECTOR = 4 * LANES  # bytes
STREAMS = 4  # that a core reads side by side
# Codes times activations: as many sums as hide the latency of a dot and leave registers for both.
WIDE_TILE, NARROW_TILE = (4, 4), (2, 2)
# Bytes that `dot_operands` makes: what the lowerings without VNNI load anew in each round, since a
# product of registers that never change would be taken out of the loop.
OPERANDS = 32


def tile_of_dots() -> tuple[int, int]:
    return WIDE_TILE if host_isa() == "avx512_vnni" else NARROW_TILE


def operations(rounds: int) -> int:
    """Multiplications and additions of `rounds` rounds of one thread."""
    codes, signed = tile_of_dots()
    return 2 * VECTOR * codes * signed * rounds


def emit_read(e: Emitter, thread: Any, threads: Any, arguments: Any) -> None:
    """Sum the thread's share of the bytes at `start` as int lanes."""
    a = ArgumentBlock(e, arguments, INDEX)
    share = e.multiply(e.divide(e.divide(a["bytes"], threads), STREAMS * VECTOR), VECTOR)
    begin = e.add(a["start"], e.multiply(e.multiply(share, STREAMS), thread))
    totals = [e.variable(e.constant(0)) for _ in range(STREAMS)]
    with e.loop(e.divide(share, VECTOR)) as i:
        for n, total in enumerate(totals):
            place = e.add(begin, e.add(e.multiply(share, n), e.multiply(i, VECTOR)))
            total.value = e.builder.add(total.value, e.load(place))
    _keep(e, a, thread, [total.value for total in totals])


def emit_dots(e: Emitter, thread: Any, threads: Any, arguments: Any) -> None:
    """`rounds` rounds of the dots of a tile of codes and activations at `start`."""
    a = ArgumentBlock(e, arguments, INDEX)
    codes, signed = tile_of_dots()
    sums = [[e.variable(e.constant(0)) for _ in range(signed)] for _ in range(codes)]

    def load(row: Any) -> list[Any]:
        place = e.offset(a["start"], row, VECTOR)
        return [e.load(e.add(place, VECTOR * n)) for n in range(codes + signed)]

    fixed = load(e.integer(0)) if e.isa == "avx512_vnni" else None
    with e.loop(a["rounds"]) as i:
        values = load(e.remainder(i, OPERANDS - codes - signed)) if fixed is None else fixed
        for row, code in zip(sums, values[:codes], strict=True):
            for total, x in zip(row, values[codes:], strict=True):
                total.value = e.dot(total.value, code, x, narrow=True)
    _keep(e, a, thread, [total.value for row in sums for total in row])


def _keep(e: Emitter, a: ArgumentBlock, thread: Any, values: list[Any]) -> None:
    """Store the sum of what was computed, or LLVM would leave it out."""
    total = values[0]
    for value in values[1:]:
        total = e.builder.add(total, value)
    e.store(e.offset(a["out"], thread, VECTOR), total)


class Read:
    """A call that sums `nbytes` of `memory` from a place on, with torch's threads."""

    def __init__(self, memory: NDArray[np.uint8], nbytes: int, threads: int) -> None:
        unit = STREAMS * VECTOR * threads
        if nbytes % unit or not 0 < nbytes <= len(memory):
            raise ValueError(
                f"nbytes must be a multiple of {unit} up to {len(memory)}, got {nbytes}"
            )
        self._memory, self.nbytes = memory, nbytes
        self.count = len(memory) // nbytes
        self._out = np.zeros((threads, LANES), np.int32)
        self._block = np.zeros(len(FIELDS), np.int64)
        self._block[INDEX["bytes"]] = nbytes
        self._block[INDEX["out"]] = self._out.ctypes.data
        self._kernel, self._threads = compile_kernel(emit_read), threads

    def __call__(self, i: int) -> None:
        place = i % self.count * self.nbytes
        self._block[INDEX["start"]] = self._memory.ctypes.data + place
        run_units(self._kernel, self._block, self._block.ctypes.data, self._threads, SLOTS)

    @property
    def total(self) -> int:
        """Sum of the 32-bit words of the last call, modulo 2**32."""
        return int(self._out.view(np.uint32).sum(dtype=np.uint64)) % 2**32


class Dots:
    """A call of `rounds` rounds of dots in each of torch's threads."""

    def __init__(self, rounds: int, threads: int) -> None:
        rng = np.random.default_rng(0)
        self.operands = rng.integers(0, 4, (OPERANDS, VECTOR)).astype(np.uint8)
        self._out = np.zeros((threads, LANES), np.int32)
        self._block = np.zeros(len(FIELDS), np.int64)
        for name, value in (
            ("start", self.operands.ctypes.data), ("rounds", rounds),
            ("out", self._out.ctypes.data),
        ):  # fmt: skip
            self._block[INDEX[name]] = value
        self._kernel, self._threads = compile_kernel(emit_dots), threads
        self.operations = operations(rounds) * threads

    def __call__(self, i: int) -> None:
        run_units(self._kernel, self._block, self._block.ctypes.data, self._threads, SLOTS)

    @property
    def sums(self) -> NDArray[np.int32]:
        """The sum over the tile, [threads, 16 lanes]."""
        return self._out
