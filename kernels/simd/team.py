"""The compiled half of a team: threads that run one program together, and never wait for one
another.

The owner, the thread that calls, walks the rows. Rows that are shared are opened as a *region*: its
units are cut into pieces, and whoever is there claims the next piece. Helpers write what they
compute into memory of their own, and say so; the owner copies it. A piece whose helper does not
answer in the time of two pieces (it lost its core) the owner computes again: what the helper writes
when it comes back is read by nobody. So a helper that is slow, away or dead costs one piece, never
a slice of the scheduler, and numbers depend on no thread.

Every word of the protocol lies at a fixed place of the `control` block. The ticket is

    epoch << 24 | pieces of the region << 12 | pieces claimed

where epochs count regions, so that a claim says of which region it is. What a helper reads of a
region after its claim counts only if the ticket still has that epoch (else it comes too late).
"""

from __future__ import annotations

import functools
from typing import Any

from numba import types
from numba.extending import register_jitable

from lath.kernels.simd.atomics import (
    add_shared,
    call_system,
    copy_bytes,
    fetch_line,
    load_shared,
    pause,
    store_integer,
    store_shared,
    swap_shared,
)
from lath.kernels.simd.compile import call_kernel, driver, kernel_key, load_integer

ROW = 6  # int64 of a row of a program
LARGEST_TEAM = 64
MOST_PIECES = 2048  # of a region

_LINE = 128  # bytes that no two threads write
# The control block: bytes from its start.
TICKET, REGION, OWNED, BELL, PARKED = 0, _LINE, 2 * _LINE, 3 * _LINE, 3 * _LINE + 8
ADMITTED, STOP, ENDED = 4 * _LINE, 4 * _LINE + 8, 4 * _LINE + 16
RESTING, REST = 2 * _LINE + 8, 2 * _LINE + 16  # runs still to be alone, and how many the next time
CALLS = 5 * _LINE  # addresses: clock_gettime, syscall, sched_setscheduler, setpriority
FUTEX = CALLS + 32  # its number as a system call
LONGEST_REST = CALLS + 48  # runs by one thread at most, before helpers are tried again
POLITE = CALLS + 40  # whether helpers take only what others leave of a core
CLOCK = 6 * _LINE  # the owner's struct timespec
HANDICAP = CLOCK + 16  # ns that the owner leaves a region to its helpers, for tests
HELPERS = 7 * _LINE  # of each a line: busy, control, number, a struct timespec
DONE = HELPERS + LARGEST_TEAM * _LINE  # of each piece: epoch << 8 | the helper that has done it
_OWN = DONE + 8 * MOST_PIECES  # of each piece: the epoch in which the owner did it
CONTROL_BYTES = _OWN + 8 * MOST_PIECES

# A share (program.py): int64 fields.
SHARE_FIELDS = (
    "units", "piece",  # units that are claimed together
    "each",  # 1: kernel(unit, units, block) for each unit; 0: kernel(begin, end, block)
    "block",  # the owner's arguments
    "blocks", "stride", "helpers",  # the helpers': address of the first, bytes between, how many
    "target",  # where results belong
    "results", "results_stride",  # where the first helper writes them, bytes between helpers
    "unit_bytes", "bytes",  # of the results of a unit (the last may have fewer) and of all
)  # fmt: skip
SHARE = {name: 8 * index for index, name in enumerate(SHARE_FIELDS)}

# What is counted, int64.
TALLY_FIELDS = (
    "helpers",  # that were admitted last
    "runs",  # of programs in which helpers might take part
    "pieces",  # of regions
    "helped",  # of them by helpers
    "again",  # of them by the owner after a helper had claimed them
    "refused",  # runs by one thread because another Python thread had the helpers
    "rested",  # runs by one thread because helpers had not come
)
TALLY = {name: index for index, name in enumerate(TALLY_FIELDS)}

# Where helpers do less than this share of the pieces (other processes have the cores), the next run
# is by one thread, then 2, 4, … are, up to LONGEST_REST: a run with nobody there is 2 % slower.
VAIN = 16

# What `run` returns.
ALONE, IDLE, BUSY = 0, 1, 2

CLAIMED = (1 << 12) - 1
_ROWS_AHEAD, _ASKED = 6, 5  # rows whose arguments are asked for ahead, and lines of those
# ns that the owner waits for a piece: twice its own time of one, and what a message takes.
_MESSAGE, _LONGEST_WAIT = 2_000, 100_000
_FUTEX_WAKE = 129  # of this process alone
_MONOTONIC = 1

_UNITS, _PIECE, _EACH = SHARE["units"], SHARE["piece"], SHARE["each"]
_BLOCK, _TARGET = SHARE["block"], SHARE["target"]
_RESULTS, _RESULTS_STRIDE = SHARE["results"], SHARE["results_stride"]
_UNIT_BYTES, _BYTES = SHARE["unit_bytes"], SHARE["bytes"]
_KERNEL, _ARGUMENTS, SHARE_AT, _BARRIER = 0, 24, 32, 40  # bytes in a row
_COUNT = tuple(8 * TALLY[name] for name in TALLY_FIELDS)
_ADMITTED_COUNT, _RUNS, _PIECES, _HELPED, _AGAIN, _REFUSED, _RESTED = _COUNT


@register_jitable
def now(control, scratch):
    """Nanoseconds. scratch: address of 16 bytes."""
    call_system(load_integer(control + CALLS), _MONOTONIC, scratch, 0, 0, 0)
    return 1_000_000_000 * load_integer(scratch) + load_integer(scratch + 8)


@register_jitable
def _count(tally, place, number):
    store_integer(tally + place, load_integer(tally + place) + number)


@register_jitable
def _pieces(share):
    piece = load_integer(share + _PIECE)
    return (load_integer(share + _UNITS) + piece - 1) // piece


@register_jitable
def locate(first, claim):
    """The row of a region (0: none) to which a piece belongs, and its number there."""
    at = first
    while True:
        count = _pieces(load_integer(at + SHARE_AT))
        if claim < count:
            return at, claim
        if load_integer(at + _BARRIER) != 0:
            return 0, claim
        claim -= count
        at += 8 * ROW


@register_jitable
def compute(key, at, share, piece, block):
    kernel, units = load_integer(at + _KERNEL), load_integer(share + _UNITS)
    size = load_integer(share + _PIECE)
    begin = piece * size
    end = min(units, begin + size)
    if load_integer(share + _EACH) != 0:
        for unit in range(begin, end):
            call_kernel(key, kernel, unit, units, block)
    else:
        call_kernel(key, kernel, begin, end, block)


@register_jitable
def _compute_own(key, first, claim):
    at, piece = locate(first, claim)
    share = load_integer(at + SHARE_AT)
    compute(key, at, share, piece, load_integer(share + _BLOCK))


@register_jitable
def _fetch(first, claim, helper):
    """Copy a helper's piece to where it belongs."""
    at, piece = locate(first, claim)
    share = load_integer(at + SHARE_AT)
    size = load_integer(share + _PIECE) * load_integer(share + _UNIT_BYTES)
    begin = piece * size
    count = min(load_integer(share + _BYTES), begin + size) - begin
    source = load_integer(share + _RESULTS) + (helper - 1) * load_integer(share + _RESULTS_STRIDE)
    copy_bytes(load_integer(share + _TARGET) + begin, source + begin, count)


@register_jitable
def _collect(key, control, first, pieces, epoch, patience, tally):
    """The pieces of a region that the owner has not done: from their helpers, or anew."""
    helped = again = 0
    for claim in range(pieces):
        if load_integer(control + _OWN + 8 * claim) == epoch:
            continue
        place = control + DONE + 8 * claim
        stamp = load_shared(place)
        if stamp >> 8 != epoch:
            limit = now(control, control + CLOCK) + patience
            while stamp >> 8 != epoch and now(control, control + CLOCK) < limit:
                for _ in range(8):
                    pause()
                stamp = load_shared(place)
        if stamp >> 8 == epoch:
            _fetch(first, claim, stamp & 255)
            helped += 1
        else:
            _compute_own(key, first, claim)
            again += 1
    _count(tally, _HELPED, helped)
    _count(tally, _AGAIN, again)


@register_jitable
def _region(key, control, first, pieces, tally):
    """The shared rows from `first` to the next barrier."""
    epoch = (load_shared(control + TICKET) >> 24) + 1
    store_shared(control + REGION, first)
    store_shared(control + TICKET, epoch << 24 | pieces << 12)
    begun, own = now(control, control + CLOCK), 0
    if load_integer(control + HANDICAP) != 0:
        limit = begun + load_integer(control + HANDICAP)
        while now(control, control + CLOCK) < limit:
            pause()
    claim = add_shared(control + TICKET, 1) & CLAIMED
    while claim < pieces:
        _compute_own(key, first, claim)
        store_integer(control + _OWN + 8 * claim, epoch)
        own += 1
        claim = add_shared(control + TICKET, 1) & CLAIMED
    _count(tally, _PIECES, pieces)
    if own < pieces:
        taken = now(control, control + CLOCK) - begun
        patience = min(_MESSAGE + 2 * taken // max(own, 1), _LONGEST_WAIT)
        _collect(key, control, first, pieces, epoch, patience, tally)


@register_jitable
def _is_asked(again):
    """Whether the rows that were run are wanted once more. again: address of an int64, or 0."""
    return again != 0 and load_integer(again) != 0


@register_jitable
def run_rows(key, rows, count, again):
    """All units of every row, one row after another; all of it as often as asked."""
    asked = True
    while asked:
        for i in range(count):
            at = rows + 8 * ROW * i
            begin, end = load_integer(at + 8), load_integer(at + 16)
            call_kernel(key, load_integer(at), begin, end, load_integer(at + _ARGUMENTS))
        asked = _is_asked(again)


@register_jitable
def _ask_ahead(rows, begin, end):
    """Arguments and shares of the rows to come, which each token finds in memory alone."""
    for i in range(begin, end):
        at = rows + 8 * ROW * i
        for line in range(_ASKED):
            fetch_line(load_integer(at + _ARGUMENTS) + 64 * line)
        share = load_integer(at + SHARE_AT)
        if share != 0:
            fetch_line(share)
            fetch_line(share + 64)


@register_jitable
def _walk(key, control, rows, count, tally):
    i, asked = 0, 0
    while i < count:
        if asked < min(i + _ROWS_AHEAD, count):
            _ask_ahead(rows, asked, min(i + _ROWS_AHEAD, count))
            asked = min(i + _ROWS_AHEAD, count)
        first = rows + 8 * ROW * i
        if load_integer(first + SHARE_AT) == 0:
            run_rows(key, first, 1, 0)
            i += 1
            continue
        pieces, open_row = 0, True
        while open_row:
            at = rows + 8 * ROW * i
            pieces += _pieces(load_integer(at + SHARE_AT))
            open_row = load_integer(at + _BARRIER) == 0
            i += 1
        _region(key, control, first, pieces, tally)


@register_jitable
def _settled(control, helpers):
    """Whether no helper is inside a piece: those that only look are gone in a moment."""
    limit = now(control, control + CLOCK) + _MESSAGE
    for number in range(helpers):
        while load_shared(control + HELPERS + number * _LINE) != 0:
            if now(control, control + CLOCK) > limit:
                return BUSY
            pause()
    return IDLE


@register_jitable
def _run_once(key, control, rows, count, helpers, all_helpers, tally):
    """All rows, as the owner."""
    store_integer(tally + _ADMITTED_COUNT, helpers)
    resting = load_integer(control + RESTING)
    if resting > 0:
        store_integer(control + RESTING, resting - 1)
        _count(tally, _RESTED, 1)
        run_rows(key, rows, count, 0)
        return ALONE
    _count(tally, _RUNS, 1)
    store_shared(control + ADMITTED, helpers)
    if load_shared(control + PARKED) != 0:
        add_shared(control + BELL, 1)
        wake = load_integer(control + CALLS + 8)
        futex = load_integer(control + FUTEX)
        call_system(wake, futex, control + BELL, _FUTEX_WAKE, LARGEST_TEAM, 0)
    pieces, helped = load_integer(tally + _PIECES), load_integer(tally + _HELPED)
    _walk(key, control, rows, count, tally)
    pieces = load_integer(tally + _PIECES) - pieces
    helped = load_integer(tally + _HELPED) - helped
    rest = 0
    if VAIN * helped < pieces:
        rest = max(2 * load_integer(control + REST), 1)
        rest = min(rest, load_integer(control + LONGEST_REST))
    store_integer(control + REST, rest)
    store_integer(control + RESTING, rest)
    return _settled(control, all_helpers)


@functools.cache
def team_runner() -> Any:
    """run(control, rows, how many, again, helpers, helpers there are, tally) → ALONE, IDLE or BUSY
    (a helper may still read what the program points to).

    The last of the rows that are shared has a barrier behind it. ALONE: this thread ran all of it,
    for another is the owner, or the helpers did nothing the last times.
    """
    key = kernel_key()

    def run(control, rows, count, again, helpers, all_helpers, tally):
        if swap_shared(control + OWNED, 1) != 0:
            _count(tally, _REFUSED, 1)
            run_rows(key, rows, count, again)
            return ALONE
        state, asked = ALONE, True
        while asked:
            latest = _run_once(key, control, rows, count, helpers, all_helpers, tally)
            # A run alone sees no helper: one that was inside before may still be.
            state = state if latest == ALONE else latest
            asked = _is_asked(again)
        store_shared(control + OWNED, 0)
        return state

    return driver(types.int64(*[types.int64] * 7))(run)
