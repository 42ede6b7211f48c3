"""Sharing a kernel's units among the threads that torch itself uses.

torch's intra-operator threads belong to an OpenMP runtime. A second pool would wait for cores on
which torch's threads still spin after their last operation (8 ms a call were seen on two cores), so
a kernel is run by the same runtime, through `GOMP_parallel`, the entry that compilers call for a
parallel region. Each Python thread has its own team there, as for torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lath.kernels.simd.openmp import loaded_runtimes

_INTEGER, _INT = ir.IntType(64), ir.IntType(32)


class Team(NamedTuple):
    """Addresses of `GOMP_parallel`, `omp_get_thread_num` and `omp_get_num_threads`."""

    parallel: int
    number: int
    size: int


@functools.cache
def torch_team() -> Team | None:
    """The entries of torch's OpenMP runtime; None, with a warning, where it has not got them, and
    None in a forked process, where its threads did not come along and calling them never ends."""
    if _forked:
        return None
    for path in loaded_runtimes():
        library = ctypes.CDLL(str(path))
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        if all(hasattr(library, name) for name in names):
            addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in names]
            return Team(*[address.value or 0 for address in addresses])
    warnings.warn(
        "torch's OpenMP runtime offers no GOMP_parallel here: compiled kernels use one thread",
        stacklevel=2,
    )
    return None


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True
    torch_team.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@intrinsic(prefer_literal=True)
def run_team(typing_context, key, parallel, worker, arguments, threads):
    """Call worker(arguments) once in each of `threads` threads and wait. key: `kernel_key()`."""

    def emit(context, builder, signature, values):
        _, parallel, worker, arguments, threads = values
        kinds = [_INTEGER, _INTEGER, _INT, _INT]
        function = builder.inttoptr(parallel, ir.FunctionType(ir.VoidType(), kinds).as_pointer())
        count = builder.trunc(threads, _INT)
        builder.call(function, [worker, arguments, count, ir.Constant(_INT, 0)])
        return context.get_dummy_value()

    return types.void(key, *[types.int64] * 4), emit


@intrinsic
def call_getter(typing_context, address):
    """The int that a C function without arguments returns."""

    def emit(context, builder, signature, values):
        function = builder.inttoptr(values[0], ir.FunctionType(_INT, []).as_pointer())
        return builder.sext(builder.call(function, []), _INTEGER)

    return types.int64(types.int64), emit


def worker_type() -> Any:
    """The numba type of a worker: void(arguments)."""
    return types.void(types.int64)
