"""The tensors of a model folder, read a piece at a time: nothing of the files stays in memory.

Not by mapping the files, for what is mapped counts as resident once it was touched. A safetensors
file is the length of its header, u64, the header in JSON (of each tensor: dtype, shape, first byte
and the one behind the last, counted from the header's end), and the numbers, little endian.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import KeysView
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lath.integration.store import ModelError

INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U8": torch.uint8,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in the file


class Checkpoint:
    """The safetensors files of a folder: those that its index names, or all. ModelError where there
    are none or one cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, _Entry] = {}
        for file in _files(folder):
            try:
                self._entries |= _header(file)
            except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
                raise ModelError(f"cannot read {file}: {error}") from error

    @property
    def names(self) -> KeysView[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        entry = self._entries[name]
        return _read(entry, 0, entry.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 of a tensor."""
        entry = self._entries[name]
        return _read(entry, start * math.prod(entry.shape[1:]), (stop - start, *entry.shape[1:]))


def _read(entry: _Entry, first: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers of a tensor from one on, in memory of their own."""
    nbytes = math.prod(shape) * entry.dtype.itemsize
    raw = torch.empty(nbytes, dtype=torch.uint8)
    try:
        with entry.file.open("rb") as file:
            file.seek(entry.start + first * entry.dtype.itemsize)
            got = file.readinto(raw.numpy().data)
    except OSError as error:
        raise ModelError(f"cannot read {entry.file}: {error}") from error
    if got != nbytes:
        raise ModelError(f"cannot read {entry.file}: it is cut short")
    return raw.view(entry.dtype).view(shape)


def _header(file: Path) -> dict[str, _Entry]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > size - 8:
            raise ValueError(f"its header of {length} bytes runs past the end")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    entries = {}
    for name, fields in header.items():
        if fields["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is of dtype {fields['dtype']}, known are {sorted(_DTYPES)}")
        start, stop = fields["data_offsets"]
        entry = _Entry(file, _DTYPES[fields["dtype"]], tuple(fields["shape"]), 8 + length + start)
        nbytes = math.prod(entry.shape) * entry.dtype.itemsize
        if start < 0 or stop - start != nbytes or 8 + length + stop > size:
            raise ValueError(f"{name} {[*entry.shape]} does not fit bytes {start} to {stop}")
        entries[name] = entry
    return entries


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"cannot read {index}: {error}") from error
        return [folder / name for name in sorted(named)]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no .safetensors file")
    return files
