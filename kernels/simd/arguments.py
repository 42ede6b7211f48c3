"""The argument block of a kernel: int64 fields at an address, read by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lath.kernels.simd.emitter import F32, I32, I64, Emitter


class ArgumentBlock:
    """The fields of a block as values in a kernel: `arguments["group"]`.

    index: the place of each field. Fields hold integers, addresses, or the bits of a float.
    """

    def __init__(self, emitter: Emitter, address: Any, index: Mapping[str, int]) -> None:
        self._e, self.address, self._index = emitter, address, index
        self._values = {
            name: emitter.load(emitter.add(address, 8 * place), I64)
            for name, place in index.items()
        }

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def at(self, index: Any) -> Any:
        """The field of a number that is a value in the kernel."""
        return self._e.load(self._e.offset(self.address, index, 8), I64)

    def real(self, name: str) -> Any:
        """A field that holds a float, as a scalar."""
        return self._e.load(self._e.add(self.address, 8 * self._index[name]), F32)

    def integer(self, name: str, index: Any) -> Any:
        """Entry `index` of the int32 array at a field, as int64."""
        return load_index(self._e, self._e.offset(self[name], index, 4))


def load_index(e: Emitter, address: Any) -> Any:
    """The int32 at an address, as int64."""
    return e.builder.sext(e.load(address, I32), I64)
