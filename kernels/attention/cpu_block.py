"""The argument block of an attention call: what the kernels find in the tensors and options.

Also which page lists there are: one of a sequence, or of each KV head, or of each query head.
"""

from __future__ import annotations

import functools
import struct
from array import array
from typing import NamedTuple

from torch import Tensor

from lath.formats.attention import LOG2E, PageView, Queries, ScoreOptions
from lath.kernels.attention.cpu_arguments import FAR, INDEX, LIST_FIELDS

# Name, place in the block, bytes of an entry.
_LISTS = [(name, INDEX[name], 8 if name == "tokens" else 4) for name in LIST_FIELDS]


class Lists(NamedTuple):
    """heads: those that pages are read for, each with `group` query heads; `repeat` of them read
    the pages of one KV head. shared: all of them read one list."""

    heads: int
    group: int
    repeat: int
    shared: bool


def lists_of(pages: PageView, query_heads: int) -> Lists:
    """ValueError for lists of other heads than KV or query heads, and for masks without lists."""
    kv_heads, heads = pages.num_kv_heads, pages.list_heads
    if heads is None:
        if pages.tokens is not None:
            raise ValueError("tokens must come with lists: table is [S, P], it must be [S, H, P]")
        return _one_list(kv_heads, query_heads)
    if heads not in (kv_heads, query_heads):
        raise ValueError(
            f"table must hold lists of {kv_heads} KV or {query_heads} query heads, got {heads}"
        )
    tensors = [getattr(pages, name) for name in LIST_FIELDS]
    strides = [tensor.stride() for tensor in tensors if tensor is not None]
    if pages.table.shape[2] > 1 and any(stride[2:] not in ((), (1,)) for stride in strides):
        raise ValueError(
            "table, starts, counts and tokens must have stride 1 in their last axis, got strides "
            f"{strides}"
        )
    if heads == 1 or not any(stride[1] for stride in strides):
        return _one_list(kv_heads, query_heads)
    return Lists(heads, query_heads // heads, heads // kv_heads, False)


@functools.lru_cache(maxsize=64)
def _one_list(kv_heads: int, query_heads: int) -> Lists:
    return Lists(kv_heads, query_heads // kv_heads, 1, True)


def fill_rows(block: array[int], queries: Queries, o: Tensor, lse: Tensor) -> None:
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


def fill_pages(block: array[int], pages: PageView, lists: Lists) -> None:
    for name, tensor in (("records", pages.records), ("index", pages.index)):
        at = INDEX[name]
        page, head, _ = tensor.stride()
        block[at], block[at + 1], block[at + 2] = tensor.data_ptr(), page, head
    for name, at, size in _LISTS:
        tensor = getattr(pages, name)
        if tensor is not None:
            stride = tensor.stride()
            block[at], block[at + 1] = tensor.data_ptr(), size * stride[0]
            if not lists.shared:
                block[at + 2] = size * stride[1]
    block[INDEX["lengths"]] = pages.lengths.data_ptr()
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


def options_tensors(options: ScoreOptions, longest: int) -> dict[str, Tensor]:
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


def fill_options(block: array[int], options: ScoreOptions, kept: dict[str, Tensor]) -> None:
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
