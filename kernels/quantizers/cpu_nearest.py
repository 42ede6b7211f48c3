"""The entries of a book that are nearest to many vectors, on a CPU: sixteen vectors in the lanes.

What decides is a product of a vector's terms and an entry's, its least: no distance is ever stored,
where a matmul and a search behind it write and read each one.
"""

from __future__ import annotations

import functools
from array import array
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lath.kernels.simd.arguments import ArgumentBlock
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.emitter import F32, FLOATS, I32, LANES, Emitter
from lath.kernels.simd.isa import host_isa
from lath.kernels.simd.workers import Slots, run_units

FIELDS = (
    "vectors",  # address of fp32 [terms, units * registers * LANES]
    "stride",  # bytes from a term to the next
    "entries",  # address of fp32 [count, terms]
    "count",
    "index",  # address of int32, one for each vector
    "units",  # of `registers` times LANES vectors
    "task", "thread_number", "thread_count",
)  # fmt: skip
INDEX = {name: index for index, name in enumerate(FIELDS)}
_SLOTS = Slots(INDEX["task"], INDEX["thread_number"], INDEX["thread_count"])
# Registers for the terms of the vectors side by side: what is left holds the least and its place.
_REGISTERS = 20


def emit_nearest(
    e: Emitter, thread: Any, threads: Any, arguments: Any, terms: int, registers: int
) -> None:
    """This thread's units: every entry against `registers` times sixteen vectors at once."""
    a, b = ArgumentBlock(e, arguments, INDEX), e.builder
    places = range(registers)
    left = e.subtract(e.add(a["units"], e.subtract(threads, 1)), thread)
    with e.loop(e.divide(left, threads)) as turn:
        unit = e.add(thread, e.multiply(turn, threads))
        first = e.offset(a["vectors"], unit, 4 * LANES * registers)
        own = [
            [
                e.load(e.add(e.add(first, e.multiply(a["stride"], t)), 64 * i), FLOATS)
                for t in range(terms)
            ]
            for i in places
        ]
        least = [e.variable(e.floats(float("inf"))) for _ in places]
        found = [e.variable(e.constant(0)) for _ in places]
        with e.loop(a["count"]) as entry:
            row, number = e.offset(a["entries"], entry, 4 * terms), e.splat(b.trunc(entry, I32))
            sums = [e.floats(0.0) for _ in places]
            for t in range(terms):
                value = e.broadcast(e.add(row, 4 * t), F32)
                sums = [e.fma(value, own[i][t], sums[i]) for i in places]
            for i in places:
                less = b.fcmp_ordered("<", sums[i], least[i].value)
                least[i].value = b.select(less, sums[i], least[i].value)
                found[i].value = b.select(less, number, found[i].value)
        at = e.offset(a["index"], unit, 4 * LANES * registers)
        for i in places:
            e.store(e.add(at, 64 * i), found[i].value)


def least_products(vectors: Tensor, entries: Tensor) -> Tensor:
    """int64 [P]: of vectors fp32 [P, T] and entries fp32 [E, T] the entry of the least product, of
    equals the lower. Both on the CPU."""
    terms = vectors.shape[1]
    _check(terms)
    return _run(vectors, entries, terms)


def _run(vectors: Tensor, entries: Tensor, terms: int) -> Tensor:
    registers = max(1, min(4, _REGISTERS // terms))
    count, width = len(vectors), LANES * registers
    units = -(-count // width)
    wide = torch.zeros((terms, units * width))
    wide[:, :count] = vectors.T
    rows, index = entries.contiguous(), torch.empty(units * width, dtype=torch.int32)
    block = array("q", [0] * len(FIELDS))
    for name, value in (
        ("vectors", wide.data_ptr()), ("stride", 4 * units * width), ("units", units),
        ("entries", rows.data_ptr()), ("count", len(rows)), ("index", index.data_ptr()),
    ):  # fmt: skip
        block[INDEX[name]] = value
    if units:
        kernel = compile_kernel(emit_nearest, terms, registers)
        run_units(kernel, block, block.buffer_info()[0], units, _SLOTS)
    return index[:count].long()


@functools.cache
def _check(terms: int) -> None:
    """Small integers through a kernel before its first use: each place must be exact."""
    rng = np.random.default_rng(0)
    vectors, entries = (rng.integers(-7, 8, (size, terms)) for size in (131, 37))
    entries[20:] = entries[:17]  # of equals the lower
    expected = (vectors @ entries.T).argmin(axis=1)
    found = _run(torch.from_numpy(vectors).float(), torch.from_numpy(entries).float(), terms)
    if not np.array_equal(found.numpy(), expected):
        raise RuntimeError(
            f"the compiled CPU kernel of nearest entries, {terms} terms, gave wrong places for "
            f"instruction set {host_isa()!r}; LATH_ISA=portable selects plain code, and a report "
            "would help"
        )
