"""The argument block of the CPU kernels of selection: int64 fields, strides in bytes."""

from __future__ import annotations

from typing import Any

from lath.kernels.simd.arguments import ArgumentBlock
from lath.kernels.simd.emitter import Emitter

ROWS = 4  # rows of q that are computed together
TILE = 16  # entries of a table that are scored together
VECTOR = 64
# Pieces of a thread's scratch (cpu_units.scratch_of).
PIECES = (
    "pages", "places", "counted", "logs", "unused", "dots", "units", "weights", "q", "squares",
    "targets", "lists", "states", "picked", "channels",
)  # fmt: skip

FIELDS = (
    "q", "q_batch", "q_head", "q_row",
    "query_lengths",  # int32 [S]
    "query_rows",  # rows of q for each sequence, those that it has not got included
    "kv_heads", "group", "key_dim", "value_dim",
    # index rows, and offsets in one
    "index", "index_page", "index_head",
    "mean", "max", "min", "numbers", "deviation", "value_mean",
    "stored_keys", "stored_values",  # padded head dims
    "table", "table_sequence", "counts", "counts_sequence",  # int32
    "page_counts",  # int32 [S]
    "width",  # entries of a table
    "scale",  # the bits of a float
    "out",  # fp32 [S, Hq, rows, width] of scores
    # repair: fp32 z of the entries; query heads that share a list; fp32 o and lse
    "unread", "unread_sequence", "unread_head", "sharing", "o", "lse",
    # int8 [C, 64] or uint8 [C, 32], and fp32, of a page and head; int32 [kv_heads, C]
    "labels", "labels_page", "labels_head", "label_scales", "label_scales_page",
    "label_channels", "label_rows",  # C
    "rows_of", "chosen",  # int32 [S, Hq, chosen]
    # how the work is divided: entries of a unit, KV heads of a unit
    "units", "pieces", "piece", "chunks", "chunk",
    "tile_rows",  # of a KV head, a multiple of ROWS
    "state",  # bytes
    "scratch", "slot",  # of a thread: address, bytes
    *(f"at_{piece}" for piece in PIECES),
    "task", "thread_number", "thread_count",
)  # fmt: skip
INDEX = {name: index for index, name in enumerate(FIELDS)}


class Arguments(ArgumentBlock):
    """The fields above as values in a kernel."""

    def __init__(self, emitter: Emitter, address: Any) -> None:
        super().__init__(emitter, address, INDEX)


class Context:
    """Emitter and arguments of one kernel. dtype: FP32, FP16 or BF16, of q."""

    def __init__(self, e: Emitter, a: Arguments, dtype: int) -> None:
        self.e, self.a, self.dtype = e, a, dtype
        self.b = e.builder
        self.tail = e.buffer(1)  # for what is less than a vector
