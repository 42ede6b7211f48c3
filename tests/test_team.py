"""Programs divided among helpers: the same bits in any number of threads, and nobody waits.

Most kernels here are calls of Python, which know the thread they are in and can lose themselves in
it: a helper's then stands for one that has lost its core.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cpu_processes import run_python

pytest.importorskip("numba")
from lath.kernels.decode_step.cpu_arguments import VECTOR, block_of
from lath.kernels.decode_step.cpu_vectors import emit_add
from lath.kernels.simd import helpers
from lath.kernels.simd.compile import compile_kernel
from lath.kernels.simd.helpers import Team, replace_team, usable_cores
from lath.kernels.simd.openmp import one_thread
from lath.kernels.simd.program import Output, Pieces, Program, Share, row
from lath.kernels.simd.team import TALLY

pytestmark = pytest.mark.skipif(not helpers._has_calls(), reason="helpers need Linux")
SIZE = 96  # numbers of a row
_KERNEL = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)
Make = Callable[..., Team]


@pytest.fixture
def make_team() -> Iterator[Make]:
    """Puts a team in the place of the process's, and torch's number of threads with it."""
    made: list[Team] = []
    before, threads = replace_team(None), torch.get_num_threads()

    def make(room: int, starts: bool = True, longest_rest: int = 0) -> Team:
        made.append(Team(room, starts, longest_rest=longest_rest))
        replace_team(made[-1])
        torch.set_num_threads(room + 1)
        return made[-1]

    yield make
    replace_team(before)
    torch.set_num_threads(threads)
    assert all(team.stop(20) for team in made)


class Adding:
    """Rows over one vector y: y[i] = y[i] * 3 + i for the units of each, in Python or compiled.

    delays: seconds that a helper spends in its first pieces.
    """

    def __init__(self, rows: int, units: int = SIZE, delays: tuple[float, ...] = ()) -> None:
        self.y = np.zeros(SIZE, np.int64)
        self.seen: list[tuple[bool, int, int]] = []
        self.delays = list(delays)
        self.block = np.array([self.y.ctypes.data, self.y.ctypes.data], np.int64)
        self._kernel = _KERNEL(self._run)  # kept: rows have its address alone
        self._main = threading.get_ident()
        address = ctypes.cast(self._kernel, ctypes.c_void_p).value or 0
        output = Output(1, 8 * SIZE // units, 8 * SIZE)
        self.share = Share(self.block, output, units, each=True)
        at = int(self.block.ctypes.data)
        self.program = Program([row(address, 1, at, self.share)] * rows)
        self._units = units
        self.rows = rows

    def _run(self, unit: int, step: int, arguments: int) -> None:
        """The units unit, unit + step, …, as attention's kernel does."""
        is_helper = threading.get_ident() != self._main
        self.seen.append((is_helper, unit, step))
        source, target = (ctypes.c_int64 * 2).from_address(arguments)
        count = SIZE // self._units
        if is_helper and self.delays:
            time.sleep(self.delays.pop(0))
        elif not is_helper:
            time.sleep(0.0001)  # lets go of Python's lock, which a helper needs here
        numbers = (ctypes.c_int64 * SIZE).from_address(source)
        results = (ctypes.c_int64 * SIZE).from_address(target)
        for own in range(unit, self._units, step):
            for i in range(own * count, own * count + count):
                results[i] = numbers[i] * 3 + i

    def expected(self) -> Any:
        y = np.zeros(SIZE, np.int64)
        for _ in range(self.rows):
            y = y * 3 + np.arange(SIZE)
        return y

    def run(self) -> float:
        """Seconds."""
        self.y[:] = 0
        self.seen.clear()
        start = time.perf_counter()
        self.program.run()
        seconds = time.perf_counter() - start
        np.testing.assert_array_equal(self.y, self.expected())
        return seconds

    def count(self, name: str) -> int:
        return int(self.program.tally[TALLY[name]])


def awaited(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether it comes to hold; not asked again then, for it may hold once alone."""
    limit = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < limit:
        time.sleep(0.001)
    return holds


@pytest.mark.parametrize("room", [1, 2, 3])
def test_helpers_help_and_change_nothing(room: int, make_team: Make) -> None:
    make_team(room)
    work = Adding(rows=5, units=48)
    for _ in range(200):  # other processes may have the cores
        work.run()
        if work.count("helped") > 10:
            break
    assert work.count("helped") > 10
    assert {unit for _, unit, _ in work.seen} == set(range(48))


def test_a_lost_result_shows(make_team: Make) -> None:
    """Negative control: with the place of the helpers' results spoilt, results are others."""
    make_team(1)
    work = Adding(rows=3, units=48)
    work.run()
    other = np.full(SIZE, -7, np.int64)
    work.share._enter(results=other.ctypes.data)

    def differs() -> bool:
        try:
            work.run()
        except AssertionError:
            return True
        return False

    assert awaited(differs)


def test_helpers_that_never_come(make_team: Make) -> None:
    make_team(2, starts=False)
    work = Adding(rows=4)
    for _ in range(4):
        work.run()
    assert work.count("helped") == 0
    assert not any(helper for helper, _, _ in work.seen)


def test_runs_without_help_become_rare(make_team: Make) -> None:
    """1, 2, 4, … runs by one thread behind each that nobody helped in."""
    make_team(1, starts=False, longest_rest=64)
    work = Adding(rows=1, units=2)
    tries = []
    for _ in range(300):
        before = work.count("runs")
        work.run()
        tries.append(work.count("runs") - before)
    gaps = [len(list(group)) for tried, group in itertools.groupby(tries) if not tried]
    assert gaps[:7] == [1, 2, 4, 8, 16, 32, 64]
    assert max(gaps) == 64
    assert work.count("rested") + work.count("runs") == 300


def test_a_helper_that_is_lost_is_not_waited_for(make_team: Make) -> None:
    """It comes back in the middle of later runs, whose numbers it must not touch; until then what
    it may read is held."""
    team = make_team(1)
    delay = 0.5
    work = Adding(rows=6, units=24, delays=(delay,))
    for _ in range(200):
        seconds = work.run()
        if not work.delays:
            break
    assert not work.delays, "no helper came"
    assert seconds < delay
    assert work.count("again") >= 1  # more where other processes have the cores
    assert not team.is_idle
    assert any(work.program in held for _, held in team._left.values())
    assert awaited(lambda: work.run() > 0 and not team._left)
    assert team.is_idle


def test_arguments_made_anew_leave_the_old_ones_to_a_lost_helper(make_team: Make) -> None:
    team = make_team(1)
    work = Adding(rows=2, units=24, delays=(0.3,))
    for _ in range(200):
        work.run()
        if not work.delays:
            break
    assert not team.is_idle
    old = work.share._kept
    work.share.prepare(1)
    assert any(old[0] is thing for _, held in team._left.values() for thing in held)
    assert awaited(lambda: team.is_idle)
    work.run()


def test_two_python_threads_at_once(make_team: Make) -> None:
    """One has the helpers, the other runs alone meanwhile."""
    make_team(1)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work = Adding(rows=5, units=24)
            for _ in range(10):
                work.run()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_compiled_rows_together(make_team: Make) -> None:
    """Rows that are divided as one, of unlike sizes, between rows of one thread."""
    make_team(2)
    kernel, rows, kept = compile_kernel(emit_add), [], []
    x = torch.randn(4096)
    parts = [torch.zeros(size) for size in (4096, 160, 1024)]
    for n, y in enumerate(parts):
        fields = {"x": x.data_ptr(), "second": x.data_ptr(), "y": y.data_ptr()}
        block = block_of(VECTOR, **fields)
        output = Output(VECTOR["y"], 64, 4 * y.numel())
        share = Share(block, output, y.numel() // 16, step=2, cost=(1 << 20) * (n + 1))
        rows.append(row(kernel, y.numel() // 16, block.ctypes.data, share, barrier=n == 2))
        kept.append(block)
    last = torch.zeros(4096)
    block = block_of(VECTOR, x=parts[0].data_ptr(), second=x.data_ptr(), y=last.data_ptr())
    rows.append(row(kernel, 256, block.ctypes.data))
    program = Pieces(rows)
    for _ in range(100):
        for y in (*parts, last):
            y.zero_()
        program.run()
        assert all(torch.equal(y, 2 * x[: y.numel()]) for y in parts)
        assert torch.equal(last, 2 * x + x)


@pytest.mark.parametrize("room", [0, 1, 2])
def test_rows_once_more(room: int, make_team: Make) -> None:
    """As often as one of them asks, with helpers and without."""
    make_team(room)
    left = np.array([0], np.int64)

    def run(begin: int, end: int, arguments: int) -> None:
        left[0] -= 1

    asks = _KERNEL(run)
    address = ctypes.cast(asks, ctypes.c_void_p).value or 0
    size = 1 << 15
    x, y = torch.ones(size), torch.zeros(size)
    block = block_of(VECTOR, x=x.data_ptr(), second=y.data_ptr(), y=y.data_ptr())
    share = Share(block, Output(VECTOR["y"], 64, 4 * size), size // 16, cost=1 << 20)
    rows = [
        row(compile_kernel(emit_add), size // 16, block.ctypes.data, share),
        row(address, 1, 0),
    ]
    program = Pieces(rows, again=int(left.ctypes.data))
    assert program.repeats
    assert not Pieces([*rows, lambda: None], again=int(left.ctypes.data)).repeats
    for times in (1, 2, 9):
        y.zero_()
        left[0] = times
        program.run()
        assert bool((y == times).all()), times


def test_rows_that_are_refused() -> None:
    block = np.zeros(2, np.int64)
    share = Share(block, Output(1, 8, 8), 1)
    divided, open_row = row(1, 1, 0, share), row(1, 1, 0, share, barrier=False)
    for rows, why in (
        ([divided, open_row], "no barrier behind the last"),
        ([open_row, row(1, 1, 0)], "row 1 has no share"),
        ([open_row] * 9, "more than 8 rows"),
    ):
        with pytest.raises(ValueError, match=why):
            Program(rows)


def test_one_thread_needs_no_team(make_team: Make) -> None:
    team = make_team(1)
    torch.set_num_threads(1)
    Adding(rows=2).run()
    assert team.started == 0


def test_threads_beyond_the_cores_are_not_made(make_team: Make) -> None:
    team = make_team(1)
    torch.set_num_threads(64)
    work = Adding(rows=2)
    work.run()
    assert team.started == 1
    assert work.count("helpers") == 1


def test_torch_in_one_thread_for_a_while() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_quotas(tmp_path: Path) -> None:
    assert helpers._quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert helpers._quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert helpers._quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    for name, number in (("quota", 400000), ("period", 100000)):
        (tmp_path / f"cpu/cpu.cfs_{name}_us").write_text(f"{number}\n")
    assert helpers._quota(tmp_path) == 4
    assert usable_cores() >= 1


FORK = """
    import os, signal, sys, torch
    import test_team
    from lath.kernels.simd import helpers
    helpers.replace_team(helpers.Team(2))
    torch.set_num_threads(3)
    work = test_team.Adding(rows=3)
    work.run()
    children = []
    for n in range(3):
        child = os.fork()
        if not child:
            faulthandler.register(signal.SIGALRM, chain=True)
            signal.alarm(120)  # says where it is then, and ends it
            work._main = __import__("threading").get_ident()
            work.run()  # in a process of its own, with a team of its own
            os._exit(0 if helpers.team().started == helpers.team().room else 3)
        children.append(child)
    work.run()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(f"children ended with {codes}" if any(codes) else 0)
"""


def test_forked_children_have_their_own_helpers() -> None:
    run_python(FORK)


def test_a_process_ends_with_helpers_at_work() -> None:
    out = run_python("""
        import test_team, torch
        from lath.kernels.simd import helpers
        helpers.replace_team(helpers.Team(3))
        torch.set_num_threads(4)
        work = test_team.Adding(rows=3, delays=(5,) * 3)
        work.run()
        print("done")
    """)
    assert out.strip() == "done"
