"""Running a CPU kernel: the driver that Python calls, for one thread or for several.

A driver copies the argument block, finds scratch for the prepared activations, prepares them and
hands each thread its panels. It holds no state: Python threads may run the same layer at once.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import prange, types
from numpy.typing import NDArray

from lath.kernels.linear.cpu_arguments import FIELDS, INDEX
from lath.kernels.simd.compile import call_kernel, driver, kernel_key, load_integer

_COUNT = len(FIELDS)
_PREPARE, _KERNEL = INDEX["prepare"], INDEX["kernel"]
_FIRST, _PANELS, _UNIT = INDEX["first"], INDEX["panels"], INDEX["unit"]
_GROUPS, _GROUP, _TILE, _ITEM = INDEX["groups"], INDEX["group"], INDEX["tile"], INDEX["item"]
_X, _X_STRIDE, _BIAS, _Y = INDEX["x"], INDEX["x_stride"], INDEX["bias"], INDEX["y"]
_TOKENS, _CODES, _SCALES, _SUMS = (
    INDEX[name] for name in ("tokens", "codes", "scales", "sums")
)  # fmt: skip
_SIGNATURE = types.int64(*[types.int64] * 7)


def argument_block(**fields: int) -> NDArray[np.int64]:
    """An argument block with the given fields set, the others 0."""
    block = np.zeros(_COUNT, np.int64)
    for name, value in fields.items():
        block[INDEX[name]] = value
    return block


@functools.cache
def serial_driver() -> Any:
    """run(block address, x, x_stride, bias, y, tokens, threads = 1); returns nothing of use."""
    return _driver(parallel=False)


@functools.cache
def parallel_driver() -> Any:
    """The same, its panels and tokens shared among threads. Compiled when first needed."""
    import numba

    # Of numba's threading layers, these may be entered by several Python threads at once.
    if numba.config.THREADING_LAYER == "default":
        numba.config.THREADING_LAYER = "threadsafe"
    return _driver(parallel=True)


def _driver(parallel: bool) -> Any:
    # numba's cache does not tell parallel code from serial: the text that is closed over does.
    key = f"{kernel_key()} parallel={parallel}"

    def run(block, x, x_stride, bias, y, tokens, threads):
        arguments = np.empty(_COUNT, np.int64)
        for index in range(_COUNT):
            arguments[index] = load_integer(block + 8 * index)
        arguments[_X] = x
        arguments[_X_STRIDE] = x_stride
        arguments[_BIAS] = bias
        arguments[_Y] = y
        arguments[_TOKENS] = tokens
        address = np.int64(arguments.ctypes.data)
        tile = arguments[_TILE]
        tiles = (tokens + tile - 1) // tile
        side = 4 * tiles * tile * arguments[_GROUPS]
        codes = tiles * tile * arguments[_GROUPS] * arguments[_GROUP] * arguments[_ITEM]
        scratch = np.empty(codes + 2 * side + 64, np.uint8)
        arguments[_CODES] = np.int64(scratch.ctypes.data)
        arguments[_SCALES] = arguments[_CODES] + codes
        arguments[_SUMS] = arguments[_SCALES] + side
        if tiles == 1:
            call_kernel(key, arguments[_PREPARE], 0, tile, address)
        else:
            for thread in prange(threads):
                begin, end = tiles * thread // threads, tiles * (thread + 1) // threads
                call_kernel(key, arguments[_PREPARE], begin * tile, end * tile, address)
        first, panels, unit = arguments[_FIRST], arguments[_PANELS], arguments[_UNIT]
        units = (panels + unit - 1) // unit
        for thread in prange(threads):
            begin, end = units * thread // threads * unit, units * (thread + 1) // threads * unit
            call_kernel(
                key, arguments[_KERNEL], first + begin, first + min(end, panels), address
            )
        # Addresses do not keep arrays alive: numba frees an array behind its last use.
        return arguments[_TOKENS] + scratch[0]

    return driver(_SIGNATURE, parallel)(run)
