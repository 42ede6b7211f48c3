"""The plan of attention: a pure function of the sizes, the formats and the device.

Two facts decide on a GPU. Few rows read every byte of the keys for little work: the heads of a
group share a tile, so that a page is read once for all of them, and the list of pages is split
until every unit has work. Many rows fill a tile of one head; then registers decide its height.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch

from lath.formats.attention import Precision, QueryFormat, ScoreOptions
from lath.formats.device import DeviceDescription, has_e4m3, known_device
from lath.formats.pages import PAGE, SUBPAGES, PageFormat
from lath.formats.plan import Backend, Plan

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Rows that fit one tile with their group are read together; more fill tiles of one head each.
PACKED_ROWS = 64
# Splitting (FlashAttention-3's rule): not where this part of the units has work without it, nor
# with so few pages; else the fewest pieces that reach this part of the best share of full waves.
BUSY_ENOUGH = 0.8
FEW_PAGES = 4
NEAR_BEST = 0.85
MOST_SPLITS = 128
# Codes that are cut out of words in registers.
NARROW = {"int4", "int2", "int8-planes"}
# The interpreter has no device; its launches are planned as for this one.
INTERPRETED_DEVICE = known_device("sm_90")


class _Case(NamedTuple):
    """What a plan depends on, hashable."""

    sequences: int
    query_heads: int
    kv_heads: int
    lists: int  # of a sequence: of its KV heads, or of its query heads
    listed: bool  # each of them its own
    tokens: bool
    subpages: int | None
    queries: int
    keys: int
    float_keys: int
    fmt: PageFormat
    draft: bool
    dtype: torch.dtype
    causal: bool
    window: int | None
    query: QueryFormat
    precision: Precision
    unified: bool
    busy: bool  # more than q·k, causality and P·V of one 8-bit product per score
    crowded: bool  # a mask or a tree's words, or the sums of a second loop, are held beside a tile
    device: DeviceDescription
    backend: Backend

    @property
    def group(self) -> int:
        """Query heads that read the same list of pages."""
        return max(1, self.query_heads // max(self.lists, 1))


def plan_attention(
    *,
    sequences: int,
    query_heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    fmt: PageFormat,
    dtype: torch.dtype,
    options: ScoreOptions,
    device: DeviceDescription,
    backend: Backend,
    lists: int | None = None,
    tokens: bool = False,
    float_keys: int = 0,
    draft: bool = False,
    subpages: int | None = None,
) -> Plan:
    """The plan of one attention.

    queries: rows of the longest sequence. keys: that a row reads at most, in the pages of its list
    and in the float parts (`PageView.most_keys`); float_keys: those of the float parts. dtype: of
    q. device: where it runs; a CPU under backend "triton" is the interpreter. lists: lists of pages
    of a sequence, `PageView.list_heads`: kv_heads, or query_heads (every query head its own: no
    page is shared); None where all heads read one list. tokens: whether its lists have masks of
    tokens; subpages: 16 tokens side by side of which such a list holds one, at most; None: all of
    its pages. draft: as in `PageView`. ValueError for another number of lists, or tokens without,
    or subpages without tokens.

    `Plan.bytes_moved` counts, for each list of each sequence (a KV head's, or a query head's):

        each page of the list, record_bytes (draft_bytes for a draft), without the codes of
        sub-pages that hold no token of it
        the mean of its index row, 2 key_dim bytes, where keys are quantised or the scheme is
        unified; with the latter max, min and unit too, 2 key_dim + 4 bytes
        float_keys keys and values as they are

    and q and o once, with splits the pieces of o and lse (fp32, written and read). Pages of a list
    are ceil((keys - float_keys) / 64): those of full pages. A record counts whole: a kernel leaves
    out its padding and the index unit. Each counts once, however many tiles of rows read it. Not
    counted: tables, masks, and what launches hand to each other (codes of q, q·mean). A window
    counts as the pages that its keys and rows fill.
    """
    if lists not in (None, kv_heads, query_heads):
        raise ValueError(
            f"lists must be None, kv_heads, {kv_heads}, or query_heads, {query_heads}, got {lists}"
        )
    if tokens and lists is None:
        raise ValueError("tokens, masks of the pages of lists, need lists, got lists=None")
    if subpages is not None and not tokens:
        raise ValueError(f"subpages need tokens, masks of the pages of lists, got {subpages}")
    if backend == "triton" and device.kind == "cpu":
        device = INTERPRETED_DEVICE
    case = _Case(
        sequences, query_heads, kv_heads, lists or kv_heads, lists is not None, tokens, subpages,
        queries, keys, float_keys, fmt, draft, dtype, options.causal, options.window, options.query,
        options.precision, options.scheme == "unified", _is_busy(options), _is_crowded(options),
        device, backend,
    )  # fmt: skip
    return _plan(case)


def _is_busy(options: ScoreOptions) -> bool:
    tensors = (options.mask, options.bias, options.alibi, options.tree)
    given = any(tensor is not None for tensor in tensors)
    scored = given or options.softcap is not None
    return scored or options.scheme == "unified" or options.precision == "int16"


def _is_crowded(options: ScoreOptions) -> bool:
    given = options.mask is not None or options.tree is not None
    return given or options.scheme == "unified"


@functools.lru_cache(maxsize=4096)  # a decode step asks for the same plan in every layer
def _plan(case: _Case) -> Plan:
    draft = Plan(
        backend=case.backend,
        dataflow="definition",
        dot="fp64",
        reason="the NumPy definition",
        bytes_moved=_bytes_moved(case),
        operations=_operations(case),
    )
    if case.backend == "reference":
        return draft
    rows = case.queries * case.group
    if case.queries <= 1 or rows <= PACKED_ROWS:
        draft = replace(draft, dataflow="decode", pack=case.group)
        why = f"{rows} row(s) per KV head: its {case.group} query head(s) share each page"
        if case.lists != case.kv_heads:
            why = f"{rows} row(s) per query head, which has its own list of pages"
    else:
        draft = replace(draft, dataflow="prefill")
        why = f"{case.queries} queries fill tiles of one head"
    if case.backend == "cpu":
        return _plan_cpu(draft, case, why)
    dot, why_dot = _dot(case)
    draft = _tile(replace(draft, dot=dot), case)
    return _split(draft, case, [why_dot, why])


def _plan_cpu(draft: Plan, case: _Case, why: str) -> Plan:
    """Pieces of the pages of few KV heads, so that every thread has some."""
    threads, tasks = case.device.threads, max(1, case.sequences * case.lists)
    split = 1
    if draft.dataflow == "decode" and tasks < threads:
        wanted = min(-(-threads // tasks), _pages(case))
        split = max(_distinct(range(1, wanted + 1), _pages(case)), default=1)
    reasons = [why, f"{threads} thread(s)"]
    if split > 1:
        kind = "KV" if case.lists == case.kv_heads else "query"
        reasons.append(f"{tasks} {kind} head(s): {_pages(case)} pages in {split} pieces")
    dot = "fp32" if case.fmt.key.map == "float" or case.query != "int8" else "int8"
    return replace(
        draft, dot=dot, block_n=PAGE, split_k=split, threads=threads, reason="; ".join(reasons)
    )


def multiplies_e4m3(device: DeviceDescription) -> bool:
    """Whether Triton has E4M3 (OCP) numbers and their dot there; elsewhere fp16 stands in."""
    return has_e4m3(device.architecture)


def _dot(case: _Case) -> tuple[str, str]:
    """The type of q·k, and why."""
    name = DTYPE_NAMES[case.dtype]
    if case.fmt.key.map == "float":
        return name, f"{name} keys are multiplied as they are"
    if case.query == "int8":
        return "int8", f"{case.fmt.key} keys: int8 dot, summed in int32"
    if multiplies_e4m3(case.device):
        return "e4m3", "e4m3 queries: e4m3 dot, summed in fp32"
    return "fp16", f"e4m3 queries: fp16 dot, for {case.device.architecture} has none of e4m3"


def _tile(draft: Plan, case: _Case) -> Plan:
    """Rows, padded head dim, warps and stages (`bench/attention_machine_code.py` counts them)."""
    fmt, device = case.fmt, case.device
    widest = max(fmt.padded_key_dim, fmt.padded_value_dim)
    if draft.dataflow == "decode":
        block_m = _power_of_two(case.queries * draft.pack, 16, PACKED_ROWS)
        if case.dtype == torch.float32 or widest > 128:
            block_m = min(block_m, 32)
        # Unrounded or 16-bit weights beside those: up to 112 bytes more than two warps' registers.
        spread = case.crowded and case.precision != "int8"
        if case.dtype == torch.float32:
            warps = 8
        elif block_m == 16 and widest <= 128 and not spread:
            warps = 2  # a page is small work: more warps would repeat the softmax's reductions
        else:  # four warps would spill 8 bytes for head dims above 128 on sm_120
            wide = block_m >= 64 or (widest > 128 and device.capability == 120)
            warps = 8 if wide and widest > 64 else 4
    else:
        block_m, warps = _prefill_tile(case, widest)
    draft = replace(
        draft, block_m=block_m, block_n=PAGE, warps=warps,
        block_k=_power_of_two(fmt.padded_key_dim, 16, 1 << 30),
    )  # fmt: skip
    # The pointers of a second page in flight take 8 to 16 bytes more than the registers: with few
    # rows of head dims above 128, and where a lane holds 64 sums, except on sm_90 and sm_100.
    full = block_m * widest >= 64 * 32 * warps and device.capability not in (90, 100)
    # A decoding tile with integer values, unrounded weights on sm_90: 8 bytes too many as well.
    decoded = device.capability == 90 and case.precision == "float" and case.fmt.value.bits <= 8
    wide = widest > (64 if device.capability == 100 or decoded else 128)
    two = device.kind == "hip" or full or (draft.dataflow == "decode" and wide)
    # Masks of tokens beside a second page in flight: up to 44 bytes too many on AMD's GPUs.
    masked = device.kind == "hip" and case.tokens and draft.dataflow == "prefill"
    one = masked or _is_unpipelined(case, block_m, warps, widest)
    stages = 1 if one else 2 if two else 3
    while stages > 1 and shared_bytes(draft, stages, case.fmt) > device.shared_memory:
        stages -= 1
    return replace(draft, stages=stages)


def _is_unpipelined(case: _Case, block_m: int, warps: int, widest: int) -> bool:
    """A tile of 64 sums a lane that has no register for a second page's pointers.

    With them it spills 8 to 56 bytes, and tiles of fewer sums take up to 1.7 times the
    instructions per score.
    """
    if block_m < 16 * warps or widest <= 64 or case.fmt.key.map != "integer":
        return False
    capability = case.device.capability
    return capability in (86, 89) or (capability == 100 and case.fmt.value.map != "float")


def _prefill_tile(case: _Case, widest: int) -> tuple[int, int]:
    """(rows, warps): as tall as leaves everything in registers. widest: padded head dim."""
    device, codecs = case.device, {case.fmt.key.name, case.fmt.value.name}
    amd, narrow = device.kind == "hip", bool(codecs & NARROW)
    if case.dtype == torch.float32:  # numbers of twice the size, in three parts on NVIDIA
        return (32 if widest <= 64 else 16), 8
    if widest > 128:
        return 32, 4 if amd else 8
    # Masks of tokens: up to 16 bytes too many in the tallest tiles, and lists 8 on gfx950.
    if case.busy or case.tokens or (case.listed and device.architecture == "gfx950"):
        return (64 if widest <= 64 else 32), 8
    if widest <= 64:
        return (64, 4) if amd else (128, 8)
    decoded = "e4m3" in codecs and not multiplies_e4m3(device)  # to fp16
    masked = case.window is not None or widest & (widest - 1) != 0
    if narrow or decoded or masked or case.fmt.key.map == "float":
        return 64, 4 if amd and narrow and case.precision != "float" else 8
    # 128 rows take 219 to 255 of 255 registers where they fit, and half the instructions per score
    # of 64 rows of as many warps, which each decode all values for their own rows.
    float_values, weights = case.fmt.value.map == "float", case.precision
    plain = "e4m3" not in codecs and (float_values or weights == "int8")
    if amd:  # gfx950 with codes beside float parts: 40 bytes too many
        fits = plain and (float_values or device.architecture != "gfx950")
    elif device.capability >= 100:  # 16 bytes too many with codes; on sm_120 up to 72
        fits = device.capability < 120 and float_values
    elif device.capability in (86, 89):
        fits = plain or weights == "e4m3"
    else:  # sm_80 with float values: 8 bytes too many
        fits = device.capability == 90 or weights == "int8"
    if fits:
        return 128, 8
    # Half the warps: as many registers a lane, for two programs a unit (sm_120 with int8 weights
    # would spill 8 to 40 bytes).
    halved = plain and (float_values or device.capability < 120) and not amd
    return 64, 4 if halved else 8


def shared_bytes(plan: Plan, stages: int, fmt: PageFormat) -> int:
    """An upper estimate of the shared memory of a tile: pages in flight, q, weights."""
    size = 2 if fmt.float_bytes == 2 else 4
    per_key = [
        channels * (fmt.float_bytes if codec.map == "float" else codec.bits / 8)
        for codec, channels in (
            (fmt.key, fmt.padded_key_dim),
            (fmt.value, fmt.padded_value_dim),
        )
    ]
    pages = PAGE * sum(per_key) * max(stages - 1, 1)
    return int(pages + plan.block_m * (plan.block_k * size + PAGE * size))


def _bytes_moved(case: _Case) -> int:
    """As `plan_attention` says, without the pieces of splits."""
    fmt, token = case.fmt, (case.fmt.key_dim + case.fmt.value_dim) * case.dtype.itemsize
    page = fmt.read_bytes(case.draft)
    if fmt.key.map != "float" or case.unified:
        page += 2 * fmt.key_dim
    if case.unified:
        page += 2 * fmt.key_dim + 4
    pages = _pages(case)
    of_a_list = pages * page + _keys(case)[1] * token
    if case.subpages is not None:
        unread = SUBPAGES * pages - min(case.subpages, SUBPAGES * pages)
        of_a_list -= unread * fmt.subpage_bytes(case.draft)
    rows = case.sequences * case.query_heads * case.queries
    return case.sequences * case.lists * of_a_list + rows * token


def _operations(case: _Case) -> int:
    pairs = case.queries * case.keys
    if case.causal:
        pairs -= min(case.queries, case.keys) * (min(case.queries, case.keys) - 1) // 2
    if case.window is not None:
        pairs = min(pairs, case.queries * case.window * (1 if case.causal else 2))
    heads = case.sequences * case.query_heads
    return 2 * heads * pairs * (case.fmt.key_dim + case.fmt.value_dim)


def _keys(case: _Case) -> tuple[int, int]:
    """Keys in pages and in float parts that the rows of a sequence can read."""
    floats = min(case.float_keys, case.keys)
    if case.window is not None:
        reach = case.queries + case.window * (1 if case.causal else 2)
        if reach < case.keys:  # they may lie in pages, all of them
            return reach, 0
    return case.keys - floats, floats


def _pages(case: _Case) -> int:
    """Pages of a list that the rows of a sequence can read."""
    return -(-_keys(case)[0] // PAGE)


def _split(draft: Plan, case: _Case, reasons: list[str]) -> Plan:
    tiles = -(-case.queries * draft.pack // draft.block_m)
    blocks = max(1, tiles * case.sequences * (case.query_heads // draft.pack))
    pages, units = _pages(case), case.device.compute_units
    split = splits(blocks, pages, units)
    if split > 1:
        reasons = [*reasons, f"{blocks} tiles on {units} units: {pages} pages in {split} pieces"]
        rows = case.sequences * case.query_heads * case.queries
        workspace = 8 * split * rows * (case.fmt.value_dim + 1)
        draft = replace(draft, bytes_moved=draft.bytes_moved + workspace)
    return replace(draft, split_k=split, reason="; ".join(reasons))


def splits(blocks: int, pages: int, units: int) -> int:
    """Pieces of `pages` pages for `blocks` tiles on `units` units."""
    if blocks >= BUSY_ENOUGH * units or pages <= FEW_PAGES:
        return 1

    def efficiency(pieces: int) -> float:
        waves = blocks * pieces / units
        return waves / math.ceil(waves)

    possible = list(_distinct(range(1, min(MOST_SPLITS, pages) + 1), pages))
    best = max(efficiency(pieces) for pieces in possible)
    return next(pieces for pieces in possible if efficiency(pieces) >= NEAR_BEST * best)


def _distinct(candidates: Iterable[int], pages: int) -> Iterable[int]:
    """Those that leave no piece without a page."""
    for pieces in candidates:
        each = -(-pages // pieces)
        if each * (pieces - 1) < pages:
            yield pieces


def _power_of_two(value: int, low: int, high: int) -> int:
    return max(low, min(high, 1 << max(value - 1, 0).bit_length()))
