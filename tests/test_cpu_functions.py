"""Elementary functions, float8 and byte transposes of the compiled kernels."""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from lath.kernels.simd import emitter, host_isa, lanes, mathematics
from lath.reference import floats


@intrinsic(prefer_literal=True)
def apply(typing_context, name, source, target, count):  # type: ignore[no-untyped-def]
    """A function of fp32 numbers, sixteen at a time."""

    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        e = emitter.Emitter(builder, host_isa(), native_half=False)
        _, source, target, count = values
        with e.loop(count) as i:
            x = e.load(e.offset(source, i, 64), emitter.FLOATS)
            if name.literal_value == "e4m3 code":
                y = e.to_floats(mathematics.encode_e4m3(e, x))
            elif name.literal_value == "e4m3 number":
                y = mathematics.decode_e4m3(e, e.nearest(x))
            else:
                y = getattr(mathematics, name.literal_value)(e, x)
            e.store(e.offset(target, i, 64), y)
        return context.get_dummy_value()

    return types.void(name, types.int64, types.int64, types.int64), emit


def evaluate(name: str, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    source = np.zeros(-(-x.size // 16) * 16, np.float32)
    source[: x.size] = x
    target = np.zeros_like(source)
    run = numba.njit(lambda a, b, n: apply(name, a, b, n))
    run(source.ctypes.data, target.ctypes.data, source.size // 16)
    return target[: x.size].astype(np.float64)


def test_elementary_functions() -> None:
    x = np.concatenate([-np.logspace(-8, 2.09, 5000), [0, -0.5, -1.5, -126, -127, -np.inf, np.nan]])
    x = x.astype(np.float32)
    want = np.exp2(x.astype(np.float64))
    got = evaluate("exp2", x)
    assert np.array_equal(np.isnan(got), np.isnan(x))
    normal = want >= 2.0**-126
    assert np.abs(got[normal] / want[normal] - 1).max() < 2**-22
    assert not got[(want < 2.0**-126) & ~np.isnan(x)].any()
    assert evaluate("exp2", np.float32([0.0, -3.0])).tolist() == [1.0, 0.125]
    positive = np.concatenate([np.logspace(-37, 38, 5000), [1.0, 2.0, np.sqrt(2), np.sqrt(0.5)]])
    positive = positive.astype(np.float32)
    log = np.log2(positive.astype(np.float64))
    assert np.abs(evaluate("log2", positive) - log).max() < 2**-17
    near = np.linspace(0.7, 1.4, 1001).astype(np.float32)
    assert np.abs(evaluate("log2", near) - np.log2(near.astype(np.float64))).max() < 2**-22
    assert np.isnan(evaluate("log2", np.float32([np.nan]))[0])
    both = np.concatenate([x[:5000], -x[:5000]])
    error = evaluate("tanh", both) - np.tanh(both.astype(np.float64))
    assert np.abs(error).max() < 2**-22


def test_e4m3_numbers() -> None:
    codes = np.array([c for c in range(256) if c & 127 != 127], np.uint8)
    numbers = floats.decode_e4m3(codes)
    assert np.array_equal(evaluate("e4m3 number", codes.astype(np.float32)), numbers)
    assert np.array_equal(
        evaluate("e4m3 code", numbers.astype(np.float32)), codes.astype(np.float64)
    )
    middles = (numbers[:126] + numbers[1:127]) / 2
    x = np.concatenate([np.random.default_rng(0).uniform(-448, 448, 5000), numbers, middles])
    x = np.concatenate([x, x / 2**9]).astype(np.float32)
    assert np.array_equal(evaluate("round_e4m3", x), floats.round_e4m3(x).astype(np.float64))


@intrinsic
def transpose(typing_context, source, target):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, values):  # type: ignore[no-untyped-def]
        e = emitter.Emitter(builder, host_isa(), native_half=False)
        rows = [e.load(e.add(values[0], 16 * i), emitter.BYTES) for i in range(16)]
        for i, column in enumerate(lanes.transpose(e, rows)):
            e.store(e.add(values[1], 16 * i), column)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


def test_transposing_bytes() -> None:
    block = np.arange(256, dtype=np.uint8).reshape(16, 16)
    result = np.zeros_like(block)
    numba.njit(lambda a, b: transpose(a, b))(block.ctypes.data, result.ctypes.data)
    assert np.array_equal(result, block.T)
