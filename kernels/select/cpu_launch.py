"""How a call of the kernels over index rows is divided into units, and its argument block."""

from __future__ import annotations

import functools
import struct
from array import array
from typing import NamedTuple

import torch
from torch import Tensor

from lath.formats.attention import PageView, Queries
from lath.formats.pages import PageFormat
from lath.kernels.select.cpu_arguments import FIELDS, INDEX, ROWS, TILE
from lath.kernels.select.cpu_units import scratch_of, state_bytes
from lath.kernels.simd.workers import Slots

SLOTS = Slots(INDEX["task"], INDEX["thread_number"], INDEX["thread_count"])


class Division(NamedTuple):
    """Units of work (cpu_units.Unit). width: entries of a table. states: whether rows have them.
    chosen: rows of labels that a row of q reads."""

    width: int
    tile_rows: int
    pieces: int
    piece: int
    chunks: int
    chunk: int
    units: int
    threads: int
    states: bool
    chosen: int


@functools.lru_cache(maxsize=1024)  # a decode step asks for the same in every layer
def divide(
    sequences: int,
    kv_heads: int,
    group: int,
    rows: int,
    width: int,
    threads: int,
    states: bool = False,
    chosen: int = 0,
) -> Division:
    """states: every row goes over all entries of a table, which are therefore not divided."""
    tile_rows = -(-rows * group // ROWS) * ROWS
    # Index rows lie head by head; many rows of q are better kept for one head at a time.
    chunk = kv_heads if tile_rows <= 4 * ROWS else 1
    wanted, pieces = -(-threads // sequences), 1
    if states:
        chunk = min(chunk, -(-kv_heads // min(wanted, kv_heads)))
    else:
        pieces = min(-(-wanted * chunk // kv_heads), -(-width // TILE))
    piece = -(-width // (TILE * pieces)) * TILE
    pieces, chunks = -(-width // piece), -(-kv_heads // chunk)
    units = sequences * chunks * pieces
    return Division(
        width, tile_rows, pieces, piece, chunks, chunk, units, min(threads, units), states, chosen
    )


@functools.lru_cache(maxsize=1024)
def _template(fmt: PageFormat, division: Division) -> array[int]:
    """An argument block with what a page format and a division settle."""
    d = division
    stored = fmt.padded_value_dim if d.states else 0
    scratch = scratch_of(
        d.piece, d.width, d.chunk, d.tile_rows, fmt.padded_key_dim, stored, d.chosen
    )
    values = {
        "key_dim": fmt.key_dim, "value_dim": fmt.value_dim, "stored_keys": fmt.padded_key_dim,
        "stored_values": fmt.padded_value_dim, "width": d.width, "tile_rows": d.tile_rows,
        "units": d.units, "pieces": d.pieces, "piece": d.piece, "chunks": d.chunks,
        "chunk": d.chunk, "chosen": d.chosen, "slot": scratch.slot,
        "state": state_bytes(d.tile_rows, stored),
        **{name: field.offset for name, field in fmt.index_fields.items()},
        **{f"at_{name}": offset for name, offset in scratch.offsets.items()},
    }  # fmt: skip
    return array("q", [values.get(name, 0) for name in FIELDS])


def block_of(
    queries: Queries, pages: PageView, scale: float, division: Division
) -> tuple[array[int], list[Tensor]]:
    """The argument block of a call, and tensors that must live as long as it."""
    block = _template(pages.format, division)[:]
    q, index = queries.q, pages.index
    table, counts, page_counts = (
        tensor.contiguous() for tensor in (pages.table, pages.counts, pages.page_counts)
    )
    size, at = q.element_size(), INDEX["q"]
    batch, head, row, _ = q.stride()
    block[at] = q.data_ptr()
    block[at + 1], block[at + 2], block[at + 3] = batch * size, head * size, row * size
    block[INDEX["query_lengths"]] = queries.lengths.data_ptr()
    block[INDEX["query_rows"]] = q.shape[2]
    block[INDEX["kv_heads"]] = index.shape[1]
    block[INDEX["group"]] = q.shape[1] // index.shape[1]
    at = INDEX["index"]
    page, head, _ = index.stride()
    block[at], block[at + 1], block[at + 2] = index.data_ptr(), page, head
    for name, tensor in (("table", table), ("counts", counts)):
        at = INDEX[name]
        block[at], block[at + 1] = tensor.data_ptr(), 4 * division.width
    block[INDEX["page_counts"]] = page_counts.data_ptr()
    block[INDEX["scale"]] = _bits(scale)
    scratch = torch.empty(division.threads * block[INDEX["slot"]], dtype=torch.uint8)
    block[INDEX["scratch"]] = scratch.data_ptr()
    return block, [table, counts, page_counts, scratch]


@functools.lru_cache(maxsize=64)
def _bits(value: float) -> int:
    """The bits of a float as fp32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
