"""Attention over pages on a CPU: compiled kernels (cpu_loop.py), shared by torch's threads."""

from __future__ import annotations

import functools
import math
from array import array
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lath.formats.attention import PageView, Queries, ScoreOptions
from lath.formats.pages import SUBPAGES, PageFormat
from lath.formats.plan import Plan

try:
    import numba  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the compiled CPU kernels need numba: pip install 'lath[cpu]'", name=error.name
    ) from error

from lath.kernels.attention.cpu_arguments import FIELDS, INDEX, ROWS, Kind
from lath.kernels.attention.cpu_block import (
    Lists,
    fill_options,
    fill_pages,
    fill_rows,
    lists_of,
    options_tensors,
)
from lath.kernels.attention.cpu_loop import emit_attend, emit_merge
from lath.kernels.attention.cpu_order import asked_lines
from lath.kernels.attention.cpu_scratch import scratch_of, state_bytes
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.emitter import BF16, FP16, FP32
from lath.kernels.simd.isa import has_native_brain, host_isa
from lath.kernels.simd.workers import Slots, run_units

DTYPES = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
# Rows that read a page before the next is fetched: their state stays in the second-level cache.
TILE_ROWS = 64
_SLOTS = Slots(INDEX["task"], INDEX["thread_number"], INDEX["thread_count"])


@dataclass
class Traffic:
    """Bytes that attention has read since this was made.

    records: of page records, each once for every tile of rows that reads it (whole records; with a
    draft without the lower planes, and codes only of those 16 tokens side by side of which lists
    hold one). index: of the pages' means in the index rows. Pages that no row
    reads (out of a window, or with no token admitted) are not among them, nor are float parts.
    """

    records: int = 0
    index: int = 0


def attend(
    queries: Queries,
    pages: PageView,
    options: ScoreOptions,
    plan: Plan,
    traffic: Traffic | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, Hq, L, E] of q's dtype and lse fp32 [B, Hq, L] (`lath.formats.attention`).

    plan.split_k: pieces of each page list, worked on apart and merged in their order. traffic: what
    is read is added to it. The float parts must have q's dtype, as float codecs must.
    NotImplementedError for scheme "unified": a thread goes over its pages in order, and a bound
    known beforehand would cost it a second pass. ValueError for lists of other heads than KV or
    query heads.
    """
    q = queries.q
    if options.scheme == "unified":
        raise NotImplementedError("scheme 'unified' has no CPU kernel: scheme must be 'online'")
    if q.dtype not in DTYPES:
        raise TypeError(f"q must be float32, float16 or bfloat16, got {q.dtype}")
    o, lse = outputs_of(queries, pages)
    if o.numel() == 0 or pages.num_sequences == 0:
        return o, lse
    bound = BoundAttention(
        queries, pages, options, o, lse, plan.split_k, torch.get_num_threads()
    )  # fmt: skip
    counts = None
    if traffic is not None:
        counts = torch.zeros((bound.division.threads, 8), dtype=torch.int64)
        bound.block[INDEX["traffic"]] = counts.data_ptr()
    bound.run()
    if traffic is not None and counts is not None:
        _add(traffic, pages, *counts[:, :2].sum(0).tolist())
    return o, lse


def outputs_of(queries: Queries, pages: PageView) -> tuple[Tensor, Tensor]:
    """Room for o and lse; rows of no sequence are there already."""
    q = queries.q
    shape = q.shape[:3]
    o = q.new_empty((*shape, pages.format.value_dim))
    lse = q.new_empty(shape, dtype=torch.float32)
    if queries.offsets is not None:
        o.zero_()
        lse.fill_(-math.inf)
    return o, lse


class BoundAttention:
    """One attention whose arguments are in place: it may run again and again, over the numbers
    that then lie in q, in the pages and in their lengths.

    It keeps the memory alive that it made, not that of q, o, lse and the pages. threads: that it
    is divided among. scratch: of another one that does not run at the same time, to be used again.
    """

    def __init__(
        self,
        queries: Queries,
        pages: PageView,
        options: ScoreOptions,
        o: Tensor,
        lse: Tensor,
        splits: int,
        threads: int,
        scratch: Tensor | None = None,
    ) -> None:
        q = queries.q
        _, heads, rows, _ = q.shape
        packed = queries.offsets is not None
        self._lists = lists_of(pages, heads)
        self._kept = options_tensors(options, pages.longest)
        self.division = _divide(
            pages.num_sequences, self._lists, queries.longest if packed else rows, splits, threads
        )
        self.kernel, layout = _prepared(
            pages.format, q.dtype, options.query, options.precision, pages.draft,
            pages.tokens is not None, self.division.tile_rows,
        )  # fmt: skip
        self._merge = _merge(q.dtype) if splits > 1 else None
        self.block = array("q", layout.block)
        self.address = self.block.buffer_info()[0]
        self.scratch = _place(self.block, layout, self.division, scratch)
        self.block[INDEX["row_limit"]] = 0 if packed else rows
        fill_rows(self.block, queries, o, lse)
        self.move(pages)
        fill_options(self.block, options, self._kept)

    def move(self, pages: PageView) -> None:
        """Read other pages, or the same where they lie now; of the same format and parts, and with
        masks if those had some."""
        fill_pages(self.block, pages, self._lists)

    def run(self) -> None:
        division = self.division
        run_units(self.kernel, self.block, self.address, division.units, _SLOTS)
        if self._merge is not None:
            tiles = division.units // division.splits
            run_units(self._merge, self.block, self.address, tiles, _SLOTS)


def _add(traffic: Traffic, pages: PageView, read: int, subpages: int) -> None:
    """read: pages of a head; subpages: of these."""
    fmt = pages.format
    whole, part = fmt.read_bytes(pages.draft), fmt.subpage_bytes(pages.draft)
    traffic.records += read * (whole - SUBPAGES * part) + subpages * part
    if fmt.key.map != "float":
        traffic.index += read * fmt.index_fields["mean"].nbytes


class _Division(NamedTuple):
    """How one attention is divided into units (cpu_rows.Unit)."""

    lists: Lists
    tile_rows: int
    tiles: int
    splits: int
    chunk: int
    chunks: int
    units: int
    threads: int
    states: int


@functools.lru_cache(maxsize=1024)  # a decode step asks for the same in every layer
def _divide(sequences: int, lists: Lists, longest: int, splits: int, threads: int) -> _Division:
    """longest: rows of q of the longest sequence."""
    heads = lists.heads
    rows = max(longest, 1) * lists.group
    tile_rows = min(TILE_ROWS, -(-rows // ROWS) * ROWS)
    tiles = -(-rows // tile_rows)
    chunk = 1
    if tile_rows <= ROWS and lists.shared:
        # All heads at once, unless threads would stand idle.
        chunk = -(-heads // -(-threads // (sequences * tiles * splits)))
    chunks = -(-heads // chunk)
    units = sequences * chunks * tiles * splits
    threads = min(threads, units)
    states = threads * chunk if splits == 1 else sequences * heads * tiles * splits
    return _Division(lists, tile_rows, tiles, splits, chunk, chunks, units, threads, states)


def _place(
    block: array[int], layout: _Layout, division: _Division, scratch: Tensor | None
) -> Tensor:
    """Memory for scratch and states, the given one where it is enough; enters it and the division
    into the block."""
    slot = layout.shared + division.chunk * layout.rows
    threads = division.threads
    size = threads * slot + division.states * layout.state
    if scratch is None or scratch.numel() < size:
        scratch = torch.empty(size, dtype=torch.uint8)
    start = scratch.data_ptr()
    for name in ("heads", "group", "repeat"):
        block[INDEX[name]] = getattr(division.lists, name)
    for name in ("tiles", "splits", "chunk", "chunks", "units"):
        block[INDEX[name]] = getattr(division, name)
    block[INDEX["scratch"]], block[INDEX["slot"]] = start, slot
    block[INDEX["states"]] = start + threads * slot
    return scratch


@functools.cache
def _merge(dtype: torch.dtype) -> Any:
    return compile_kernel(emit_merge, DTYPES[dtype])


@dataclass(frozen=True)
class _Layout:
    """What a page format, a kernel and a height of tile settle: an argument block, bytes of scratch
    that a thread needs once and for each tile at hand, bytes of a tile's state."""

    block: list[int]
    shared: int
    rows: int
    state: int
    asked: array[int]  # the block holds its address


@functools.lru_cache(maxsize=256)
def _prepared(
    fmt: PageFormat,
    dtype: torch.dtype,
    query: str,
    precision: str,
    draft: bool,
    masked: bool,
    tile_rows: int,
) -> tuple[Any, _Layout]:
    """The kernel, and its layout."""

    def name(codec: str) -> str:
        return "draft" if draft and codec == "int8-planes" else codec

    brain = dtype == torch.bfloat16 and has_native_brain(host_isa())
    kind = Kind(
        name(fmt.key.name), name(fmt.value.name), precision, query, DTYPES[dtype], brain,
        tile_rows <= ROWS, masked,
    )  # fmt: skip
    kernel = compile_kernel(
        emit_attend, kind.key, kind.value, kind.precision, kind.query, kind.dtype,
        int(kind.brain), int(kind.few), int(kind.masked),
    )  # fmt: skip
    return kernel, _layout(fmt, kind, tile_rows)


def _layout(fmt: PageFormat, kind: Kind, tile_rows: int) -> _Layout:
    stored = fmt.padded_key_dim
    staged = -(-stored // 32) * 32
    scratch = scratch_of(tile_rows, staged, fmt.padded_value_dim)
    state = state_bytes(tile_rows, fmt.padded_value_dim)
    lines, before_values = asked_lines(fmt, kind)
    asked = array("i", lines)
    values = {
        "key_dim": fmt.key_dim, "value_dim": fmt.value_dim, "stored_keys": stored,
        "stored_values": fmt.padded_value_dim, "record_end": fmt.record_bytes,
        "asked": asked.buffer_info()[0], "asked_values": before_values, "staged_keys": staged,
        "tile_rows": tile_rows, "state": state, "at_rows": scratch.shared, "row_slot": scratch.rows,
        **{name: field.offset for name, field in fmt.fields.items()},
        **{f"at_{name}": offset for name, offset in scratch.offsets.items()},
    }  # fmt: skip
    block = [values.get(name, 0) for name in FIELDS]
    return _Layout(block, scratch.shared, scratch.rows, state, asked)
