"""Compiling a kernel once per machine: numba's on-disk cache with a key that is complete.

numba keys a cached function by its own source file, its closure and the CPU. What an intrinsic
emits is invisible to that key, so every kernel is a closure over `kernel_key()`: the instruction
set and a digest of all sources that take part in emission.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from lath.kernels.simd.emitter import Emitter
from lath.kernels.simd.isa import (
    Isa,
    has_native_brain,
    has_native_expand,
    has_native_half,
    has_wide_look_up,
    host_isa,
)

Emission = Callable[..., Any]
_KERNEL_TYPE = types.void(types.int64, types.int64, types.int64)
binding.initialize_native_asmparser()  # some kernels have instructions in an order of their own


@functools.cache
def kernel_key() -> str:
    """Text that changes with the instruction set or any source of the emitted code."""
    here = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted([*here.glob("*.py"), *here.parent.glob("*/cpu*.py")]):
        digest.update(path.read_bytes())
    return f"{host_isa()} {digest.hexdigest()[:16]}"


def isa_of(key: str) -> Isa:
    return key.split()[0]  # type: ignore[return-value]


@functools.cache
def compile_kernel(emission: Emission, *options: int | str) -> Any:
    """The machine code of `emission(emitter, begin, end, arguments, *options)`.

    A kernel works on the units [begin, end) and finds everything else at the address `arguments`.
    Returns an object with the C `address` of the code, which lives as long as the process.
    """
    key, name, text = kernel_key(), f"{emission.__module__}:{emission.__name__}", repr(options)

    # Only text is closed over: it is what numba can tell apart from one process to the next.
    def run(begin, end, arguments):
        emitted(key, name, text, begin, end, arguments)

    return callback(_KERNEL_TYPE)(run)


@intrinsic(prefer_literal=True)
def emitted(typing_context, key, name, options, begin, end, arguments):
    """The body of a kernel: what the emission function `name` emits, inlined here."""

    def emit(context, builder, signature, values):
        module, _, function = name.literal_value.partition(":")
        emission: Emission = getattr(importlib.import_module(module), function)
        isa = isa_of(key.literal_value)
        emitter = Emitter(
            builder,
            isa,
            has_native_half(),
            has_native_brain(isa),
            has_native_expand(isa),
            has_wide_look_up(isa),
        )
        emission(emitter, *values[3:], *ast.literal_eval(options.literal_value))
        return context.get_dummy_value()

    return types.void(key, name, options, types.int64, types.int64, types.int64), emit


def driver(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function that Python calls, for one signature, without the GIL."""
    return _cached(
        lambda cache: numba.njit(signature, cache=cache, nogil=True, error_model="numpy")
    )


def callback(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function that C code calls at its `address`."""
    return _cached(lambda cache: numba.cfunc(signature, cache=cache, error_model="numpy"))


def _cached(decorator: Callable[[bool], Any]) -> Callable[[Callable[..., Any]], Any]:
    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return decorator(True)(function)
        except RuntimeError as error:
            if "cannot cache function" not in str(error):
                raise
            reason = "no folder for them can be written to"
        # A full disk shows after numba has looked, a damaged file when it is read.
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error) or type(error).__name__
        kernel = decorator(False)(function)
        _say_not_kept(reason)
        return kernel

    return compiled


@functools.cache
def _say_not_kept(reason: str) -> None:
    folder = numba.config.CACHE_DIR
    first = f"NUMBA_CACHE_DIR={folder!r}, then" if folder else "NUMBA_CACHE_DIR, which is not set,"
    warnings.warn(
        f"compiled kernels are not kept on disk: {reason}. numba tries {first} "
        f"{Path(__file__).resolve().parent.parent}/*/__pycache__ and the user's cache folder. Each "
        "process compiles anew, which takes some seconds; set NUMBA_CACHE_DIR to a folder that can "
        "be written to",
        stacklevel=4,
    )


@intrinsic(prefer_literal=True)
def call_kernel(typing_context, key, address, begin, end, arguments):
    """Call the kernel at a C address. key: `kernel_key()`, for numba's cache to see."""
    integer = ir.IntType(64)

    def emit(context, builder, signature, values):
        kind = ir.FunctionType(ir.VoidType(), [integer] * 3)
        builder.call(builder.inttoptr(values[1], kind.as_pointer()), values[2:])
        return context.get_dummy_value()

    return types.void(key, *[types.int64] * 4), emit


@intrinsic
def load_integer(typing_context, address):
    """The int64 at an address."""

    def emit(context, builder, signature, values):
        return builder.load(builder.inttoptr(values[0], ir.IntType(64).as_pointer()))

    return types.int64(types.int64), emit
