"""Memory, initialisation, race, order and overflow checks for Triton kernels, on a CPU.

    with sanitize() as report:
        launcher(x, weight)              # any number of launches, in the interpreter
    report.assert_clean()

The interpreter runs one program at a time and addresses real memory, so each access can be compared
with the tensor that its pointer came from before it happens: a bad access is counted and dropped,
it never touches the heap. See `Report` for the list of checks and `sanitize` for the
switches. Works with and without `tools.interpreter.install()`; call that one first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
import triton.language as tl

from tools.loads import Loads, Watch
from tools.narrow_floats import Array, spoiling_value
from tools.sanitizer_memory import Accesses, ArgumentSpans, FreshMemory

FAULTS = (
    "out_of_bounds_reads",
    "out_of_bounds_writes",
    "races",
    "undefined_lanes",
    "uninitialised_reads",
    "overflows",
)


@dataclasses.dataclass
class Report:
    """What a `sanitize` block saw. Counts are elements, except `races` (addresses) and `overflows`
    (operations).

    out_of_bounds_reads / out_of_bounds_writes: outside the tensor that the pointer came from
        (atomics count as writes).
    races: addresses that two programs store to with different values, or that one program stores
        and another loads (the latter only in launches without atomics, which may synchronise).
    undefined_lanes: lanes masked off in a `tl.load` without `other`: undefined on a GPU.
    uninitialised_reads: read from a `torch.empty` of this block before anything wrote there.
    overflows: integer add, subtract, multiply beyond their type.
    examples: the first occurrence of each kind of fault in each kernel, in words.
    loads: of the tensors that `sanitize` was to watch, by their names.
    moved: bytes that each kernel loaded and stored, elements that masks admit; atomics not.
    """

    out_of_bounds_reads: int = 0
    out_of_bounds_writes: int = 0
    races: int = 0
    undefined_lanes: int = 0
    uninitialised_reads: int = 0
    overflows: int = 0
    launches: int = 0
    programs: int = 0
    examples: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    loads: dict[str, Loads] = dataclasses.field(default_factory=dict)
    moved: dict[str, int] = dataclasses.field(default_factory=dict)

    def bad(self) -> dict[str, int]:
        """Fault name -> count, only those that occurred; empty if clean."""
        return {name: getattr(self, name) for name in FAULTS if getattr(self, name)}

    def assert_clean(self, allow: Collection[str] = ()) -> None:
        """Raise AssertionError with one line unless no fault (but those in `allow`) occurred.

        A block without a launch is not clean: it checked nothing.
        """
        unknown = set(allow) - set(FAULTS)
        if unknown:
            raise ValueError(f"allow must hold names of {FAULTS}, got {sorted(unknown)}")
        if not self.launches:
            raise AssertionError("sanitize: no kernel was launched in the interpreter")
        faults = {name: count for name, count in self.bad().items() if name not in allow}
        if faults:
            raise AssertionError(f"sanitize: {self.describe(faults)}")

    def move(self, kernel: str, nbytes: int) -> None:
        """Count bytes that a kernel loaded or stored."""
        self.moved[kernel] = self.moved.get(kernel, 0) + nbytes

    def describe(self, faults: dict[str, int] | None = None) -> str:
        """One line: counts, then an example of each."""
        faults = self.bad() if faults is None else faults
        if not faults:
            return f"clean ({self.launches} launches, {self.programs} programs)"
        counts = ", ".join(f"{count} {name}" for name, count in faults.items())
        shown = [text for (name, _), text in self.examples.items() if name in faults]
        return "; ".join([counts, *shown])

    def add(self, fault: str, count: int, kernel: str, text: str) -> None:
        """Count a fault; keep `text` if it is the first of its kind in this kernel."""
        setattr(self, fault, getattr(self, fault) + count)
        self.examples.setdefault((fault, kernel), f"{kernel}: {text}")


@contextlib.contextmanager
def sanitize(
    poison: bool = True,
    memory: bool = True,
    order: int | Literal["reverse"] | None = None,
    overflow: bool = True,
    races: bool = True,
    bounds: Literal["view", "storage"] = "view",
    watch: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[Report]:
    """Check every interpreted launch in this block; everything is restored at its end.

    poison: fill undefined lanes, and each `torch.empty` made on the CPU in the block, with NaN
        (integers: a large number; bytes 0xFF), so that a result that depends on them shows it.
    memory: check addresses (and drop bad accesses) and reads of uninitialised memory.
    order: run the programs of each grid backwards ("reverse") or shuffled with this seed; a
        deterministic kernel gives the same bits in every order.
    overflow: count integer overflows (also turns `tl.device_assert` on).
    races: compare the stores and loads of different programs.
    bounds: what an argument lets the kernel touch: the extent of the tensor itself, gaps between
        its strides included ("view"), or the whole storage behind it ("storage").
    watch: contiguous tensors by name, whose loads `Report.loads` counts.
    """
    from triton.runtime import interpreter

    counter = Watch(watch or {})
    report = Report(loads=counter.loads)
    hooks = _Hooks(interpreter, report, poison, memory, races, bounds, counter)
    builder = interpreter.interpreter_builder
    kind = type(builder)
    with contextlib.ExitStack() as undo:
        undo.enter_context(hooks.fresh)
        for owner, name, replacement in (
            (interpreter.GridExecutor, "_init_args_hst", hooks.init_arguments()),
            (interpreter.GridExecutor, "__call__", hooks.launch()),
            (interpreter, "_implicit_cvt", hooks.convert_argument()),
            (kind, "create_masked_load", hooks.masked_load()),
            (kind, "create_masked_store", hooks.masked_store()),
            (kind, "create_atomic_rmw", hooks.atomic_rmw()),
            (kind, "create_atomic_cas", hooks.atomic_cas()),
            (kind, "set_grid_dim", _counting_grid(kind, report)),
        ):
            _replace(undo, owner, name, replacement)
        if order is not None:
            _replace(undo, kind, "set_grid_idx", _reordered_index(kind, order))
        if overflow:
            checked = dataclasses.replace(builder.options, debug=True, sanitize_overflow=True)
            _replace(undo, builder, "options", checked)
            _replace(undo, kind, "create_assert", hooks.assertion())
        yield report


def _replace(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _counting_grid(kind: Any, report: Report) -> Any:
    stock = kind.set_grid_dim

    def set_grid_dim(self: Any, *sizes: int) -> None:
        report.programs += math.prod(sizes)
        stock(self, *sizes)

    return set_grid_dim


def _reordered_index(kind: Any, order: int | Literal["reverse"]) -> Any:
    """`set_grid_idx` that maps the interpreter's fixed order onto another one."""
    stock = kind.set_grid_idx
    sequences: dict[int, list[int]] = {}

    def sequence(count: int) -> list[int]:
        if count not in sequences:
            indices = list(range(count))
            if order == "reverse":
                indices.reverse()
            else:
                random.Random(order).shuffle(indices)
            sequences[count] = indices
        return sequences[count]

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        nx, ny, nz = self.grid_dim
        rest, new_z = divmod(sequence(nx * ny * nz)[(x * ny + y) * nz + z], nz)
        new_x, new_y = divmod(rest, ny)
        stock(self, new_x, new_y, new_z)

    return set_grid_idx


class _Hooks:
    """The replacements of the interpreter's memory operations, and the state of one launch."""

    def __init__(
        self,
        interpreter: Any,
        report: Report,
        poison: bool,
        memory: bool,
        races: bool,
        bounds: Literal["view", "storage"],
        counter: Watch,
    ) -> None:
        self.interpreter = interpreter
        self.report = report
        self.poison, self.memory, self.races, self.bounds = poison, memory, races, bounds
        self.fresh = FreshMemory(fill=poison, track=memory)
        self.counter = counter
        self.kernel = "?"
        self.spans = ArgumentSpans(bounds)
        self.accesses = Accesses()

    def handle(self, data: Array, kind: Any) -> Any:
        return self.interpreter.TensorHandle(data, kind)

    def element_size(self, pointers: Any) -> int:
        return int(self.interpreter._get_np_dtype(pointers.get_element_ty()).itemsize)

    def allowed(self, fault: str, builder: Any, pointers: Any, mask: Any) -> tuple[Any, Array]:
        """Pointers without tags, and the lanes of `mask` that address what they may.

        The other lanes are reported as `fault`.
        """
        lanes = np.broadcast_to(mask, pointers.data.shape)
        if not self.memory:
            return pointers, lanes
        size = self.element_size(pointers)
        addresses, inside = self.spans.check(pointers.data, size)
        outside = lanes & ~inside
        count = int(outside.sum())
        if count:
            place = self.spans.locate(int(pointers.data[outside][0]), size)
            text = f"{fault} at {place} in program {builder.grid_idx}"
            self.report.add(fault, count, self.kernel, text)
        return self.handle(addresses, pointers.dtype), lanes & inside

    def init_arguments(self) -> Any:
        stock = self.interpreter.GridExecutor._init_args_hst

        def _init_args_hst(executor: Any, arguments: Any, keywords: Any) -> Any:
            positional, named = stock(executor, arguments, keywords)
            self.kernel = executor.fn.__name__
            self.spans = ArgumentSpans(self.bounds)
            for name, value in [*zip(executor.arg_names, positional), *named.items()]:  # noqa: B905
                self.spans.add(name, value)
            return positional, named

        return _init_args_hst

    def convert_argument(self) -> Any:
        stock = self.interpreter._implicit_cvt

        def _implicit_cvt(argument: Any) -> Any:
            converted = stock(argument)
            if self.memory and hasattr(argument, "data_ptr"):
                converted.handle.data = converted.handle.data | self.spans.tag(argument)
            return converted

        return _implicit_cvt

    def launch(self) -> Any:
        stock = self.interpreter.GridExecutor.__call__

        def __call__(executor: Any, *arguments: Any, **keywords: Any) -> Any:
            self.accesses = Accesses()
            self.report.launches += 1
            try:
                with self.fresh.paused():
                    return stock(executor, *arguments, **keywords)
            finally:
                for text, address, size in self.accesses.races():
                    place = self.spans.locate(address, size)
                    self.report.add("races", 1, self.kernel, f"race at {place}: {text}")

        return __call__

    def masked_load(self) -> Any:
        stock = self.interpreter.InterpreterBuilder.create_masked_load

        def create_masked_load(
            builder: Any, pointers: Any, mask: Any, other: Any, *rest: Any
        ) -> Any:
            pointers, lanes = self.allowed("out_of_bounds_reads", builder, pointers, mask.data)
            addresses, size = pointers.data[lanes], self.element_size(pointers)
            self.counter.load((self.report.launches, builder.grid_idx), addresses, size)
            self.report.move(self.kernel, addresses.size * size)
            if self.memory:
                unwritten = self.fresh.unwritten(addresses)
                if unwritten.size:
                    place = self.spans.locate(int(unwritten[0]), size)
                    text = f"read of uninitialised {place} in program {builder.grid_idx}"
                    self.report.add("uninitialised_reads", unwritten.size, self.kernel, text)
            if self.races:
                self.accesses.load(builder.grid_idx, addresses, size)
            result = stock(builder, pointers, self.handle(lanes, tl.int1), other, *rest)
            wanted = np.broadcast_to(mask.data, pointers.data.shape)
            if other is None and not wanted.all():
                count = int((~wanted).sum())
                text = f"masked load without `other` in program {builder.grid_idx}"
                self.report.add("undefined_lanes", count, self.kernel, text)
                if self.poison:
                    kind = pointers.get_element_ty()
                    spoiled = np.where(wanted, result.data, spoiling_value(result.data, kind))
                    result = self.handle(spoiled, kind)
            return result

        return create_masked_load

    def masked_store(self) -> Any:
        stock = self.interpreter.InterpreterBuilder.create_masked_store

        def create_masked_store(
            builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any
        ) -> Any:
            pointers, lanes = self.allowed("out_of_bounds_writes", builder, pointers, mask.data)
            size = self.element_size(pointers)
            self.fresh.written(pointers.data[lanes], size)
            self.report.move(self.kernel, int(lanes.sum()) * size)
            if self.races:
                values = np.broadcast_to(value.data, pointers.data.shape)[lanes]
                self.accesses.store(builder.grid_idx, pointers.data[lanes], size, values)
            return stock(builder, pointers, value, self.handle(lanes, tl.int1), *rest)

        return create_masked_store

    def atomic_rmw(self) -> Any:
        stock = self.interpreter.InterpreterBuilder.create_atomic_rmw

        def create_atomic_rmw(
            builder: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any
        ) -> Any:
            pointers, lanes = self.allowed("out_of_bounds_writes", builder, pointers, mask.data)
            self.accesses.atomics = True
            self.fresh.written(pointers.data[lanes], self.element_size(pointers))
            allowed = self.handle(lanes, tl.int1)
            return stock(builder, operation, pointers, value, allowed, *rest)

        return create_atomic_rmw

    def atomic_cas(self) -> Any:
        stock = self.interpreter.InterpreterBuilder.create_atomic_cas

        def create_atomic_cas(builder: Any, pointers: Any, compare: Any, *rest: Any) -> Any:
            pointers, lanes = self.allowed("out_of_bounds_writes", builder, pointers, True)
            self.accesses.atomics = True
            if not lanes.all():  # the operation has no mask: skip it rather than corrupt memory
                return self.handle(np.zeros_like(compare.data), compare.dtype.scalar)
            return stock(builder, pointers, compare, *rest)

        return create_atomic_cas

    def assertion(self) -> Any:
        stock = self.interpreter.InterpreterBuilder.create_assert

        def create_assert(builder: Any, condition: Any, message: Any) -> None:
            if "overflow detected" not in str(message):
                stock(builder, condition, message)
            elif not bool(condition):
                text = f"{message} in program {builder.grid_idx}"
                self.report.add("overflows", 1, self.kernel, text)

        return create_assert
