"""Attention over pages on a CPU: compiled kernels (cpu_loop.py), shared by torch's threads."""

from __future__ import annotations

import functools
import math
import struct
from array import array
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lath.formats.attention import LOG2E, PageView, Queries, ScoreOptions
from lath.formats.pages import PageFormat
from lath.formats.plan import Plan

try:
    import numba  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the compiled CPU kernels need numba: pip install 'lath[cpu]'", name=error.name
    ) from error

from lath.kernels.attention.cpu_arguments import FAR, FIELDS, INDEX, ROWS
from lath.kernels.attention.cpu_loop import emit_attend, emit_merge
from lath.kernels.attention.cpu_scratch import scratch_of, state_bytes
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.emitter import BF16, FP16, FP32
from lath.kernels.simd.isa import has_native_brain, host_isa
from lath.kernels.simd.workers import Slots, run_units

DTYPES = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}
# Rows that read a page before the next is fetched: their state stays in the second-level cache.
TILE_ROWS = 64
_SLOTS = Slots(INDEX["task"], INDEX["thread_number"], INDEX["thread_count"])


def attend(
    queries: Queries, pages: PageView, options: ScoreOptions, plan: Plan
) -> tuple[Tensor, Tensor]:
    """o [B, Hq, L, E] of q's dtype and lse fp32 [B, Hq, L] (`lath.formats.attention`).

    plan.split_k: pieces of each page list, worked on apart and merged in their order. The float
    parts must have q's dtype, as float codecs must. NotImplementedError for scheme "unified": a
    thread goes over its pages in order, and a bound known beforehand would cost it a second pass.
    """
    q = queries.q
    if options.scheme == "unified":
        raise NotImplementedError("scheme 'unified' has no CPU kernel: scheme must be 'online'")
    if q.dtype not in DTYPES:
        raise TypeError(f"q must be float32, float16 or bfloat16, got {q.dtype}")
    batch, heads, rows, _ = q.shape
    fmt, packed = pages.format, queries.offsets is not None
    shape = (batch, heads, rows)
    o = q.new_empty((*shape, fmt.value_dim))
    lse = q.new_empty(shape, dtype=torch.float32)
    if packed:  # rows of no sequence stay as they are here
        o.zero_()
        lse.fill_(-math.inf)
    if o.numel() == 0 or pages.num_sequences == 0:
        return o, lse
    kept = _options_tensors(options, pages.longest)
    division = _divide(
        pages.num_sequences, pages.num_kv_heads, heads // pages.num_kv_heads,
        queries.longest if packed else rows, plan.split_k, torch.get_num_threads(),
    )  # fmt: skip
    kernel = _compiled(
        fmt, q.dtype, options.query, options.precision, pages.draft, division.tile_rows <= ROWS
    )
    layout = _layout(fmt, division.tile_rows)
    block = array("q", layout.block)
    scratch = _place(block, layout, division)
    block[INDEX["row_limit"]] = 0 if packed else rows
    _fill_rows(block, queries, o, lse)
    _fill_pages(block, pages)
    _fill_options(block, options, kept)
    address = block.buffer_info()[0]
    run_units(kernel, block, address, division.units, _SLOTS)
    if division.splits > 1:
        run_units(_merge(q.dtype), block, address, division.units // division.splits, _SLOTS)
    del scratch  # until here the kernels wrote into it
    return o, lse


class _Division(NamedTuple):
    """How one attention is divided into units (cpu_rows.Unit)."""

    group: int
    kv_heads: int
    tile_rows: int
    tiles: int
    splits: int
    chunk: int
    chunks: int
    units: int
    threads: int
    states: int


@functools.lru_cache(maxsize=1024)  # a decode step asks for the same in every layer
def _divide(
    sequences: int, kv_heads: int, group: int, longest: int, splits: int, threads: int
) -> _Division:
    """longest: rows of q of the longest sequence."""
    rows = max(longest, 1) * group
    tile_rows = min(TILE_ROWS, -(-rows // ROWS) * ROWS)
    tiles = -(-rows // tile_rows)
    chunk = 1
    if tile_rows <= ROWS:
        # All KV heads at once, unless threads would stand idle.
        chunk = -(-kv_heads // -(-threads // (sequences * tiles * splits)))
    chunks = -(-kv_heads // chunk)
    units = sequences * chunks * tiles * splits
    threads = min(threads, units)
    states = threads * chunk if splits == 1 else sequences * kv_heads * tiles * splits
    return _Division(
        group, kv_heads, tile_rows, tiles, splits, chunk, chunks, units, threads, states
    )


def _place(block: array[int], layout: _Layout, division: _Division) -> Tensor:
    """Memory for scratch and states; enters it and the division into the block."""
    slot = layout.shared + division.chunk * layout.rows
    threads = division.threads
    scratch = torch.empty(threads * slot + division.states * layout.state, dtype=torch.uint8)
    start = scratch.data_ptr()
    for name in ("group", "kv_heads", "tiles", "splits", "chunk", "chunks", "units"):
        block[INDEX[name]] = getattr(division, name)
    block[INDEX["scratch"]], block[INDEX["slot"]] = start, slot
    block[INDEX["states"]] = start + threads * slot
    return scratch


@functools.cache
def _compiled(
    fmt: PageFormat, dtype: torch.dtype, query: str, precision: str, draft: bool, few: bool
) -> Any:
    def name(codec: str) -> str:
        return "draft" if draft and codec == "int8-planes" else codec

    brain = dtype == torch.bfloat16 and has_native_brain(host_isa())
    return compile_kernel(
        emit_attend, name(fmt.key.name), name(fmt.value.name), precision, query, DTYPES[dtype],
        int(brain), int(few),
    )  # fmt: skip


@functools.cache
def _merge(dtype: torch.dtype) -> Any:
    return compile_kernel(emit_merge, DTYPES[dtype])


@dataclass(frozen=True)
class _Layout:
    """What a page format and a height of tile settle: an argument block, bytes of scratch that a
    thread needs once and for each tile at hand, bytes of a tile's state."""

    block: list[int]
    shared: int
    rows: int
    state: int


@functools.lru_cache(maxsize=256)
def _layout(fmt: PageFormat, tile_rows: int) -> _Layout:
    stored = fmt.padded_key_dim
    staged = -(-stored // 32) * 32
    scratch = scratch_of(tile_rows, staged, fmt.padded_value_dim)
    state = state_bytes(tile_rows, fmt.padded_value_dim)
    values = {
        "key_dim": fmt.key_dim, "value_dim": fmt.value_dim, "stored_keys": stored,
        "stored_values": fmt.padded_value_dim, "record_end": fmt.record_bytes,
        "staged_keys": staged,
        "tile_rows": tile_rows, "state": state, "at_rows": scratch.shared, "row_slot": scratch.rows,
        **{name: field.offset for name, field in fmt.fields.items()},
        **{f"at_{name}": offset for name, offset in scratch.offsets.items()},
    }  # fmt: skip
    return _Layout([values.get(name, 0) for name in FIELDS], scratch.shared, scratch.rows, state)


def _fill_rows(block: array[int], queries: Queries, o: Tensor, lse: Tensor) -> None:
    q = queries.q
    for name, tensor in (("q", q), ("o", o)):
        size, at = tensor.element_size(), INDEX[name]
        batch, head, row, _ = tensor.stride()
        block[at] = tensor.data_ptr()
        block[at + 1], block[at + 2], block[at + 3] = batch * size, head * size, row * size
    at = INDEX["lse"]
    block[at], block[at + 1], block[at + 2] = lse.data_ptr(), 4 * lse.stride(0), 4 * lse.stride(1)
    block[INDEX["query_lengths"]] = queries.lengths.data_ptr()
    if queries.offsets is not None:
        block[INDEX["offsets"]] = queries.offsets.data_ptr()


def _fill_pages(block: array[int], pages: PageView) -> None:
    for name, tensor in (("records", pages.records), ("index", pages.index)):
        at = INDEX[name]
        page, head, _ = tensor.stride()
        block[at], block[at + 1], block[at + 2] = tensor.data_ptr(), page, head
    for name in ("table", "starts", "counts", "page_counts", "lengths"):
        block[INDEX[name]] = getattr(pages, name).data_ptr()
    block[INDEX["table_row"]] = 4 * pages.table.stride(0)
    for name, keys, values, lengths in (
        ("first", pages.first_keys, pages.first_values, pages.first_lengths),
        ("last", pages.last_keys, pages.last_values, pages.last_lengths),
    ):
        if keys is None or values is None or lengths is None:
            continue
        at = INDEX[f"{name}_keys"]
        for tensor in (keys, values):
            size = tensor.element_size()
            batch, head, row, _ = tensor.stride()
            block[at] = tensor.data_ptr()
            block[at + 1], block[at + 2], block[at + 3] = batch * size, head * size, row * size
            at += 4
        block[at] = lengths.data_ptr()


def _options_tensors(options: ScoreOptions, longest: int) -> dict[str, Tensor]:
    """Tensors of the options as the kernel reads them; the caller keeps them alive."""
    kept = {}
    for name in ("bias", "mask"):
        tensor = getattr(options, name)
        if tensor is not None:
            tensor = tensor.reshape((1,) * (4 - tensor.dim()) + tensor.shape)
            tensor = tensor.float() if name == "bias" else tensor
            if tensor.shape[3] == 1 and longest > 1:
                tensor = tensor.expand(*tensor.shape[:3], longest)
            kept[name] = tensor if tensor.stride(3) == 1 else tensor.contiguous()
    for name in ("alibi", "sink"):
        tensor = getattr(options, name)
        if tensor is not None:
            kept[name] = tensor.float().contiguous()
    if options.tree is not None:
        kept["tree"] = options.tree.contiguous()
    return kept


def _fill_options(block: array[int], options: ScoreOptions, kept: dict[str, Tensor]) -> None:
    block[INDEX["scale"]] = _bits(options.scale * LOG2E)
    symmetric = not options.causal and options.window is not None
    nearest = 0 if options.causal and options.tree is None else -FAR
    farthest = FAR
    if options.window is not None:
        farthest = min(options.window - 1, FAR)
        nearest = -farthest if symmetric else nearest
    block[INDEX["nearest"]], block[INDEX["farthest"]] = nearest, farthest
    if options.softcap is not None:
        block[INDEX["softcap"]] = _bits(options.softcap * LOG2E)
    block[INDEX["special"]] = int(
        options.softcap is not None or any(name != "sink" for name in kept)
    )
    for name in ("alibi", "sink"):
        if name in kept:
            block[INDEX[name]] = kept[name].data_ptr()
    for name in ("bias", "mask"):
        if name in kept:
            at, tensor = INDEX[name], kept[name]
            size = tensor.element_size()
            block[at], block[at + 4] = tensor.data_ptr(), tensor.shape[3]
            for axis in range(3):
                repeated = tensor.shape[axis] == 1
                block[at + 1 + axis] = 0 if repeated else tensor.stride(axis) * size
    if "tree" in kept:
        at, tree = INDEX["tree"], kept["tree"]
        block[at], block[at + 1] = tree.data_ptr(), 4 * tree.stride(0)
        block[at + 2] = 4 * tree.stride(1)


@functools.lru_cache(maxsize=64)
def _bits(value: float) -> int:
    """The bits of a float as fp32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
