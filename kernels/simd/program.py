"""A program: kernels that run one after another in a single call, each with its own arguments.

A row of a program is six int64: the address of a kernel(begin, end, arguments), its first unit and
the one behind its last, the address of its arguments, the address of a share (0: the thread that
calls does it alone), and whether all of it must be done before what follows. One thread runs all
units of every row; a team (helpers.py) divides the rows that have a share.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types
from numpy.typing import NDArray
from torch import Tensor

from lath.kernels.simd.compile import driver, kernel_key
from lath.kernels.simd.helpers import team
from lath.kernels.simd.openmp import one_thread
from lath.kernels.simd.team import (
    MOST_PIECES,
    ROW,
    SHARE,
    SHARE_FIELDS,
    TALLY_FIELDS,
    run_rows,
)

Block = NDArray[np.int64]
# What a piece of a row reads, at least: a claim and its answer take about as long as 10 KB. A row
# has at most so many pieces for each thread, and so many rows are divided together.
PIECE_BYTES, PIECES_EACH, ROWS_TOGETHER = 128 << 10, 32, 8


class Output(NamedTuple):
    """What a shared row writes: the field of its arguments that holds the address, bytes of a unit
    and of all. The units' results lie one after another."""

    field: int
    unit_bytes: int
    nbytes: int


class Share:
    """How the units of a row are divided, and what each helper needs of its own.

    block: the arguments, int64. step: units that a kernel does together. cost: bytes that all units
    read, by which they are cut into pieces that a thread claims; 0: each is one. each: the kernel
    takes (unit, units) and not (begin, end). own: fields with the address of memory that a helper
    must not share, with its bytes. memory: by field and address, that memory of the helpers, to be
    used again by shares that never run at the same time.
    """

    def __init__(
        self,
        block: Block,
        output: Output,
        units: int,
        step: int = 1,
        cost: int = 0,
        each: bool = False,
        own: Mapping[int, int] | None = None,
        memory: dict[tuple[int, int], Tensor] | None = None,
    ) -> None:
        self.block, self.output = block, output
        self._steps, self._step, self._cost = max(1, -(-units // step)), step, cost
        self._own = {output.field: output.nbytes, **(own or {})}
        self._memory = {} if memory is None else memory
        self._kept: list[Any] = []
        self._fields = np.zeros(len(SHARE_FIELDS), np.int64)
        self.address = int(self._fields.ctypes.data)
        self._enter(
            units=units, piece=units, each=int(each), block=block.ctypes.data,
            unit_bytes=output.unit_bytes, bytes=output.nbytes,
        )  # fmt: skip
        self.move(int(block[output.field]))

    def _enter(self, **fields: int) -> None:
        for name, value in fields.items():
            self._fields[SHARE[name] // 8] = value

    @property
    def helpers(self) -> int:
        """How many this is prepared for."""
        return int(self._fields[SHARE["helpers"] // 8])

    def move(self, address: int) -> None:
        """Where results belong from now on."""
        self.block[self.output.field] = address
        self._enter(target=address)

    def prepare(self, helpers: int) -> None:
        """Give each helper arguments of its own, those of the block as it is now."""
        blocks = np.tile(self.block, (helpers, 1))
        kept: list[Any] = [blocks]
        for field, size in self._own.items():
            place = (field, int(self.block[field]))
            memory = self._memory.get(place)
            if memory is None or memory.shape[0] < helpers or memory.shape[1] < size:
                with one_thread():  # in a forked process torch's others never answer
                    memory = torch.zeros((helpers, -(-size // 128) * 128), dtype=torch.uint8)
                self._memory[place] = memory
            kept.append(memory)
            blocks[:, field] = memory.data_ptr() + memory.stride(0) * np.arange(helpers)
            if field == self.output.field:
                self._enter(results=memory.data_ptr(), results_stride=memory.stride(0))
        # A helper that lost its core in the middle of a piece may still read the old ones.
        team().leave(*self._kept)
        self._kept = kept
        self._enter(
            blocks=blocks.ctypes.data, stride=blocks.strides[0], helpers=helpers,
            piece=self._step * -(-self._steps // self._pieces(helpers + 1)),
        )  # fmt: skip

    def _pieces(self, threads: int) -> int:
        """How many there should be: as many for each thread, of PIECE_BYTES and more."""
        if self._cost == 0:
            return min(self._steps, MOST_PIECES // ROWS_TOGETHER)
        if self._cost <= PIECE_BYTES:
            return 1
        each = round(self._cost / (threads * PIECE_BYTES))
        return min(threads * max(1, min(each, PIECES_EACH)), MOST_PIECES // ROWS_TOGETHER)


Row = tuple[int, int, int, int, Share | None, int]


class Program:
    """Rows, to be run again and again; what their arguments point to is the caller's to keep.

    tally: int64 of TALLY_FIELDS, counted on by each run that helpers may take part in. again:
    address of an int64 that one of the rows writes: while it is not 0, all rows are run once more
    by the same call; 0: once.
    """

    def __init__(self, rows: Sequence[Row], tally: Block | None = None, again: int = 0) -> None:
        self.tally = np.zeros(len(TALLY_FIELDS), np.int64) if tally is None else tally
        self._shares = [one[4] for one in rows if one[4] is not None]
        numbers = [(*one[:4], 0 if one[4] is None else one[4].address, one[5]) for one in rows]
        self._rows: Block = np.array(numbers, np.int64).reshape(-1, ROW)
        if self._shares:
            _check_regions(rows)
        self._call = (int(self._rows.ctypes.data), len(self._rows), again)
        self._run = serial_runner()
        self._prepared = 0

    def __len__(self) -> int:
        return len(self._rows)

    def run(self, keep: Any = None) -> None:
        """One after another, in as many threads as torch uses. keep: what the arguments point to,
        held as long as a helper may read it."""
        helpers = torch.get_num_threads() - 1 if self._shares else 0
        if helpers and (helpers := team().available(helpers)):
            if helpers > self._prepared:
                for share in self._shares:
                    if share.helpers < helpers:
                        share.prepare(helpers)
                self._prepared = helpers
            team().run(*self._call, helpers, self.tally.ctypes.data, (self, keep))
        else:
            self._run(*self._call)


def _check_regions(rows: Sequence[Row]) -> None:
    """ValueError if a region has too many rows, or no end."""
    together = 0
    for number, (_, _, _, _, share, barrier) in enumerate(rows):
        if share is None and together:
            raise ValueError(f"row {number} has no share, and no barrier before it")
        together = 0 if barrier or share is None else together + 1
        if together >= ROWS_TOGETHER:
            raise ValueError(f"more than {ROWS_TOGETHER} rows up to {number} without a barrier")
    if together:
        raise ValueError("no barrier behind the last row")


class Pieces:
    """Rows and calls of Python, run in their order: rows that follow one another as one program.

    again: as for a Program; it is heeded where nothing of Python is called (`repeats`).
    """

    def __init__(
        self,
        parts: Sequence[Row | Callable[[], None]],
        tally: Block | None = None,
        again: int = 0,
    ) -> None:
        self._calls: list[Callable[[], None] | Program] = []
        self.repeats = again != 0 and not any(map(callable, parts))
        for is_call, group in itertools.groupby(parts, callable):
            members: list[Any] = list(group)
            if not is_call:
                members = [Program(members, tally, again if self.repeats else 0)]
            self._calls += members

    def __len__(self) -> int:
        return len(self._calls)

    def run(self, keep: Any = None) -> None:
        """keep: as for a Program."""
        for call in self._calls:
            if isinstance(call, Program):
                call.run(keep)
            else:
                call()


def row(
    kernel: Any, units: int, arguments: int, share: Share | None = None, barrier: bool = True
) -> Row:
    """The row of a kernel over the units 0 .. units - 1."""
    address = kernel if isinstance(kernel, int) else kernel.address
    return (address, 0, units, arguments, share, int(barrier))


@functools.cache
def serial_runner() -> Any:
    """run(address of the rows, how many, again)."""
    key = kernel_key()

    def run(rows, count, again):
        run_rows(key, rows, count, again)

    return driver(types.void(*[types.int64] * 3))(run)
