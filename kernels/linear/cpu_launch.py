"""Running a CPU kernel: the driver that Python calls, for one thread or for several.

A driver copies the argument block, finds scratch for the prepared activations, prepares them and
runs the kernel. It holds no state: Python threads may run the same layer at once.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import types
from numba.extending import register_jitable
from numpy.typing import NDArray

from lath.kernels.linear.cpu_arguments import FIELDS, INDEX
from lath.kernels.simd.compile import (
    call_kernel,
    callback,
    driver,
    kernel_key,
    load_integer,
)
from lath.kernels.simd.threads import call_getter, run_team, torch_team, worker_type

_COUNT = len(FIELDS)
_PREPARE, _KERNEL = INDEX["prepare"], INDEX["kernel"]
_PANELS, _UNIT = INDEX["panels"], INDEX["unit"]
_GROUPS, _GROUP, _TILE, _ITEM = INDEX["groups"], INDEX["group"], INDEX["tile"], INDEX["item"]
_X, _X_STRIDE, _BIAS, _Y = INDEX["x"], INDEX["x_stride"], INDEX["bias"], INDEX["y"]
_TOKENS, _CODES = INDEX["tokens"], INDEX["codes"]
_SCALES, _SUMS = INDEX["scales"], INDEX["sums"]
_SCRATCH, _EXPANDED = INDEX["scratch"], INDEX["expanded"]
_TASK, _TASK_FIRST = INDEX["task"], INDEX["task_first"]
_TASK_LIMIT, _TASK_STEP = INDEX["task_limit"], INDEX["task_step"]
_NUMBER, _THREADS = INDEX["thread_number"], INDEX["thread_count"]


def argument_block(**fields: int) -> NDArray[np.int64]:
    """An argument block with the given fields set, the others 0."""
    block = np.zeros(_COUNT, np.int64)
    for name, value in fields.items():
        block[INDEX[name]] = value
    return block


def run_on_team(
    block: int, x: int, stride: int, bias: int, y: int, tokens: int, threads: int
) -> None:
    """As `serial_driver`, with the work shared among `threads` threads where torch has a team."""
    team = torch_team()
    if team is None:
        serial_driver()(block, x, stride, bias, y, tokens)
    else:
        team_driver()(block, x, stride, bias, y, tokens, threads, _share().address, *team)


@functools.cache
def serial_driver() -> Any:
    """run(block address, x, x_stride, bias, y, tokens): one thread. Returns nothing of use."""
    key = kernel_key()

    def run(block, x, x_stride, bias, y, tokens):
        arguments = np.empty(_COUNT, np.int64)
        size = _fill(arguments, block, x, x_stride, bias, y, tokens, 1)
        scratch = np.empty(size, np.uint8)
        address = _place(arguments, scratch)
        tile = arguments[_TILE]
        padded = (tokens + tile - 1) // tile * tile
        call_kernel(key, arguments[_PREPARE], 0, padded, address)
        call_kernel(key, arguments[_KERNEL], 0, arguments[_PANELS], address)
        # An address does not keep an array alive: numba frees it behind its last use.
        return arguments[0] + scratch[0]

    return driver(types.int64(*[types.int64] * 6))(run)


@functools.cache
def team_driver() -> Any:
    """run(block address, x, x_stride, bias, y, tokens, threads, worker, *team)."""
    key = kernel_key()

    def run(block, x, x_stride, bias, y, tokens, threads, worker, parallel, number, count):
        arguments = np.empty(_COUNT, np.int64)
        size = _fill(arguments, block, x, x_stride, bias, y, tokens, threads)
        scratch = np.empty(size, np.uint8)
        address = _place(arguments, scratch)
        arguments[_NUMBER], arguments[_THREADS] = number, count
        tile = arguments[_TILE]
        padded = (tokens + tile - 1) // tile * tile
        if padded == tile:
            call_kernel(key, arguments[_PREPARE], 0, padded, address)
        else:
            _deal(arguments, arguments[_PREPARE], 0, padded, tile)
            run_team(key, parallel, worker, address, threads)
        _deal(arguments, arguments[_KERNEL], 0, arguments[_PANELS], arguments[_UNIT])
        run_team(key, parallel, worker, address, threads)
        return arguments[0] + scratch[0]

    return driver(types.int64(*[types.int64] * 11))(run)


@functools.cache
def _share() -> Any:
    """The part of a task that belongs to the thread that calls it: worker(arguments)."""
    key = kernel_key()

    def share(arguments):
        first = load_integer(arguments + 8 * _TASK_FIRST)
        limit = load_integer(arguments + 8 * _TASK_LIMIT)
        step = load_integer(arguments + 8 * _TASK_STEP)
        number = call_getter(load_integer(arguments + 8 * _NUMBER))
        threads = call_getter(load_integer(arguments + 8 * _THREADS))
        steps = (limit - first + step - 1) // step
        begin = first + steps * number // threads * step
        end = min(limit, first + steps * (number + 1) // threads * step)
        if begin < end:
            call_kernel(key, load_integer(arguments + 8 * _TASK), begin, end, arguments)

    return callback(worker_type())(share)


@register_jitable
def _fill(arguments, block, x, x_stride, bias, y, tokens, threads):
    """Fill in the fields of a call; returns the bytes of scratch that it needs."""
    for index in range(_COUNT):
        arguments[index] = load_integer(block + 8 * index)
    arguments[_X], arguments[_X_STRIDE] = x, x_stride
    arguments[_BIAS], arguments[_Y], arguments[_TOKENS] = bias, y, tokens
    tile = arguments[_TILE]
    groups = (tokens + tile - 1) // tile * tile * arguments[_GROUPS]
    codes, side = groups * arguments[_GROUP] * arguments[_ITEM], 4 * groups
    arguments[_CODES], arguments[_SCALES], arguments[_SUMS] = 0, codes, codes + side
    arguments[_SCRATCH] = codes + 2 * side
    return codes + 2 * side + threads * arguments[_EXPANDED] + 64


@register_jitable
def _place(arguments, scratch):
    """Turn the offsets of the prepared activations into addresses; returns the block's own."""
    start = np.int64(scratch.ctypes.data)
    arguments[_CODES] += start
    arguments[_SCALES] += start
    arguments[_SUMS] += start
    arguments[_SCRATCH] += start
    return np.int64(arguments.ctypes.data)


@register_jitable
def _deal(arguments, task, first, limit, step):
    arguments[_TASK], arguments[_TASK_STEP] = task, step
    arguments[_TASK_FIRST], arguments[_TASK_LIMIT] = first, limit
