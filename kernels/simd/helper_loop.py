"""What a helper of a team (team.py) does: claim pieces of the owner's regions, or sleep."""

from __future__ import annotations

import functools
from typing import Any

from numba import types
from numba.extending import register_jitable

from lath.kernels.simd.atomics import (
    add_shared,
    call_system,
    load_shared,
    pause,
    store_integer,
    store_shared,
)
from lath.kernels.simd.compile import callback, kernel_key, load_integer
from lath.kernels.simd.team import (
    ADMITTED,
    BELL,
    CALLS,
    CLAIMED,
    DONE,
    ENDED,
    FUTEX,
    PARKED,
    POLITE,
    REGION,
    SHARE,
    SHARE_AT,
    STOP,
    TICKET,
    compute,
    locate,
    now,
)

_PATIENCE = 1_000_000  # ns without work before a helper sleeps: the gap between two tokens
_LOOK = 64  # pauses between two looks at the clock
_FUTEX_WAIT = 128  # of this process alone
_SCHED_IDLE, _LOWEST = 5, 19
_BLOCKS, _STRIDE, _HELPERS = SHARE["blocks"], SHARE["stride"], SHARE["helpers"]


@register_jitable
def _lower(control, scratch):
    """Take only what others leave of a core: a helper must not push the owner from its own."""
    store_integer(scratch, 0)
    failed = call_system(load_integer(control + CALLS + 16), 0, _SCHED_IDLE, scratch, 0, 0)
    if failed & 0xFFFFFFFF != 0:
        call_system(load_integer(control + CALLS + 24), 0, 0, _LOWEST, 0, 0)


@register_jitable
def _help(key, control, own, number):
    """Claim a piece and do it."""
    store_shared(own, 1)
    ticket = add_shared(control + TICKET, 1)
    claim, epoch = ticket & CLAIMED, ticket >> 24
    if claim < (ticket >> 12) & CLAIMED:
        at, piece = locate(load_shared(control + REGION), claim)
        if at != 0:
            share = load_integer(at + SHARE_AT)
            block = load_integer(share + _BLOCKS) + (number - 1) * load_integer(share + _STRIDE)
            known = number <= load_integer(share + _HELPERS)
            if known and load_shared(control + TICKET) >> 24 == epoch:
                compute(key, at, share, piece, block)
                store_shared(control + DONE + 8 * claim, epoch << 8 | number)
    store_shared(own, 0)


@register_jitable
def _sleep(control):
    """Until the owner of the next program rings."""
    bell = load_shared(control + BELL)
    add_shared(control + PARKED, 1)
    if load_shared(control + STOP) == 0:
        wait, futex = load_integer(control + CALLS + 8), load_integer(control + FUTEX)
        call_system(wait, futex, control + BELL, _FUTEX_WAIT, bell & 0xFFFFFFFF, 0)
    add_shared(control + PARKED, -1)


@functools.cache
def helper_loop() -> Any:
    """What a helper runs from its beginning to its end: loop(address of its line)."""
    key = kernel_key()

    def loop(own):
        control, number, scratch = load_integer(own + 8), load_integer(own + 16), own + 24
        if load_integer(control + POLITE) != 0:
            _lower(control, scratch)
        spins, since = 0, 0
        while load_shared(control + STOP) == 0:
            ticket = load_shared(control + TICKET)
            is_open = ticket & CLAIMED < (ticket >> 12) & CLAIMED
            if is_open and number <= load_shared(control + ADMITTED):
                _help(key, control, own, number)
                spins = 0
                continue
            pause()
            spins += 1
            if spins == _LOOK:
                since = now(control, scratch)
            elif spins % _LOOK == 0 and now(control, scratch) - since > _PATIENCE:
                _sleep(control)
                spins = 0
        add_shared(control + ENDED, 1)

    return callback(types.void(types.int64))(loop)
