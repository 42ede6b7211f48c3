"""What turns products q·k into scores, and which keys a row may read.

`row` is the tuple (position, token, head, present) of a tile's rows, each [BM]. `extras` holds what
the options need at run time: (window, softcap * log2(e), mask, its row and key strides, bias, its
row and key strides, alibi, tree, its row stride, position of the first query); tensors already at
the sequence. OPTIONS is the constexpr tuple (causal, window, softcap, mask, bias, alibi, tree,
tokens), all flags but window: 0 none, 1 backwards, 2 both ways; tokens, the masks of a list's
pages, is `add_pages`'s. Scores are in units of log 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def soft(x, cap):
    """cap * tanh(y) of x = 2 log2(e) y: the form that overflows into the right limits."""
    return cap - 2.0 * cap / (1.0 + tl.exp2(x))


@triton.jit
def adjust(scores, start, count, row, extras, OPTIONS: tl.constexpr):
    """Scores [BM, 64] of the keys start .. start + 63 after softcap, bias and slope."""
    key = start + tl.arange(0, 64)
    if OPTIONS[2]:
        scores = soft(scores, extras[1])
    if OPTIONS[4]:
        at = row[2].to(tl.int64) * extras[7] + row[1].to(tl.int64) * extras[8]
        inside = row[3][:, None] & (tl.arange(0, 64) < count)[None, :]
        offsets = at[:, None] + (key.to(tl.int64) * extras[9])[None, :]
        bias = tl.load(extras[6] + offsets, mask=inside, other=0.0).to(tl.float32)
        scores += bias * _LOG2E
    if OPTIONS[5]:
        slope = tl.load(extras[10] + row[2], mask=row[3], other=0.0).to(tl.float32) * _LOG2E
        distance = row[0][:, None] - key[None, :]
        scores -= slope[:, None] * distance.to(tl.float32)
    return scores


@triton.jit
def readable(start, count, row, extras, OPTIONS: tl.constexpr):
    """bool [BM, 64]: which of the keys start .. start + count - 1 a row may read."""
    slot = tl.arange(0, 64)
    key = (start + slot)[None, :]
    allowed = row[3][:, None] & (slot < count)[None, :]
    distance = row[0][:, None] - key
    if OPTIONS[0]:
        allowed &= distance >= 0
    if OPTIONS[1] > 0:
        allowed &= distance < extras[0]
    if OPTIONS[1] == 2:
        allowed &= -distance < extras[0]
    if OPTIONS[3]:
        at = row[2].to(tl.int64) * extras[3] + row[1].to(tl.int64) * extras[4]
        offsets = at[:, None] + key.to(tl.int64) * extras[5]
        allowed &= tl.load(extras[2] + offsets, mask=allowed, other=0) != 0
    if OPTIONS[6]:
        node = key - extras[13]
        at = row[1].to(tl.int64)[:, None] * extras[12] + node // 32
        words = tl.load(extras[11] + at, mask=allowed & (node >= 0), other=0)
        allowed &= (node < 0) | (((words >> (node % 32)) & 1) != 0)
    return allowed


@triton.jit
def selected(tokens):
    """bool [64]: bits of an int64, the lowest first. Words of 32 bits: no lane shifts 64."""
    slot = tl.arange(0, 64)
    word = tl.where(slot < 32, tokens.to(tl.int32), (tokens >> 32).to(tl.int32))
    return ((word >> (slot % 32)) & 1) != 0


@triton.jit
def readable_pages(starts, counts, pages, low, high):
    """(first, last): the pages that hold a position from low to high."""
    first, last = pages * 0, pages * 0
    for at in range(0, pages, 256):
        entry = at + tl.arange(0, 256)
        start = tl.load(starts + entry, mask=entry < pages, other=0)
        count = tl.load(counts + entry, mask=entry < pages, other=0)
        first += tl.sum(((entry < pages) & (start + count <= low)).to(tl.int32), 0)
        last += tl.sum(((entry < pages) & (start <= high)).to(tl.int32), 0)
    return first, last


@triton.jit
def clean_pages(starts, counts, pages, low, high):
    """(first, last): a run of full pages with all positions from low to high."""
    first = pages * 0
    for at in range(0, pages, 256):
        entry = at + tl.arange(0, 256)
        start = tl.load(starts + entry, mask=entry < pages, other=0)
        first += tl.sum(((entry < pages) & (start < low)).to(tl.int32), 0)
    last = pages
    for at in range(0, pages, 256):
        entry = at + tl.arange(0, 256)
        start = tl.load(starts + entry, mask=entry < pages, other=0)
        count = tl.load(counts + entry, mask=entry < pages, other=0)
        broken = (entry >= first) & ((count < 64) | (start + 63 > high))
        last = tl.minimum(last, tl.min(tl.where(broken, entry, pages), 0))
    return first, last
