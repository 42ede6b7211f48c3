"""The argument block of the CPU attention kernels, and how a kernel is specialised.

One block of int64 fields per call; strides are in bytes. What a kernel is compiled for is a `Kind`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from lath.kernels.simd.arguments import ArgumentBlock
from lath.kernels.simd.emitter import BF16, F32, FP32, ITEM_BYTES, Emitter

ROWS = 4  # rows of q that are computed together
FAR = 1 << 30  # a distance that no key has
# Pieces of a thread's scratch (cpu_scratch.py): of each tile of rows, and of the tile at hand.
ROW_PIECES = ("q", "rounded", "codes", "factors", "sums")
SHARED_PIECES = ("wide", "scores", "weights", "result", "key_rows", "value_rows")

# The float parts of a cache, alike.
PARTS = ("first", "last")
PART_FIELDS = (
    "keys", "key_batch", "key_head", "key_row",
    "values", "value_batch", "value_head", "value_row", "lengths",
)  # fmt: skip

# What a page list holds: int32 entries (tokens: int64), and int32 how many of them count.
LIST_FIELDS = ("table", "starts", "counts", "tokens", "page_counts")

FIELDS = (
    # what is computed
    "q", "q_batch", "q_head", "q_row",
    "o", "o_batch", "o_head", "o_row",
    "lse", "lse_batch", "lse_head",
    "query_lengths",  # int32 [S]
    "offsets",  # int32 [S]; 0: rows of sequence s are those of q[s]
    "row_limit",  # rows of q that exist for a sequence, computed or not; 0: its length
    # Heads that pages are read for: KV heads, or query heads where each has its own list.
    "heads",
    "group",  # query heads of each
    "repeat",  # how many of them read the pages of one KV head
    "key_dim", "value_dim",
    # pages
    "records", "record_page", "record_head",
    "index", "index_page", "index_head",
    "keys", "keys_low", "values", "values_low",  # offsets in a record
    "value_scales", "key_scales", "token_scales", "record_end",
    "stored_keys", "stored_values",  # padded head dims
    "asked", "asked_values",  # int32 offsets of lines (cpu_order.py); the first beside values
    # addresses (tokens: 0 for none); bytes between sequences and between heads
    *(f"{name}{stride}" for name in LIST_FIELDS for stride in ("", "_sequence", "_head")),
    "lengths",  # int32 [S]
    *(f"{part}_{name}" for part in PARTS for name in PART_FIELDS),
    # scores; floats as their bits
    "scale",  # in units of log2
    "nearest", "farthest",  # query - key distances that may be read
    "special",  # whether any of the following is set
    "softcap",  # in units of log2; 0: none
    "bias", "bias_batch", "bias_head", "bias_row", "bias_keys",  # fp32, `bias_keys` in a row
    "mask", "mask_batch", "mask_head", "mask_row", "mask_keys",
    "alibi", "sink",  # fp32 [Hq]
    "tree", "tree_batch", "tree_row",
    # how the work is divided
    "units", "splits", "tiles",
    "chunk", "chunks",  # neighbouring heads that a unit does, and how many such there are
    "tile_rows",  # a multiple of ROWS
    "scratch", "slot",  # of a thread: address, bytes
    "at_rows", "row_slot",  # in a slot: offset of the tiles' pieces, bytes of one tile's
    "states", "state",  # of a unit
    "staged_keys",  # padded head dim of q, and of keys that are multiplied as floats
    *(f"at_{piece}" for piece in (*SHARED_PIECES, *ROW_PIECES)),
    # for a team of threads
    "task", "thread_number", "thread_count",
    # int64 [threads, 8]: in each thread's first two, pages and sub-pages read for a head; 0: not
    "traffic",  # counted
)  # fmt: skip
INDEX = {name: index for index, name in enumerate(FIELDS)}


class Arguments(ArgumentBlock):
    """The fields above as values in a kernel."""

    def __init__(self, emitter: Emitter, address: Any) -> None:
        super().__init__(emitter, address, INDEX)


@dataclass(frozen=True)
class Kind:
    """What a kernel is compiled for.

    key, value: codec names, or "draft" for the upper planes of "int8-planes". precision, query: as
    in ScoreOptions. dtype: FP32, FP16 or BF16, of q, of float pages and parts, and of o. brain:
    floats are multiplied as bf16, else as fp32. few: no tile has more than 4 rows; following
    pages are asked for while one is read. masked: lists have masks of tokens; sub-pages without a
    token are left out.
    """

    key: str
    value: str
    precision: str
    query: str
    dtype: int
    brain: bool
    few: bool
    masked: bool = False

    @property
    def integer_scores(self) -> bool:
        return self.key not in ("float", "e4m3") and self.query == "int8"

    @property
    def integer_values(self) -> bool:
        return self.value not in ("float", "e4m3") and self.precision in ("int8", "int16")

    @property
    def token_scales(self) -> bool:
        return self.key in ("int4", "int2")

    @property
    def item(self) -> int:
        """Bytes of a float that is multiplied."""
        return 2 if self.brain else 4

    @property
    def item_type(self) -> int:
        return BF16 if self.brain else FP32

    @property
    def dtype_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]


def fields_of(codec: str) -> int:
    """Codes in a stored byte (of the first plane)."""
    return {"int8-planes": 2, "draft": 2, "int4": 2, "int2": 4}.get(codec, 1)


class Context:
    """Emitter, arguments and kind of one kernel, and the operations that all its parts share."""

    def __init__(self, e: Emitter, a: Arguments, kind: Kind) -> None:
        self.e, self.a, self.kind = e, a, kind
        self.b = e.builder
        self.tail = e.buffer(1)  # for what is less than a vector
        self.distances = e.buffer(1) if kind.masked else None  # cpu_ask.py
        self.true = ir.Constant(ir.IntType(1), 1)

    def real(self, value: float) -> Any:
        return ir.Constant(F32, value)
