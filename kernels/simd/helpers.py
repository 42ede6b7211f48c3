"""The threads that help to run a program (team.py), and what they may use.

They are threads of lath's own, not torch's: the end of an OpenMP region waits for all of its
threads, also for one that has lost its core. So that they never push another thread from its core,
they take what is left over (SCHED_IDLE); so that torch's, which spin for some milliseconds after an
operation, are pushed back by nobody, nothing of torch should run in several threads between two
tokens. A process has one team; a second Python thread that comes meanwhile runs alone.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from lath.kernels.simd.helper_loop import helper_loop
from lath.kernels.simd.team import (
    BELL,
    BUSY,
    CALLS,
    CONTROL_BYTES,
    ENDED,
    FUTEX,
    HANDICAP,
    HELPERS,
    LARGEST_TEAM,
    LONGEST_REST,
    POLITE,
    STOP,
    team_runner,
)

_LINE_WORDS = 16
_FUTEX_CALL = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
_CALL_NAMES = ("clock_gettime", "syscall", "sched_setscheduler", "setpriority")
_FUTEX_WAKE = 129
_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}


class Team:
    """Helpers of one process, started when they are first wanted.

    room: helpers at most; None: one for each core that this process may use, but one.
    longest_rest: runs by one thread while helpers do not come, before they are tried again.

    For tests: starts: False leaves helpers unborn; polite: False gives them the priority of others;
    handicap: nanoseconds in which the owner leaves each region to them.
    """

    def __init__(
        self,
        room: int | None = None,
        starts: bool = True,
        polite: bool = True,
        handicap: int = 0,
        longest_rest: int = 64,
    ) -> None:
        self.obstacle = "" if starts else "helpers are not started"
        self._libc: Any = None
        self.room = usable_cores() - 1 if room is None else room
        self.room = max(0, min(self.room, LARGEST_TEAM))
        if self.room and not _has_calls():
            self.obstacle = f"no helpers on {sys.platform}, {os.uname().machine}"
            self.room = 0
        self._starts = starts
        self._lock = threading.Lock()
        self.started = 0
        self._held: dict[int, Any] = {}  # by thread
        self._left: dict[Any, tuple[int, Any]] = {}  # by identities: when, and what
        self._numbers = itertools.count()
        if self.room:
            self._set_up()
            for place, value in (
                (POLITE, polite), (HANDICAP, handicap), (LONGEST_REST, longest_rest),
            ):  # fmt: skip
                self._words[place // 8] = int(value)

    def _set_up(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        # Never freed: a helper may look at it until the process ends.
        self._libc.aligned_alloc.restype = ctypes.c_void_p
        self._libc.aligned_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        size = -(-CONTROL_BYTES // 4096) * 4096
        address = self._libc.aligned_alloc(4096, size)
        if not address:
            raise MemoryError(f"no {size} bytes for the helpers")
        self.control = int(address)
        ctypes.memset(self.control, 0, size)
        words = (ctypes.c_int64 * (size // 8)).from_address(self.control)
        self._words = np.ctypeslib.as_array(words)
        for n, name in enumerate(_CALL_NAMES):
            call = ctypes.cast(getattr(self._libc, name), ctypes.c_void_p).value
            self._words[CALLS // 8 + n] = call
        self._words[FUTEX // 8] = _FUTEX_CALL[os.uname().machine]
        self._run = team_runner()

    def available(self, helpers: int) -> int:
        """How many of so many there are, started if need be."""
        helpers = min(helpers, self.room)
        if helpers > self.started and self._starts:
            self._start(helpers)
        return helpers

    def _start(self, helpers: int) -> None:
        with self._lock:
            loop = helper_loop()
            # Signals are for Python's own threads.
            signals = signal.valid_signals() - _FAULTS
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            try:
                while self.started < helpers:
                    self._start_one(loop)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _start_one(self, loop: Any) -> None:
        line = HELPERS // 8 + _LINE_WORDS * self.started
        self._words[line + 1], self._words[line + 2] = self.control, self.started + 1
        thread = ctypes.c_ulong()
        failed = self._libc.pthread_create(
            ctypes.byref(thread), None, ctypes.c_void_p(loop.address),
            ctypes.c_void_p(self.control + 8 * line),
        )  # fmt: skip
        if failed:
            self.room = self.started
            raise OSError(failed, f"a helper could not be started: {os.strerror(failed)}")
        self._libc.pthread_detach(thread)
        self.started += 1

    def run(
        self, rows: int, count: int, again: int, helpers: int, tally: int, keep: tuple[Any, ...]
    ) -> None:
        """A program in this thread and so many helpers. keep: held while a helper may read it."""
        own = threading.get_ident()
        if own in self._held:  # something was raised below
            self.leave(*self._held.pop(own))
        self._held[own] = keep
        if self._run(self.control, rows, count, again, helpers, self.started, tally) == BUSY:
            self._hold(keep)
        elif self._left:
            self._release()
        del self._held[own]

    @property
    def is_idle(self) -> bool:
        """Whether no helper is inside a piece of a program."""
        return not self.started or not any(self._words[HELPERS // 8 :: _LINE_WORDS][: self.started])

    def leave(self, *things: Any) -> None:
        """Hold what a helper may still read, as long as it may."""
        if not self.is_idle:
            self._hold(things)

    def _hold(self, things: tuple[Any, ...]) -> None:
        self._left[tuple(map(id, things))] = (next(self._numbers), things)

    def _release(self) -> None:
        """Let go of what was held before now, if no helper is inside a piece that began before."""
        limit = next(self._numbers)
        if self.is_idle:
            for key, (number, _) in list(self._left.items()):
                if number < limit:
                    del self._left[key]

    def stop(self, seconds: float = 0.05) -> bool:
        """End the helpers; whether they did in that time."""
        if not self.started:
            return True
        self._words[STOP // 8] = 1
        self._words[BELL // 8] += 1
        bell = ctypes.c_void_p(self.control + BELL)
        number = ctypes.c_long(int(self._words[FUTEX // 8]))
        limit = time.monotonic() + seconds
        while self._words[ENDED // 8] < self.started:
            self._libc.syscall(number, bell, ctypes.c_long(_FUTEX_WAKE), ctypes.c_long(1 << 16))
            if time.monotonic() > limit:
                return False
            time.sleep(0.0005)
        self.started = self.room = 0
        return True


def _has_calls() -> bool:
    if not sys.platform.startswith("linux") or os.uname().machine not in _FUTEX_CALL:
        return False
    libc = ctypes.CDLL(None)
    return all(hasattr(libc, name) for name in ("pthread_create", "aligned_alloc", *_CALL_NAMES))


@functools.cache
def usable_cores() -> int:
    """Cores that this process may keep busy: its affinity, and its control group's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _quota(Path("/sys/fs/cgroup"))
    return max(1, cores if quota is None else min(cores, math.floor(quota)))


def _quota(folder: Path) -> float | None:
    """Cores that a control group may use on average; None: all."""
    for name in ("cpu.max", "cpu/cpu.cfs_quota_us"):
        try:
            limit = (folder / name).read_text().split()
            if len(limit) == 1:
                limit.append((folder / "cpu/cpu.cfs_period_us").read_text())
            return None if limit[0] in ("max", "-1") else int(limit[0]) / int(limit[1])
        except (OSError, ValueError, IndexError):
            continue
    return None


_team: Team | None = None
_making = threading.Lock()


def team() -> Team:
    """The process's own."""
    global _team
    own = _team
    if own is None:
        with _making:
            own = _team = _team or Team()
    return own


def replace_team(other: Team | None) -> Team | None:
    """Put another in its place (None: one is made when it is next asked for); returns the old."""
    global _team
    old, _team = _team, other
    return old


def _forget() -> None:
    """In a forked child, where no helper came along."""
    global _making
    _making = threading.Lock()
    replace_team(None)


def _stop_at_exit() -> None:
    if _team is not None:
        _team.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
atexit.register(_stop_at_exit)
