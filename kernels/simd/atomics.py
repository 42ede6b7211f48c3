"""What threads say to each other through memory, and the calls into the system that a waiting
thread makes: intrinsics over int64 at addresses."""

from __future__ import annotations

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_INTEGER = ir.IntType(64)
_POINTER = _INTEGER.as_pointer()
_PAUSES: dict[str, tuple[str, list[ir.Constant]]] = {
    "x86_64": ("llvm.x86.sse2.pause", []),
    "aarch64": ("llvm.aarch64.hint", [ir.Constant(ir.IntType(32), 1)]),
}


@intrinsic
def load_shared(typing_context, address):
    """The int64 that another thread may write; what it wrote before is seen as well."""

    def emit(context, builder, signature, values):
        return builder.load_atomic(builder.inttoptr(values[0], _POINTER), "seq_cst", 8)

    return types.int64(types.int64), emit


@intrinsic
def store_shared(typing_context, address, value):
    """Let others see an int64, and all that was written before."""

    def emit(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], _POINTER)
        builder.store_atomic(values[1], pointer, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def add_shared(typing_context, address, value):
    """Add to an int64; returns what it was."""

    def emit(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], _POINTER)
        return builder.atomic_rmw("add", pointer, values[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def swap_shared(typing_context, address, value):
    """Put an int64 in the place of another; returns that."""

    def emit(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], _POINTER)
        return builder.atomic_rmw("xchg", pointer, values[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def store_integer(typing_context, address, value):
    """Write an int64 that no other thread reads."""

    def emit(context, builder, signature, values):
        builder.store(values[1], builder.inttoptr(values[0], _POINTER))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def copy_bytes(typing_context, target, source, count):
    """memcpy."""

    def emit(context, builder, signature, values):
        byte = ir.IntType(8).as_pointer()
        target, source = (builder.inttoptr(value, byte) for value in values[:2])
        copy = builder.module.declare_intrinsic("llvm.memcpy", [byte, byte, _INTEGER])
        builder.call(copy, [target, source, values[2], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@intrinsic
def pause(typing_context):
    """Tell the core that this thread waits for memory to change."""

    def emit(context, builder, signature, values):
        name, arguments = _PAUSES.get(platform.machine(), ("", []))
        if name:
            kind = ir.FunctionType(ir.VoidType(), [value.type for value in arguments])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def call_system(typing_context, address, a, b, c, d, e):
    """What the C function at an address returns for up to five integers or addresses."""

    def emit(context, builder, signature, values):
        kind = ir.FunctionType(_INTEGER, [_INTEGER] * 5)
        return builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])

    return types.int64(*[types.int64] * 6), emit


@intrinsic
def fetch_line(typing_context, address):
    """Ask for the 64 bytes around an address, which need not exist."""

    def emit(context, builder, signature, values):
        byte, kind = ir.IntType(8).as_pointer(), ir.IntType(32)
        ask = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, *[kind] * 3])
        )
        # To be read, kept in all caches, data.
        numbers = [ir.Constant(kind, number) for number in (0, 3, 1)]
        builder.call(ask, [builder.inttoptr(values[0], byte), *numbers])
        return context.get_dummy_value()

    return types.void(types.int64), emit
