"""Make the Triton interpreter compute what a GPU would compute.

The interpreter of Triton 3.9 gives silently wrong numbers: bf16 arithmetic, `tl.dot` and
reductions work on the raw bit patterns, fp32 -> bf16 truncates, fp8 conversions round wrongly.
`install()` replaces those operations in this process. It also makes three slow paths fast: integer
`tl.dot` (through BLAS, still exact), `tl.reduce` / `tl.associative_scan` with a user's function
(one vector operation per slice instead of one Python call per element), and calls of device
functions (Triton patches all of `triton.language` at each call).

Everything here relies on private names of one Triton release, hence the version check.
`stock_defects()` tells, from a fresh process, which defects that release still has.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton
import triton.language as tl

from tools.inline_assembly import patch_inline_assembly
from tools.narrow_floats import NARROW_FLOATS, Array, decode, encode

KNOWN_VERSIONS = ("3.9.",)
_installed = False


def install(sanitize_overflow: bool = False) -> None:
    """Patch the interpreter of this process; a second call only changes `sanitize_overflow`.

    sanitize_overflow: raise on an integer add, subtract or multiply whose result does not fit
        (costs about twice the time; Triton's default computes this check and then ignores it).
    Raises RuntimeError on a Triton release whose private names are not known, or when triton was
    imported without TRITON_INTERPRET=1.
    """
    global _installed
    if not triton.__version__.startswith(KNOWN_VERSIONS):
        raise RuntimeError(
            f"tools.interpreter knows Triton {', '.join(v + 'x' for v in KNOWN_VERSIONS)}, "
            f"got {triton.__version__}: check its runtime/interpreter.py, then extend the list"
        )
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 in the environment before importing triton")
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(
        builder.options, sanitize_overflow=sanitize_overflow, debug=sanitize_overflow
    )
    if _installed:
        return
    _remember_numpy_types(interpreter)
    _patch_casts(interpreter)
    _patch_elementwise(interpreter)
    _patch_dot(interpreter)
    _patch_reductions(interpreter)
    patch_inline_assembly(interpreter)
    _patch_language_patching(interpreter)
    _silence_numpy(interpreter)
    _installed = True


def stock_defects(timeout: float = 120.0) -> dict[str, bool]:
    """Run the probes of `tools.interpreter_probe` on the unpatched interpreter, in a new process.

    Returns defect name -> whether Triton still has it. When one turns False, Triton has mended it
    and the matching patch here can go.
    """
    tests = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tests)}
    finished = subprocess.run(
        [sys.executable, "-m", "tools.interpreter_probe"],
        env=environment,
        cwd=tests,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if finished.returncode:
        raise RuntimeError(f"the interpreter probe failed: {finished.stderr[-2000:]}")
    defects: dict[str, bool] = json.loads(finished.stdout.splitlines()[-1])
    return defects


def _remember_numpy_types(interpreter: Any) -> None:
    """The lookup Triton type -> NumPy type is hot: every call rebuilds a table of 18 entries."""
    stock = interpreter._get_np_dtype
    pointer_storage = np.dtype(np.uint64)
    table: dict[str, np.dtype[Any]] = {}

    def numpy_type(kind: Any) -> np.dtype[Any]:
        scalar = kind.scalar  # the scalar of a pointer is the pointer itself
        if isinstance(scalar, tl.pointer_type):
            return pointer_storage
        if scalar.name not in table:
            table[scalar.name] = stock(scalar)
        return table[scalar.name]

    interpreter._get_np_dtype = numpy_type


def _patch_casts(interpreter: Any) -> None:
    handle = interpreter.TensorHandle
    builder = interpreter.InterpreterBuilder
    stock_fp_to_fp = builder.create_fp_to_fp
    toward_zero = interpreter._ir.ROUNDING_MODE.RTZ

    def cast_impl(self: Any, source: Any, target_type: Any) -> Any:
        source_kind, target_kind = source.dtype.scalar, target_type.scalar
        values = decode(source.data, source_kind)
        if target_kind in NARROW_FLOATS:
            return handle(encode(values, target_kind), target_kind)
        return handle(values.astype(interpreter._get_np_dtype(target_type)), target_kind)

    def create_fp_to_fp(self: Any, source: Any, target_type: Any, rounding: Any) -> Any:
        if rounding == toward_zero:
            return stock_fp_to_fp(self, source, target_type, rounding)
        return cast_impl(self, source, target_type)

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp


def _patch_elementwise(interpreter: Any) -> None:
    """Elementwise operations on bf16 / fp8: widen to fp32, compute, round once."""
    handle = interpreter.TensorHandle
    builder = interpreter.InterpreterBuilder
    stock_unary, stock_binary = builder.unary_op, builder.binary_op
    stock_ternary, stock_fma = builder.ternary_op, builder.create_fma

    def is_narrow(operand: Any) -> bool:
        return operand.dtype.scalar in NARROW_FLOATS

    def widen(operand: Any) -> Any:
        if not is_narrow(operand):
            return operand
        return handle(decode(operand.data, operand.dtype.scalar), tl.float32)

    def narrow(result: Any, kind: Any) -> Any:
        if result.data.dtype == np.bool_:  # a comparison
            return handle(result.data, tl.int1)
        return handle(encode(result.data, kind), kind)

    def unary_op(self: Any, operand: Any, function: Any) -> Any:
        if not is_narrow(operand):
            return stock_unary(self, operand, function)
        return narrow(stock_unary(self, widen(operand), function), operand.dtype.scalar)

    def binary_op(self: Any, left: Any, right: Any, function: Any) -> Any:
        if not (is_narrow(left) or is_narrow(right)):
            return stock_binary(self, left, right, function)
        return narrow(stock_binary(self, widen(left), widen(right), function), left.dtype.scalar)

    def ternary_op(self: Any, first: Any, second: Any, third: Any, function: Any) -> Any:
        # np.where only moves bit patterns, so it is right as it stands.
        if function is np.where or not is_narrow(third):
            return stock_ternary(self, first, second, third, function)
        result = stock_ternary(self, widen(first), widen(second), widen(third), function)
        return narrow(result, third.dtype.scalar)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not is_narrow(z):
            return stock_fma(self, x, y, z)
        return narrow(stock_fma(self, widen(x), widen(y), widen(z)), z.dtype.scalar)

    builder.unary_op, builder.binary_op = unary_op, binary_op
    builder.ternary_op, builder.create_fma = ternary_op, create_fma


def _integer_matmul(left: Array, right: Array) -> Array:
    """Exact product of int8 matrices, as int32, through floating-point BLAS."""
    # fp32 holds every integer below 2^24: enough if no sum of products can pass it.
    exact = np.float32 if left.shape[-1] * 128 * 128 < 2**24 else np.float64
    product: Array = np.matmul(left.astype(exact), right.astype(exact)).astype(np.int32)
    return product


def _patch_dot(interpreter: Any) -> None:
    """`tl.dot`: exact for integers; exact products and an fp32 sum, rounded once, for floats."""
    handle = interpreter.TensorHandle
    tf32 = interpreter._ir.INPUT_PRECISION.TF32

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        kind = d.dtype.scalar
        if a.dtype.is_int():
            return handle(_integer_matmul(a.data, b.data) + d.data, kind)
        left, right = decode(a.data, a.dtype.scalar), decode(b.data, b.dtype.scalar)
        if precision == tf32 and a.dtype.scalar == tl.float32:
            left = interpreter._round_f32_to_tf32(left)
            right = interpreter._round_f32_to_tf32(right)
        wide = np.float64 if d.data.dtype == np.float64 else np.float32
        product = np.matmul(left.astype(wide, copy=False), right.astype(wide, copy=False))
        total = product + decode(d.data, kind).astype(wide, copy=False)
        if kind in NARROW_FLOATS:
            return handle(encode(total, kind), kind)
        return handle(total.astype(d.data.dtype, copy=False), kind)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _combine_along_axis(
    interpreter: Any, function: Callable[..., Any], slices: Sequence[Array], kinds: Sequence[Any]
) -> list[tuple[Array, ...]]:
    """Running results of `function` over axis 0 of `slices`, one call per step along the axis."""

    def as_tensor(data: Array, kind: Any) -> Any:
        shaped = tl.block_type(kind, list(data.shape))
        return tl.core.tensor(interpreter.TensorHandle(np.ascontiguousarray(data), kind), shaped)

    total = tuple(as_tensor(s[0], kind) for s, kind in zip(slices, kinds, strict=True))
    running = [tuple(t.handle.data for t in total)]
    for step in range(1, slices[0].shape[0]):
        element = (as_tensor(s[step], kind) for s, kind in zip(slices, kinds, strict=True))
        result = function(*total, *element)
        total = tuple(result) if isinstance(result, tuple | tl.core.tuple) else (result,)
        running.append(tuple(t.handle.data for t in total))
    return running


def _leading_axis(data: Array, axis: int | None) -> Array:
    """Move the combined axis to the front; at least two dimensions, so that slices stay arrays."""
    moved = data.reshape(-1) if axis is None else np.moveaxis(data, axis, 0)
    return moved[:, None] if moved.ndim == 1 else moved


def _patch_reductions(interpreter: Any) -> None:
    def generic_reduce(self: Any, inputs: Any) -> list[Any]:
        kinds = [t.dtype for t in inputs]
        slices = [_leading_axis(t.handle.data, self.axis) for t in inputs]
        totals = _combine_along_axis(interpreter, self.combine_fn, slices, kinds)[-1]
        outputs = []
        for total, source, kind in zip(totals, inputs, kinds, strict=True):
            shape = list(source.handle.data.shape)
            if self.axis is None:
                kept = [1] * len(shape)
            else:
                kept = [1 if i == self.axis % len(shape) else s for i, s in enumerate(shape)]
            reduced = [] if self.axis is None else [*shape]
            if reduced:
                del reduced[self.axis]
            result = total.reshape(kept if self.keep_dims else reduced)
            outputs.append(self.to_tensor(result if result.ndim else result.item(), kind))
        return outputs

    def generic_scan(self: Any, inputs: Any) -> list[Any]:
        kinds = [t.dtype for t in inputs]
        slices = [_leading_axis(t.handle.data, self.axis) for t in inputs]
        running = _combine_along_axis(interpreter, self.combine_fn, slices, kinds)
        outputs = []
        for index, (source, kind) in enumerate(zip(inputs, kinds, strict=True)):
            stacked = np.stack([step[index] for step in running])
            result = np.moveaxis(stacked, 0, self.axis) if source.handle.data.ndim > 1 else stacked
            shaped = np.ascontiguousarray(result).reshape(source.handle.data.shape)
            outputs.append(self.to_tensor(shaped, kind))
        return outputs

    interpreter.ReduceOps.generic_reduce = generic_reduce
    interpreter.ScanOps.generic_scan = generic_scan
    _widen_around(interpreter, interpreter.ReduceOps)
    _widen_around(interpreter, interpreter.ScanOps)


def _widen_around(interpreter: Any, operations: Any) -> None:
    """Let one reduce / scan class see fp32 where the kernel has bf16 or fp8."""
    stock = operations.apply_impl

    def widen(operand: Any) -> Any:
        if operand.dtype not in NARROW_FLOATS:
            return operand
        data = decode(operand.handle.data, operand.dtype)
        shaped = tl.block_type(tl.float32, list(data.shape))
        return tl.core.tensor(interpreter.TensorHandle(data, tl.float32), shaped)

    def narrow(result: Any, kind: Any) -> Any:
        if kind not in NARROW_FLOATS or result.dtype != tl.float32:
            return result
        data = encode(result.handle.data, kind)
        shaped = tl.block_type(kind, list(data.shape)) if result.type.is_block() else kind
        return tl.core.tensor(interpreter.TensorHandle(data, kind), shaped)

    def apply_impl(self: Any, inputs: Any) -> Any:
        kinds = [t.dtype for t in inputs]
        if not any(kind in NARROW_FLOATS for kind in kinds):
            return stock(self, inputs)
        result = stock(self, tuple(widen(t) for t in inputs))
        if not isinstance(result, list | tuple):
            return narrow(result, kinds[0])
        # argmax / argmin return (value, index) for one input: the index needs no narrowing.
        padded = kinds + [tl.int32] * (len(result) - len(kinds))
        return [narrow(r, kind) for r, kind in zip(result, padded, strict=True)]

    operations.apply_impl = apply_impl


def _patch_language_patching(interpreter: Any) -> None:
    """Patch `triton.language` once per launch instead of at each call of a device function.

    Triton also never undoes what a device call patched; here the launch's scope undoes all of it.
    """
    stock = interpreter._patch_lang
    empty_scope = interpreter._LangPatchScope
    modules_of: dict[Any, frozenset[str]] = {}
    active_modules: set[str] = set()
    active_scopes: list[Any] = []

    class LaunchScope:
        def restore(self) -> None:
            while active_scopes:
                active_scopes.pop().restore()
            active_modules.clear()

    def patch_lang(function: Any) -> Any:
        modules = modules_of.get(function)
        if modules is None:
            members = [v for v in function.__globals__.values() if inspect.ismodule(v)]
            modules = frozenset(m.__name__ for m in members if m in (tl, tl.core))
            modules_of[function] = modules
        outermost = not active_scopes
        if outermost or not modules <= active_modules:
            active_scopes.append(stock(function))
            active_modules.update(modules)
        return LaunchScope() if outermost else empty_scope()

    interpreter._patch_lang = patch_lang


def _silence_numpy(interpreter: Any) -> None:
    """A GPU does not warn about overflow to infinity or about NaN, and neither should a test."""
    stock = interpreter.GridExecutor.__call__

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        with np.errstate(all="ignore"):
            return stock(self, *arguments, **keywords)

    interpreter.GridExecutor.__call__ = call
