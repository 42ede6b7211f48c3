"""Selection on a CPU: compiled kernels over index rows, shared by torch's threads.

Scores, lists and repair are those of the definition; everything is computed in fp32. What a result
is does not depend on the number of threads.
"""

from __future__ import annotations

import functools
import struct
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lath.formats.attention import PageView, Queries
from lath.formats.pages import PageFormat
from lath.formats.selection import PageScore

try:
    import numba  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the compiled CPU kernels need numba: pip install 'lath[cpu]'", name=error.name
    ) from error

from lath.kernels.select.cpu_arguments import FIELDS, INDEX, ROWS, TILE
from lath.kernels.select.cpu_scores import emit_page_scores
from lath.kernels.select.cpu_units import scratch_of, state_bytes
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.emitter import BF16, FP16, FP32
from lath.kernels.simd.workers import Slots, run_units

DTYPES = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
_SLOTS = Slots(INDEX["task"], INDEX["thread_number"], INDEX["thread_count"])
_KINDS = ("bound", "mean", "mass", "floor")


def page_scores(
    queries: Queries,
    pages: PageView,
    kind: PageScore,
    scale: float,
    extremes: Tensor | None = None,
) -> Tensor:
    """Scores fp32 [S, Hq, L, P] of pages; -inf for unused entries and rows a sequence has not got.

    queries: dense. pages: without lists. kind: "bound", "mean", "mass" or "floor". extremes: int8
    [N, Hkv, 4, 2, D], max and min of each sub-page in index units, kind "bound" only: the largest
    bound of those that hold tokens which count. ValueError for another kind, for packed queries,
    for lists and for extremes of another shape or kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {_KINDS}, got {kind!r}")
    _check(queries, pages)
    if extremes is not None:
        _check_extremes(extremes, pages, kind)
    q = queries.q
    sequences, heads, rows, _ = q.shape
    width = pages.table.shape[1]
    scores = torch.full((sequences, heads, rows, width), float("-inf"))
    if scores.numel() == 0:
        return scores
    division = _divide(
        sequences, pages.num_kv_heads, heads // pages.num_kv_heads, rows, width, True,
        torch.get_num_threads(),
    )  # fmt: skip
    block = array("q", _template(pages.format, division, False))
    scratch = _fill(block, queries, pages, scale, division)
    block[INDEX["out"]] = scores.data_ptr()
    if extremes is not None:
        at = INDEX["extremes"]
        block[at] = extremes.data_ptr()
        block[at + 1], block[at + 2] = extremes.stride(0), extremes.stride(1)
    kernel = compile_kernel(emit_page_scores, kind, int(extremes is not None), DTYPES[q.dtype])
    run_units(kernel, block, block.buffer_info()[0], division.units, _SLOTS)
    del scratch  # until here the kernel wrote into it
    return scores


def _check(queries: Queries, pages: PageView) -> None:
    if queries.q.dtype not in DTYPES:
        raise TypeError(f"q must be float32, float16 or bfloat16, got {queries.q.dtype}")
    if queries.offsets is not None:
        raise ValueError("queries must be dense for a selection: offsets must be None")
    if pages.list_heads is not None:
        raise ValueError(f"pages must have no lists, got a table of shape {pages.table.shape}")


def _check_extremes(extremes: Tensor, pages: PageView, kind: str) -> None:
    if kind != "bound":
        raise ValueError(f"extremes must be None for kind {kind!r}: only 'bound' reads sub-pages")
    dim = pages.format.key_dim
    shape = (*pages.records.shape[:2], 4, 2, dim)
    if extremes.dtype != torch.int8 or tuple(extremes.shape) != shape:
        raise ValueError(f"extremes must be int8 {shape}, got {extremes.dtype} {extremes.shape}")
    if extremes.stride()[2:] != (2 * dim, dim, 1):
        raise ValueError(f"extremes must be contiguous in their last three axes, got strides "
                         f"{extremes.stride()}")  # fmt: skip


class _Division(NamedTuple):
    """How the work is divided into units (cpu_units.Unit). width: entries of a table."""

    width: int
    tile_rows: int
    pieces: int
    piece: int
    chunks: int
    chunk: int
    units: int
    threads: int


@functools.lru_cache(maxsize=1024)  # a decode step asks for the same in every layer
def _divide(
    sequences: int, kv_heads: int, group: int, rows: int, width: int, split: bool, threads: int
) -> _Division:
    """split: whether the entries of a table may be divided among units."""
    tile_rows = -(-rows * group // ROWS) * ROWS
    # Rows of index lie head by head; many rows of q are better kept for one head at a time.
    chunk = kv_heads if tile_rows <= 4 * ROWS else 1
    wanted = -(-threads // sequences)
    pieces = 1
    if split:
        pieces = min(-(-wanted * chunk // kv_heads), -(-width // TILE))
    else:
        chunk = min(chunk, -(-kv_heads // min(wanted, kv_heads)))
    chunks = -(-kv_heads // chunk)
    piece = -(-width // (TILE * pieces)) * TILE
    pieces = -(-width // piece)
    units = sequences * chunks * pieces
    return _Division(width, tile_rows, pieces, piece, chunks, chunk, units, min(threads, units))


@functools.lru_cache(maxsize=1024)
def _template(fmt: PageFormat, division: _Division, states: bool) -> list[int]:
    """An argument block with what a page format and a division settle."""
    d = division
    stored = fmt.padded_value_dim if states else 0
    scratch = scratch_of(d.piece, d.width, d.chunk, d.tile_rows, fmt.padded_key_dim, stored)
    values = {
        "key_dim": fmt.key_dim, "value_dim": fmt.value_dim, "stored_keys": fmt.padded_key_dim,
        "stored_values": fmt.padded_value_dim, "width": d.width, "tile_rows": d.tile_rows,
        "units": d.units, "pieces": d.pieces, "piece": d.piece, "chunks": d.chunks,
        "chunk": d.chunk, "slot": scratch.slot, "state": state_bytes(d.tile_rows, stored),
        **{name: field.offset for name, field in fmt.index_fields.items()},
        **{f"at_{name}": offset for name, offset in scratch.offsets.items()},
    }  # fmt: skip
    return [values.get(name, 0) for name in FIELDS]


def _fill(
    block: array[int], queries: Queries, pages: PageView, scale: float, division: _Division
) -> Tensor:
    """Enters queries, pages and scratch into the block; returns the scratch."""
    q, index, table = queries.q, pages.index, pages.table
    size, at = q.element_size(), INDEX["q"]
    batch, head, row, _ = q.stride()
    block[at] = q.data_ptr()
    block[at + 1], block[at + 2], block[at + 3] = batch * size, head * size, row * size
    block[INDEX["query_lengths"]] = queries.lengths.data_ptr()
    block[INDEX["query_rows"]] = q.shape[2]
    block[INDEX["kv_heads"]] = index.shape[1]
    block[INDEX["group"]] = q.shape[1] // index.shape[1]
    at = INDEX["index"]
    block[at] = index.data_ptr()
    block[at + 1], block[at + 2] = index.stride(0), index.stride(1)
    at = INDEX["table"]
    block[at], block[at + 1] = table.data_ptr(), 4 * table.stride(0)
    block[at + 2], block[at + 3] = pages.counts.data_ptr(), 4 * pages.counts.stride(0)
    block[INDEX["page_counts"]] = pages.page_counts.data_ptr()
    block[INDEX["scale"]] = _bits(scale)
    scratch = torch.empty(division.threads * block[INDEX["slot"]], dtype=torch.uint8)
    block[INDEX["scratch"]] = scratch.data_ptr()
    return scratch


@functools.lru_cache(maxsize=64)
def _bits(value: float) -> int:
    """The bits of a float as fp32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
