"""Running a kernel in one thread or in torch's team, over units that each thread takes in turn.

Such a kernel is kernel(thread, threads, arguments): it does the units thread, thread + threads, …
Its argument block of int64 has three fields for this module, at the places `Slots` names.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch

from lath.kernels.simd.compile import call_kernel, callback, kernel_key, load_integer
from lath.kernels.simd.threads import call_getter, torch_team, worker_type


class Slots(NamedTuple):
    """Indices of the fields: address of the kernel, of the functions that say a thread's number and
    how many there are."""

    task: int
    thread: int
    threads: int


def run_units(kernel: Any, block: Any, address: int, units: int, slots: Slots) -> None:
    """kernel: what `compile_kernel` returned. block: int64 fields, writable, at `address`."""
    threads = min(torch.get_num_threads(), units)
    team = torch_team() if threads > 1 else None
    if team is None:
        _entry(kernel)(0, 1, address)
        return
    block[slots.task] = kernel.address
    block[slots.thread], block[slots.threads] = team.number, team.size
    _parallel(team.parallel)(_worker(slots).address, address, threads, 0)


@functools.cache
def _entry(kernel: Any) -> Any:
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(kernel.address)


@functools.cache
def _parallel(address: int) -> Any:
    kinds = [ctypes.c_int64, ctypes.c_int64, ctypes.c_uint, ctypes.c_uint]
    return ctypes.CFUNCTYPE(None, *kinds)(address)


@functools.cache
def _worker(slots: Slots) -> Any:
    """The part of a task that belongs to the thread that calls it."""
    key = kernel_key()
    task, number, count = (8 * slot for slot in slots)

    def work(arguments):
        thread = call_getter(load_integer(arguments + number))
        threads = call_getter(load_integer(arguments + count))
        call_kernel(key, load_integer(arguments + task), thread, threads, arguments)

    return callback(worker_type())(work)
