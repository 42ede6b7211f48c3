"""A reader for GGUF files, in NumPy: metadata, tensor table and the tensor types that we need.

A GGUF file (version 2 or 3, little endian) is

    magic "GGUF", version u32, number of tensors u64, number of metadata entries u64
    entries      key, type u32, value
    tensors      name, number of dimensions u32, sizes u64 (fastest first), type u32, offset u64
    data         at the next multiple of `general.alignment` (32 if absent); offsets start there

Blocks of 32 values that `GgufTensor.values` decodes, d and m being fp16:

    Q4_0    d, 16 bytes        value = d * (code - 8)  low nibbles are values 0..15, high are 16..31
    Q4_1    d, m, 16 bytes     value = d * code + m    likewise
    Q8_0    d, 32 int8         value = d * code
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class _TensorType:
    name: str
    block: int  # values of a block
    nbytes: int  # bytes of a block


_TENSOR_TYPES = {
    0: _TensorType("F32", 1, 4),
    1: _TensorType("F16", 1, 2),
    2: _TensorType("Q4_0", 32, 18),
    3: _TensorType("Q4_1", 32, 20),
    8: _TensorType("Q8_0", 32, 34),
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file. shape: slowest dimension first, as NumPy writes it."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    raw: NDArray[np.uint8]

    def values(self) -> NDArray[np.float32]:
        """The values fp32 of `shape`, a fresh array."""
        return _DECODERS[self.type_name](self.raw).reshape(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """metadata: str, number, bool or list per key. tensors: by name, in file order."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.position = 0

    def scalar(self, kind: str) -> Any:
        (value,) = struct.unpack_from("<" + kind, self.data, self.position)
        self.position += struct.calcsize(kind)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        piece = bytes(self.data[self.position : self.position + length])
        if len(piece) != length:
            raise struct.error(f"string of {length} bytes runs past the end")
        self.position += length
        # Names of tokens may hold bytes that are not UTF-8; they must not stop the reading.
        return piece.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, length = self.scalar("I"), self.scalar("Q")
            return [self.value(element) for _ in range(length)]
        raise ValueError(f"GGUF metadata has a value of unknown type {kind}")


def read_gguf(data: bytes | memoryview) -> GgufFile:
    """Parse a whole GGUF file held in memory; its tensors are views of `data`.

    Raises ValueError if it is not GGUF, is cut short, or holds a tensor type other than F32, F16,
    Q4_0, Q4_1 and Q8_0.
    """
    view = memoryview(data)
    reader = _Reader(view)
    if bytes(view[:4]) != b"GGUF":
        raise ValueError(f"not a GGUF file: it starts with {bytes(view[:4])!r}")
    reader.position = 4
    try:
        return _parse(reader)
    except struct.error as error:
        raise ValueError(f"GGUF file is cut short at byte {reader.position}: {error}") from error


def _parse(reader: _Reader) -> GgufFile:
    version = reader.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version must be 2 or 3, got {version}")
    num_tensors, num_entries = reader.scalar("Q"), reader.scalar("Q")
    metadata = {}
    for _ in range(num_entries):
        key = reader.string()
        metadata[key] = reader.value(reader.scalar("I"))
    table = []
    for _ in range(num_tensors):
        name = reader.string()
        shape = tuple(reader.scalar("Q") for _ in range(reader.scalar("I")))[::-1]
        table.append((name, shape, reader.scalar("I"), reader.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    base = -(-reader.position // alignment) * alignment
    return GgufFile(metadata, {row[0]: _tensor(reader.data, base, *row) for row in table})


def _tensor(
    data: memoryview, base: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> GgufTensor:
    if kind not in _TENSOR_TYPES:
        known = [known.name for known in _TENSOR_TYPES.values()]
        raise ValueError(f"GGUF tensor {name!r} has type number {kind}; this reader knows {known}")
    layout = _TENSOR_TYPES[kind]
    count = int(np.prod(shape, dtype=np.int64))
    if count % layout.block != 0:
        raise ValueError(f"GGUF tensor {name!r} {shape} is not whole blocks of {layout.block}")
    nbytes = count // layout.block * layout.nbytes
    raw = np.frombuffer(data[base + offset : base + offset + nbytes], np.uint8)
    if raw.size != nbytes:
        raise ValueError(f"GGUF file is cut short: tensor {name!r} needs {nbytes} bytes")
    return GgufTensor(name, shape, layout.name, raw)


def _half(columns: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Two byte columns [blocks, 2] → the fp16 numbers they spell, fp32 [blocks, 1]."""
    return np.ascontiguousarray(columns).view(np.float16).astype(np.float32)


def _decode_f32(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    return raw.view(np.float32).copy()


def _decode_f16(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    return raw.view(np.float16).astype(np.float32)


def _decode_q4_0(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    blocks = raw.reshape(-1, 18)
    scale, packed = _half(blocks[:, :2]), blocks[:, 2:]
    codes = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    return scale * (codes - 8)


def _decode_q4_1(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    blocks = raw.reshape(-1, 20)
    scale, minimum, packed = _half(blocks[:, :2]), _half(blocks[:, 2:4]), blocks[:, 4:]
    codes = np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)
    return scale * codes + minimum


def _decode_q8_0(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    blocks = raw.reshape(-1, 34)
    codes = np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32)
    return _half(blocks[:, :2]) * codes


_DECODERS = {
    "F32": _decode_f32,
    "F16": _decode_f16,
    "Q4_0": _decode_q4_0,
    "Q4_1": _decode_q4_1,
    "Q8_0": _decode_q8_0,
}
