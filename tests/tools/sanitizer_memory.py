"""What the sanitizer knows about memory: argument extents, fresh allocations, access history."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tools.narrow_floats import Array

Program = tuple[int, int, int]

ALLOCATORS = frozenset(
    {
        "aten::empty",
        "aten::empty_like",
        "aten::empty_permuted",
        "aten::empty_strided",
        "aten::new_empty",
        "aten::new_empty_strided",
    }
)
# In-place operations that change what a tensor refers to, not what memory holds.
NOT_WRITES = frozenset(
    {
        "aten::as_strided_",
        "aten::detach_",
        "aten::resize_",
        "aten::set_",
        "aten::squeeze_",
        "aten::swapaxes_",
        "aten::t_",
        "aten::transpose_",
        "aten::unsqueeze_",
    }
)


_TAG_SHIFT = np.uint64(56)
_ADDRESS = np.uint64((1 << 56) - 1)


@dataclasses.dataclass(frozen=True)
class Span:
    """The bytes [start, stop) that one tensor argument lets a kernel touch."""

    name: str
    start: int
    stop: int


class ArgumentSpans:
    """The tensor arguments of one launch, and which of them a pointer came from.

    A pointer carries the number of its argument in its top byte, which no address uses and pointer
    arithmetic leaves alone. So running past the end of one tensor into another one is seen. Tag 0
    (a pointer that the kernel read from memory) may point into any argument.
    """

    def __init__(self, bounds: Literal["view", "storage"]) -> None:
        self._bounds = bounds
        self._spans: list[Span] = []
        self._tags: dict[int, int] = {}  # id of an argument (alive during the launch) -> tag

    def add(self, name: str, value: Any) -> None:
        """Add every tensor inside a kernel argument: a tensor, tuple, descriptor or wrapper."""
        if isinstance(value, tuple):
            for index, item in enumerate(value):
                self.add(f"{name}[{index}]", item)
            return
        tensor = value if isinstance(value, torch.Tensor) else getattr(value, "base", None)
        if not isinstance(tensor, torch.Tensor):
            return
        if not hasattr(value, "data_ptr"):  # a descriptor: the interpreter converts its base
            value = tensor
        storage = tensor.untyped_storage()
        start, stop = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        if self._bounds == "view":
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * stride for size, stride in steps)
            start = tensor.data_ptr()
            stop = start + (last + 1) * tensor.element_size() if tensor.numel() else start
        self._spans.append(Span(name, start, stop))
        if len(self._spans) < 256:
            self._tags[id(value)] = len(self._spans)

    def tag(self, argument: Any) -> np.uint64:
        """The bits to set in pointers made from this argument."""
        return np.uint64(self._tags.get(id(argument), 0)) << _TAG_SHIFT

    def check(self, pointers: Array, size: int) -> tuple[Array, Array]:
        """Tagged pointers (uint64, any shape) -> addresses, and which of `size` bytes fit."""
        addresses, tags = pointers & _ADDRESS, pointers >> _TAG_SHIFT
        inside = np.zeros(pointers.shape, dtype=bool)
        for tag in np.unique(tags).tolist():
            for span in self._spans[tag - 1 : tag] if tag else self._spans:
                if span.stop - span.start >= size:
                    fits = (addresses >= span.start) & (addresses <= span.stop - size)
                    inside |= fits & (tags == tag)
        return addresses, inside

    def locate(self, pointer: int, size: int) -> str:
        """A tagged pointer, or an address inside an argument, in words: "x[130] of 128"."""
        tag, address = pointer >> 56, pointer & int(_ADDRESS)
        if tag:
            span = self._spans[tag - 1]
        else:
            found = [s for s in self._spans if s.start <= address < s.stop]
            if not found:
                return f"address {address:#x}, in no argument"
            span = found[0]
        return (
            f"{span.name}[{(address - span.start) // size}] of {(span.stop - span.start) // size}"
        )


class FreshMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows each CPU tensor that torch.empty & co. make: which of its bytes have been written.

    In-place torch operations count as writes of exactly the view they get; kernels report theirs
    through `written`. Writes through `.numpy()` or a raw pointer are not seen.
    """

    def __init__(self, fill: bool, track: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fill, self.track = fill, track
        self._active = True
        # Storages are kept alive, so that no address is used twice within the block.
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._written: dict[int, torch.Tensor] = {}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore torch operations, as those of the interpreter itself around a launch."""
        before, self._active = self._active, False
        try:
            yield
        finally:
            self._active = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._active:
            schema = func._schema
            if schema.name in ALLOCATORS:
                self._allocated(result)
            elif schema.name not in NOT_WRITES:
                names = [argument.name for argument in schema.arguments]
                named = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
                for argument in schema.arguments:
                    if argument.alias_info is not None and argument.alias_info.is_write:
                        self._written_by_torch(named.get(argument.name))
        return result

    def _allocated(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != "cpu" or not storage.nbytes():
            return
        if self.fill:
            flat = torch.empty(0, dtype=torch.uint8).set_(storage)
            # 0xFF...FF is NaN in every float type but the fnuz ones; it is not a valid bool.
            flat.fill_(1 if tensor.dtype == torch.bool else 0xFF)
        if self.track:
            self._storages[storage.data_ptr()] = storage
            self._written[storage.data_ptr()] = torch.zeros(storage.nbytes(), dtype=torch.bool)

    def _written_by_torch(self, value: Any) -> None:
        if isinstance(value, list | tuple):
            for item in value:
                self._written_by_torch(item)
        elif isinstance(value, torch.Tensor) and value.device.type == "cpu":
            flags = self._written.get(value.untyped_storage().data_ptr())
            if flags is not None:
                size = value.element_size()
                strides = [stride * size for stride in value.stride()]
                offset = value.storage_offset() * size
                flags.as_strided([*value.shape, size], [*strides, 1], offset).fill_(True)

    def written(self, addresses: Array, size: int) -> None:
        """A kernel stored elements of `size` bytes at `addresses` (uint64 [n])."""
        for start, flags in self._written.items():
            inside = self._offsets(addresses, start, flags)
            bits = flags.numpy()
            for byte in range(size):
                bits[inside + byte] = True

    def unwritten(self, addresses: Array) -> Array:
        """Those of `addresses` (uint64 [n]) in fresh memory that nothing has written."""
        found = [
            offsets[~flags.numpy()[offsets]] + start
            for start, flags in self._written.items()
            if (offsets := self._offsets(addresses, start, flags)).size
        ]
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    @staticmethod
    def _offsets(addresses: Array, start: int, flags: torch.Tensor) -> Array:
        inside = (addresses >= np.uint64(start)) & (addresses < np.uint64(start + flags.numel()))
        return (addresses[inside] - np.uint64(start)).astype(np.int64)


class Accesses:
    """The plain loads and stores of one launch, by program; `atomics`: the launch used some."""

    def __init__(self) -> None:
        self.atomics = False
        self._programs: list[Program] = []
        self._numbers: dict[Program, int] = {}
        self._stores: list[tuple[int, int, Array, Array]] = []
        self._loads: list[tuple[int, int, Array]] = []

    def _number(self, program: Program) -> int:
        if program not in self._numbers:
            self._numbers[program] = len(self._programs)
            self._programs.append(program)
        return self._numbers[program]

    def load(self, program: Program, addresses: Array, size: int) -> None:
        """Program read elements of `size` bytes at `addresses` (uint64 [n])."""
        if addresses.size:
            self._loads.append((self._number(program), size, addresses))

    def store(self, program: Program, addresses: Array, size: int, values: Array) -> None:
        """Program wrote `values` ([n], `size` bytes each) at `addresses` (uint64 [n])."""
        if addresses.size:
            bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").astype(np.uint64)
            self._stores.append((self._number(program), size, addresses, bits))

    def races(self) -> list[tuple[str, int, int]]:
        """(what happened, address, element size) for each address on which programs conflict."""
        if not self._stores or len(self._programs) < 2:
            return []
        addresses = np.concatenate([s[2] for s in self._stores])
        programs = np.concatenate([np.full(s[2].size, s[0], dtype=np.int64) for s in self._stores])
        bits = np.concatenate([s[3] for s in self._stores])
        size = self._stores[0][1]
        found = self._conflicting_stores(addresses, programs, bits, size)
        if not self.atomics:
            found += self._foreign_loads(addresses, programs)
        return found

    def _conflicting_stores(
        self, addresses: Array, programs: Array, bits: Array, size: int
    ) -> list[tuple[str, int, int]]:
        order = np.argsort(addresses, kind="stable")
        addresses, programs, bits = addresses[order], programs[order], bits[order]
        same = addresses[1:] == addresses[:-1]
        clash = same & (programs[1:] != programs[:-1]) & (bits[1:] != bits[:-1])
        found: dict[int, tuple[str, int, int]] = {}
        for i in np.flatnonzero(clash):
            first, second = self._programs[programs[i]], self._programs[programs[i + 1]]
            text = f"programs {first} and {second} store different values"
            found.setdefault(int(addresses[i]), (text, int(addresses[i]), size))
        return list(found.values())

    def _foreign_loads(self, stored: Array, writers: Array) -> list[tuple[str, int, int]]:
        unique, first = np.unique(stored, return_index=True)
        pairs = {(int(a), int(p)) for a, p in zip(stored, writers, strict=True)}
        found: dict[int, tuple[str, int, int]] = {}
        for reader, size, addresses in self._loads:
            if int(addresses.max()) < int(unique[0]) or int(addresses.min()) > int(unique[-1]):
                continue
            position = np.minimum(np.searchsorted(unique, addresses), unique.size - 1)
            hits = unique[position] == addresses
            for address, at in zip(addresses[hits].tolist(), position[hits], strict=True):
                if (address, reader) not in pairs and address not in found:
                    writer = self._programs[writers[first[at]]]
                    text = f"program {self._programs[reader]} loads what {writer} stores"
                    found[address] = (text, address, size)
        return list(found.values())
