"""The argument blocks of the small kernels of a decode step: int64 fields at an address."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lath.kernels.simd.arguments import ArgumentBlock
from lath.kernels.simd.emitter import Emitter

# What changes from token to token, in one place for all kernels of a step.
STATE_FIELDS = (
    "token",  # its number
    "position",  # by which queries and keys are rotated
    "slot",  # row of the cache's open float part that it goes to
    "grown",  # 1: its arrival is added to the cache's lengths; 0: they count it already
    "rotations",  # address of fp32 [positions, 2, head_dim]: cosines, then signed sines
    "left",  # tokens that the call may still compute; 0 ends it
    "more",  # tokens of the call behind its first
)
STATE = {name: index for index, name in enumerate(STATE_FIELDS)}

# Of kernels over one vector of numbers.
VECTOR_FIELDS = (
    "state",
    "x",  # address of the input
    "second",  # address of the other input, where there are two
    "weight",  # address
    "y",  # address of the output
    "columns",
    "epsilon",  # the bits of an fp32
)
VECTOR = {name: index for index, name in enumerate(VECTOR_FIELDS)}

# Of the kernel over heads: fp32 in, the cache's dtype out; strides in bytes.
HEAD_FIELDS = (
    "state",
    "query", "key", "value",  # addresses of fp32 [heads, head_dim]
    "query_weight", "key_weight", "query_epsilon", "key_epsilon",  # of their norms
    "q",  # address of [query heads, head_dim]
    "keys", "key_head", "key_row", "values", "value_head", "value_row",  # the open float part
    "lengths", "part_lengths",  # addresses of int32: of the sequence and of that part
    "query_heads", "kv_heads", "head_dim",
)  # fmt: skip
HEAD = {name: index for index, name in enumerate(HEAD_FIELDS)}


# Of the kernel behind the choice of a token (cpu_follow.py).
FOLLOW_FIELDS = (
    "state",
    "tokens",  # address of int64: where the call's tokens are written
    "ends", "count",  # address of int64: tokens behind which the call ends, and how many
)  # fmt: skip
FOLLOW = {name: index for index, name in enumerate(FOLLOW_FIELDS)}


class VectorArguments(ArgumentBlock):
    def __init__(self, emitter: Emitter, address: Any) -> None:
        super().__init__(emitter, address, VECTOR)


class HeadArguments(ArgumentBlock):
    def __init__(self, emitter: Emitter, address: Any) -> None:
        super().__init__(emitter, address, HEAD)


class FollowArguments(ArgumentBlock):
    def __init__(self, emitter: Emitter, address: Any) -> None:
        super().__init__(emitter, address, FOLLOW)


class StateFields(ArgumentBlock):
    def __init__(self, emitter: Emitter, address: Any) -> None:
        super().__init__(emitter, address, STATE)


def float_bits(value: float) -> int:
    """The bits of a float as fp32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def block_of(index: dict[str, int], **fields: int) -> NDArray[np.int64]:
    """A block with the given fields set, the others 0."""
    block = np.zeros(len(index), np.int64)
    for name, value in fields.items():
        block[index[name]] = value
    return block
