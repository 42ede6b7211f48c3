"""Kernels over one vector of numbers: a row of the embedding, RMSNorm, function(gate) * up, a sum,
the largest of the logits. Vectors are padded to 16 numbers in memory, all but the embedding's rows
and the logits."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from lath.formats.decode_step import GELU_CUBIC, GELU_SLOPE, Gate
from lath.kernels.decode_step.cpu_arguments import STATE, StateFields, VectorArguments
from lath.kernels.simd import mathematics
from lath.kernels.simd.emitter import F32, FLOATS, FP32, I32, I64, INTS, ITEM_BYTES, LANES, Emitter

VECTOR = 4 * LANES  # bytes of sixteen fp32


def emit_embed(e: Emitter, begin: Any, end: Any, arguments: Any, kind: int) -> None:
    """y = the token's row of weight [V, columns] of type `kind`, as fp32."""
    a = VectorArguments(e, arguments)
    step = ITEM_BYTES[kind]
    token = StateFields(e, a["state"])["token"]
    source = e.add(a["weight"], e.multiply(e.multiply(token, a["columns"]), step))
    with e.loop(e.divide(a["columns"], LANES)) as i:
        value = e.load_floats(e.offset(source, i, LANES * step), kind)
        e.store(e.offset(a["y"], i, VECTOR), value)


def inverse_root(e: Emitter, x: Any, columns: Any, epsilon: Any, kind: int = FP32) -> Any:
    """1 / sqrt(mean x² + epsilon) in every lane; x: address of numbers of type `kind`, a multiple
    of 16 of them."""
    b = e.builder
    total = e.variable(e.floats(0.0))
    with e.loop(e.divide(columns, LANES)) as i:
        value = e.load_floats(e.offset(x, i, LANES * ITEM_BYTES[kind]), kind)
        total.value = e.fma(value, value, total.value)
    mean = b.fdiv(e.sum_of_lanes(total.value), b.sitofp(columns, F32))
    root = b.call(e.function("llvm.sqrt.f32", F32, [F32]), [b.fadd(mean, epsilon)])
    return e.splat(b.fdiv(ir.Constant(F32, 1.0), root))


def emit_normalise(
    e: Emitter, begin: Any, end: Any, arguments: Any, kind: int, x_kind: int
) -> None:
    """y = weight * x / sqrt(mean x² + epsilon), which may be in place; kind, x_kind: types of the
    weight and of x in memory."""
    a = VectorArguments(e, arguments)
    inverse = inverse_root(e, a["x"], a["columns"], a.real("epsilon"), x_kind)
    with e.loop(e.divide(a["columns"], LANES)) as i:
        x = e.load_floats(e.offset(a["x"], i, LANES * ITEM_BYTES[x_kind]), x_kind)
        normed = e.builder.fmul(x, inverse)
        weight = e.load_floats(e.offset(a["weight"], i, LANES * ITEM_BYTES[kind]), kind)
        e.store(e.offset(a["y"], i, VECTOR), e.builder.fmul(weight, normed))


def emit_gate(e: Emitter, begin: Any, end: Any, arguments: Any, function: Gate) -> None:
    """y = function(x) * second: vectors begin .. end - 1."""
    a, b = VectorArguments(e, arguments), e.builder
    with e.loop(e.subtract(end, begin)) as index:
        i = e.add(begin, index)
        x = e.load(e.offset(a["x"], i, VECTOR), FLOATS)
        second = e.load(e.offset(a["second"], i, VECTOR), FLOATS)
        e.store(e.offset(a["y"], i, VECTOR), b.fmul(b.fmul(x, _share(e, x, function)), second))


def _share(e: Emitter, x: Any, function: Gate) -> Any:
    """function(x) / x: a sigmoid, or x itself where it is not negative."""
    b, one, zero = e.builder, e.floats(1.0), e.floats(0.0)
    negative = b.fcmp_ordered("<", x, zero)
    if function == "relu2":
        return b.select(negative, zero, x)
    if function == "gelu_tanh":
        cubic = e.fma(b.fmul(x, x), e.floats(GELU_CUBIC), one)
        x = b.fmul(b.fmul(x, cubic), e.floats(GELU_SLOPE))
    power = mathematics.exp2(e, b.fmul(mathematics.magnitude(e, x), e.floats(-mathematics.LOG2E)))
    return b.fdiv(b.select(negative, power, one), b.fadd(one, power))


def emit_add(e: Emitter, begin: Any, end: Any, arguments: Any) -> None:
    """y = x + second: vectors begin .. end - 1."""
    a = VectorArguments(e, arguments)
    with e.loop(e.subtract(end, begin)) as index:
        i = e.add(begin, index)
        x, second = (e.load(e.offset(a[name], i, VECTOR), FLOATS) for name in ("x", "second"))
        e.store(e.offset(a["y"], i, VECTOR), e.builder.fadd(x, second))


def emit_largest(e: Emitter, begin: Any, end: Any, arguments: Any, kind: int) -> None:
    """token = the place of the largest of `columns` numbers of type `kind`; of equal ones the
    first, and NaN is the largest, as for torch.argmax."""
    a, b = VectorArguments(e, arguments), e.builder
    step = ITEM_BYTES[kind]
    best = e.variable(e.floats(float("-inf")))
    place = e.variable(e.constant(0))
    lane = ir.Constant(INTS, list(range(LANES)))
    whole = e.divide(a["columns"], LANES)
    with e.loop(whole) as i:
        value = e.load_floats(e.offset(a["x"], i, LANES * step), kind)
        better = _better(e, value, best.value)
        best.value = b.select(better, value, best.value)
        at = b.add(e.splat(b.trunc(e.multiply(i, LANES), I32)), lane)
        place.value = b.select(better, at, place.value)
    top = e.variable(ir.Constant(F32, float("-inf")))
    index = e.variable(e.integer(0))
    for n in range(LANES):
        number = ir.Constant(I32, n)
        value = b.extract_element(best.value, number)
        at = b.zext(b.extract_element(place.value, number), I64)
        same = b.and_(_equal(e, value, top.value), e.less(at, index.value))
        better = b.or_(_better(e, value, top.value), same)
        top.value = b.select(better, value, top.value)
        index.value = b.select(better, at, index.value)
    first = e.multiply(whole, LANES)
    with e.loop(e.subtract(a["columns"], first)) as i:
        at = e.add(first, i)
        value = _scalar(e, e.offset(a["x"], at, step), kind)
        better = _better(e, value, top.value)
        top.value = b.select(better, value, top.value)
        index.value = b.select(better, at, index.value)
    e.store(e.add(a["state"], 8 * STATE["token"]), index.value)


def _better(e: Emitter, value: Any, than: Any) -> Any:
    b = e.builder
    first_nan = b.and_(b.fcmp_unordered("uno", value, value), b.fcmp_ordered("ord", than, than))
    return b.or_(b.fcmp_ordered(">", value, than), first_nan)


def _equal(e: Emitter, value: Any, other: Any) -> Any:
    b = e.builder
    both_nan = b.and_(b.fcmp_unordered("uno", value, value), b.fcmp_unordered("uno", other, other))
    return b.or_(b.fcmp_ordered("==", value, other), both_nan)


def _scalar(e: Emitter, address: Any, kind: int) -> Any:
    """The float of type `kind` at an address, without reading behind it."""
    if kind == FP32:
        return e.load(address, F32)
    scratch = e.buffer(1)
    e.store(scratch, e.load(address, ir.IntType(16)))
    return e.builder.extract_element(e.load_floats(scratch, kind), ir.Constant(I32, 0))
