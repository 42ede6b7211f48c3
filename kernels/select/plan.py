"""The plan of selection: a pure function of the sizes, the formats and the device.

Scores and repair read a little of every page for few rows: the heads of a group share a tile of
rows, so that an index row is read once for all of them, and the pages are split until every unit
has work. What a tile holds in registers decides how many pages it has.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

from lath.formats.device import DeviceDescription
from lath.formats.pages import PAGE, PageFormat
from lath.formats.plan import Backend, Plan
from lath.kernels.attention.plan import INTERPRETED_DEVICE, NARROW, multiplies_e4m3, splits

SelectKind = Literal["bound", "mean", "mass", "floor", "token", "label", "repair", "top_k"]
# Rows of scores up to this long are held in registers; longer ones are read in several passes.
MOST_IN_REGISTERS = 1024
RADIX_BLOCK = 2048  # twice as many spill 8 bytes on sm_100
# Scores are not merged: pieces of the pages cost no more than q, and more of them even out waves.
PIECES_PER_UNIT = 4
# Channels of a row of q, of all its bf16 parts, that are kept over a loop: a quarter of it in
# registers, and as many of |q| or of q squared. Longer rows are loaded for every tile of pages.
MOST_KEPT = 256
_FLOATS = {2: "bf16", 4: "fp32"}


class _Case(NamedTuple):
    """What a plan depends on, hashable."""

    sequences: int
    query_heads: int
    kv_heads: int
    queries: int
    pages: int
    fmt: PageFormat
    kind: SelectKind
    device: DeviceDescription
    backend: Backend
    labels: tuple[int, int] | None
    own_lists: bool
    spreads: bool

    @property
    def pack(self) -> int:
        """Query heads that share a tile of rows."""
        return 1 if self.kind == "label" else max(1, self.query_heads // max(self.kv_heads, 1))

    @property
    def rows(self) -> int:
        """Rows of scores, all in all."""
        return self.sequences * self.query_heads * self.queries


def plan_select(
    *,
    sequences: int,
    query_heads: int,
    kv_heads: int,
    queries: int,
    pages: int,
    fmt: PageFormat,
    kind: SelectKind,
    device: DeviceDescription,
    backend: Backend,
    labels: tuple[int, int] | None = None,
    own_lists: bool = False,
    spreads: bool = True,
) -> Plan:
    """The plan of one scoring of pages or tokens, of one repair, or of all top-k after a scoring.

    queries: rows of each head and sequence. pages: of each sequence, P. fmt: of the pages; its
    float_bytes are those of q. labels, for kind "label" alone: (rows of labels that a head reads,
    their bits). own_lists, for "repair" alone: every query head has its own `unread`; spreads: it
    reads those of pages. device: where it runs; a CPU under backend "triton" is the interpreter.
    "top_k" is `plan_top_k` of every row of scores, all taken. ValueError for what does not go
    together.

    bytes_moved: what all programs load and store, where every sequence has `pages` whole pages.
    """
    if kind not in get_args(SelectKind):
        raise ValueError(f"kind must be one of {get_args(SelectKind)}, got {kind!r}")
    if (labels is None) == (kind == "label"):
        raise ValueError(f"labels must be given for kind 'label' alone, got {labels} for {kind!r}")
    if labels is not None and labels[1] not in (4, 8):
        raise ValueError(f"labels must have 4 or 8 bits, got {labels[1]}")
    for name, given, only in (
        ("own_lists", own_lists, "repair"),
        ("spreads=False", not spreads, "repair"),
    ):  # fmt: skip
        if given and kind != only:
            raise ValueError(f"{name} must be given for kind {only!r} alone, got it for {kind!r}")
    if backend == "triton" and device.kind == "cpu":
        device = INTERPRETED_DEVICE
    if kind == "top_k":
        rows = sequences * query_heads * queries
        return plan_top_k(rows=rows, width=pages, k=pages, device=device, backend=backend)
    case = _Case(
        sequences, query_heads, kv_heads, queries, pages, fmt, kind, device, backend, labels,
        own_lists and query_heads != kv_heads, spreads,
    )  # fmt: skip
    return _plan(case)


@functools.lru_cache(maxsize=4096)
def plan_top_k(
    *, rows: int, width: int, k: int, device: DeviceDescription, backend: Backend
) -> Plan:
    """The plan of the largest min(k, width) of each of `rows` rows of `width` scores: a program
    per row, block_n scores of it at once."""
    definition = backend == "reference"
    draft = Plan(
        backend=backend, dataflow="definition" if definition else "select", dot="none",
        reason="the NumPy definition" if definition else f"{device.threads} thread(s)",
        bytes_moved=4 * rows * (width + min(k, width)), operations=0,
        threads=device.threads if backend == "cpu" else 0,
    )  # fmt: skip
    if backend != "triton":
        return draft
    if width <= MOST_IN_REGISTERS:
        block, passes = _power_of_two(width, 16, MOST_IN_REGISTERS), 1
        why = f"{width} scores of a row stay in registers: threshold bit by bit"
    else:
        block, passes = RADIX_BLOCK, 5
        why = f"{width} scores of a row: four radix passes, then one that places"
    return replace(
        draft, block_m=1, block_n=block, warps=max(1, min(8, block // 256)), stages=1, reason=why,
        bytes_moved=4 * rows * (passes * width + min(k, width)),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)  # a decode step asks for the same plan in every layer
def _plan(case: _Case) -> Plan:
    draft = Plan(
        backend=case.backend, dataflow="definition", dot="fp64", reason="the NumPy definition",
        bytes_moved=0, operations=_operations(case),
    )  # fmt: skip
    if case.backend == "reference":
        return replace(draft, bytes_moved=_bytes_moved(case, draft))
    draft = replace(draft, dataflow="select")
    if case.backend == "cpu":
        threads = case.device.threads
        draft = replace(draft, dot="fp32", threads=threads, reason=f"{threads} thread(s)")
    else:
        draft = _split(_tile(draft, case), case)
    return replace(draft, bytes_moved=_bytes_moved(case, draft))


def _tile(draft: Plan, case: _Case) -> Plan:
    """Rows, pages, padded head dim, warps and stages (`tests/test_aot_select.py` compiles them)."""
    fmt, dot = case.fmt, "bf16"
    width = max(fmt.padded_key_dim, fmt.padded_value_dim if case.kind == "repair" else 0)
    wide = width > 128 or (fmt.float_bytes == 4 and width > 64)
    block_n, warps = PAGE, 4
    if case.kind == "token":
        most_rows = 32 if wide or fmt.key.name in {*NARROW, "e4m3"} else 64
        dot = _FLOATS[fmt.float_bytes] if fmt.key.map == "float" else "int8"
        if fmt.key.name == "e4m3":
            dot = "e4m3" if multiplies_e4m3(case.device) else "fp16"
    elif case.kind == "label":
        most_rows = 16 if wide else 32
    else:  # parts of q and |q|, and fields of the pages beside them
        most_rows = 32 if width <= 64 and not (wide or case.kind == "repair") else 16
        block_n = 16 if width > 128 else 32 if width > 64 else 64
        if case.kind == "repair":  # scores, weights and sums at once
            amd = case.device.kind == "hip"  # its lanes have twice the registers, of four warps
            narrow = wide or (case.own_lists and width > 64)
            warps, block_n = 4 if amd else 8, 16 if narrow else 32 if amd else block_n
    return replace(
        draft, dot=dot, block_m=_power_of_two(case.queries * case.pack, 16, most_rows),
        block_n=block_n, block_k=_power_of_two(fmt.padded_key_dim, 16, 1 << 30), pack=case.pack,
        warps=warps, stages=2,
    )  # fmt: skip


def _split(draft: Plan, case: _Case) -> Plan:
    """Pieces of the pages, so that every unit has work."""
    blocks, units = max(1, _blocks(case, draft)), case.device.compute_units
    steps = max(1, -(-case.pages * (PAGE if _tokens(case) else 1) // draft.block_n))
    if case.kind == "repair":  # pieces are merged
        pieces = splits(blocks, steps, units)
    else:
        pieces = min(steps, max(1, -(-PIECES_PER_UNIT * units // blocks)))
        pieces = -(-steps // -(-steps // pieces))  # none without a page
    shared = f"{case.pack} query head(s) share each index row"
    if _tokens(case):
        shared = f"{case.pack} query head(s) share each page"
    reason = f"{shared}; {blocks} tiles on {units} units: {case.pages} pages in {pieces} piece(s)"
    return replace(draft, split_k=pieces, reason=reason)


def _tokens(case: _Case) -> bool:
    return case.kind in ("token", "label")


def _tiles(case: _Case, plan: Plan) -> int:
    """Tiles of rows of the heads that share them."""
    return -(-case.queries * case.pack // plan.block_m) if plan.block_m else 1


def _blocks(case: _Case, plan: Plan) -> int:
    return _tiles(case, plan) * (case.query_heads // case.pack) * case.sequences


def keeps_rows(fmt: PageFormat) -> bool:
    """Whether parts of a row of q and of |q|, bf16 all, stay in registers over a loop."""
    parts = 3 if fmt.float_bytes == 4 else 2
    return parts * _power_of_two(fmt.key_dim, 16, 1 << 30) <= MOST_KEPT


def index_bytes(kind: SelectKind, fmt: PageFormat, spreads: bool = True) -> int:
    """Bytes of one index row that a kind of score reads."""
    mean, per_channel, number = 2 * fmt.key_dim, fmt.key_dim, 4
    return {
        "mean": mean,
        "bound": mean + number + 2 * per_channel,
        "mass": mean + number + per_channel,
        "floor": mean + 2 * number,
        "repair": mean + (number + per_channel if spreads else 0) + 2 * fmt.value_dim,
        "token": mean if fmt.key.map != "float" else 0,
    }.get(kind, 0)


def _bytes_moved(case: _Case, plan: Plan) -> int:
    fmt = case.fmt
    blocks = _blocks(case, plan)
    lists = _list_bytes(case, plan, plan.split_k, 8)  # two lists: pages, and tokens that count
    index = blocks * case.pages * index_bytes(case.kind, fmt, case.spreads)
    query = case.rows * fmt.key_dim * fmt.float_bytes
    loads = plan.split_k if keeps_rows(fmt) or not plan.block_n else -(-case.pages // plan.block_n)
    if case.kind == "token":
        return lists + index + _token_bytes(case, plan, query)
    if case.kind == "label":
        return lists + _label_bytes(case, plan)
    moved = lists + index + query * loads
    if case.kind == "repair":
        return moved + _repair_bytes(case, plan)
    return moved + 4 * case.rows * case.pages


def _list_bytes(case: _Case, plan: Plan, programs: int, per_page: int) -> int:
    """Lists, and two lengths for each of the programs that share the pages."""
    return _blocks(case, plan) * (8 * programs + per_page * case.pages)


def _repair_bytes(case: _Case, plan: Plan) -> int:
    """What was left out, and the outputs: in pieces, and merged, where there are more than one."""
    z = case.rows if case.own_lists else _blocks(case, plan)
    output = 4 * case.rows * (case.fmt.value_dim + 1)
    merged = output + 4 * case.rows * plan.split_k * (case.fmt.value_dim + 2)
    return 4 * z * case.pages + output * plan.split_k + (merged if plan.split_k > 1 else 0)


def _label_bytes(case: _Case, plan: Plan) -> int:
    assert case.labels is not None
    count, bits = case.labels
    blocks, size = _blocks(case, plan), case.fmt.float_bytes
    centre = 0 if case.fmt.key.map == "float" else 2 * count
    per_page = count * PAGE * bits // 8 + 4 + centre
    per_program = 8 * count
    query = case.rows * count * size * plan.split_k
    scores = 4 * case.rows * case.pages * PAGE
    return blocks * (per_page * case.pages + per_program * plan.split_k) + query + scores


def _token_bytes(case: _Case, plan: Plan, query: int) -> int:
    """Keys with their scales, scores; codes of q and q·mean, written and read."""
    fmt, blocks = case.fmt, _blocks(case, plan)
    scores = 4 * case.rows * case.pages * PAGE
    if fmt.key.map == "float":
        keys = blocks * case.pages * PAGE * fmt.key_dim * fmt.float_bytes
        return keys + query * plan.split_k + scores
    scales = 4 + (4 * PAGE if fmt.key.scale_per_token else 0)
    planes = [fmt.fields[name].nbytes for name in ("keys", "keys_low") if name in fmt.fields]
    keys = blocks * case.pages * (sum(planes) + scales)
    # The kernel before the loop of attention takes so many pages for a program.
    pages_each = 16 if fmt.padded_key_dim > 128 else 32 if fmt.float_bytes == 4 else 64
    programs = -(-case.pages // pages_each)
    tiles = max(1, plan.block_m // pages_each)  # it has no more rows than pages
    before = tiles * (_list_bytes(case, plan, programs, 4)) + query * programs
    before += (tiles - 1) * blocks * case.pages * index_bytes("token", fmt)
    code = 2 if plan.dot == "fp16" else 1
    codes = blocks * plan.block_m * (fmt.padded_key_dim * code + 4) * (1 + plan.split_k)
    corrections = 2 * 4 * blocks * plan.block_m * case.pages
    return keys + before + codes + corrections + scores


def _operations(case: _Case) -> int:
    """Of q·k and P·V alike: two for a product."""
    if case.labels is not None:
        return 2 * case.rows * case.pages * PAGE * case.labels[0]
    keys, values = case.fmt.key_dim, case.fmt.value_dim
    products = {
        "mean": keys,
        "bound": 3 * keys,
        "mass": 2 * keys,
        "floor": 2 * keys,
        "repair": (2 if case.spreads else 1) * keys + values,
        "token": PAGE * keys,
    }[case.kind]
    return 2 * case.rows * case.pages * products


def _power_of_two(value: int, low: int, high: int) -> int:
    return max(low, min(high, 1 << max(value - 1, 0).bit_length()))
