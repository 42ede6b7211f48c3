"""Every fault planted in a kernel is found by the sanitizer, and a clean kernel is clean."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tools.sanitizer import Report, sanitize

BLOCK = 32
COUNT = 100  # not a multiple of BLOCK: the last of the four programs has 4 valid lanes


@triton.jit
def clean_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0) * 2, mask=i < n)


@triton.jit
def read_beyond_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i) * 2, mask=i < n)


@triton.jit
def write_beyond_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0) * 2, mask=i <= n)


@triton.jit
def undefined_lanes_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + tl.program_id(0), tl.sum(tl.load(x + i, mask=i < n), axis=0))


@triton.jit
def store_race_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.program_id(0) + i)


@triton.jit
def load_race_kernel(x, y, n, BLOCK: tl.constexpr):
    """Reads its right neighbour's part of y, in place: the result depends on the order."""
    program = tl.program_id(0)
    neighbour = (program + 1) % tl.num_programs(0)
    i = tl.arange(0, BLOCK)
    value = tl.load(y + neighbour * BLOCK + i)
    tl.store(y + program * BLOCK + i, value + program)


@triton.jit
def atomic_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y, tl.sum(tl.load(x + i, mask=i < n, other=0.0), axis=0))


@triton.jit
def atomic_beyond_kernel(x, y, n, BLOCK: tl.constexpr):
    tl.atomic_add(y + n, 1.0)


@triton.jit
def overflow_kernel(x, y, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0) * 40000
    i = tl.arange(0, BLOCK)
    tl.store(y + i, (row * stride + i > 0).to(tl.float32))


@triton.jit
def row_copy_kernel(x, y, stride, WIDE: tl.constexpr, COLUMNS: tl.constexpr):
    program = tl.program_id(0)
    row = program.to(tl.int64) if WIDE else program
    i = tl.arange(0, COLUMNS)
    tl.store(y + program * COLUMNS + i, tl.load(x + row * stride + i))


def launch(kernel, argument: int = COUNT, **switches) -> tuple[Report, torch.Tensor]:
    x, y = torch.ones(COUNT), torch.zeros(COUNT)
    with sanitize(**switches) as report:
        kernel[(4,)](x, y, argument, BLOCK=BLOCK)
    return report, y


def test_clean_kernel_is_clean() -> None:
    report, y = launch(clean_kernel)
    assert report.bad() == {}
    report.assert_clean()
    assert (report.launches, report.programs) == (1, 4)
    assert torch.equal(y, torch.full((COUNT,), 2.0))


def test_a_block_without_a_launch_is_not_clean() -> None:
    with sanitize() as report:
        pass
    with pytest.raises(AssertionError, match="no kernel was launched"):
        report.assert_clean()


def test_read_out_of_bounds() -> None:
    report, y = launch(read_beyond_kernel)
    assert report.bad() == {"out_of_bounds_reads": 28}
    assert "x[100] of 100" in report.describe()
    assert torch.equal(y, torch.full((COUNT,), 2.0))
    with pytest.raises(AssertionError, match="28 out_of_bounds_reads; read_beyond_kernel"):
        report.assert_clean()


def test_write_out_of_bounds_is_dropped() -> None:
    report, _ = launch(write_beyond_kernel)
    assert report.bad() == {"out_of_bounds_writes": 1}
    report.assert_clean(allow=["out_of_bounds_writes"])


def test_running_from_one_argument_into_another_is_seen() -> None:
    whole = torch.zeros(2 * COUNT)
    y = whole[COUNT:]
    for bounds, expected in (("view", 28), ("storage", 0)):
        with sanitize(bounds=bounds) as report:
            read_beyond_kernel[(4,)](whole[:COUNT], y, COUNT, BLOCK=BLOCK)
        assert report.out_of_bounds_reads == expected


def test_undefined_lanes_spoil_the_result() -> None:
    report, y = launch(undefined_lanes_kernel)
    assert report.bad() == {"undefined_lanes": 28}
    assert y[:4].isnan().tolist() == [False, False, False, True]
    _, unspoiled = launch(undefined_lanes_kernel, poison=False)
    assert unspoiled[3] == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_type_is_spoiled(dtype: torch.dtype) -> None:
    x, y = torch.ones(COUNT, dtype=dtype), torch.zeros(COUNT)
    with sanitize() as report:
        undefined_lanes_kernel[(4,)](x, y, COUNT, BLOCK=BLOCK)
    assert report.undefined_lanes == 28
    assert y[3].isnan()


def test_races() -> None:
    report, _ = launch(store_race_kernel)
    assert report.bad() == {"races": BLOCK}
    assert "store different values" in report.describe()
    x, y = torch.ones(COUNT), torch.zeros(4 * BLOCK)
    with sanitize() as report:
        load_race_kernel[(4,)](x, y, COUNT, BLOCK=BLOCK)
    assert report.bad() == {"races": 4 * BLOCK}
    assert "loads what" in report.describe()


def test_atomics_are_not_races_but_are_bounded() -> None:
    report, y = launch(atomic_kernel)
    assert report.bad() == {}
    assert y[0] == COUNT
    report, _ = launch(atomic_beyond_kernel)
    assert report.bad() == {"out_of_bounds_writes": 4}


def test_overflow() -> None:
    report, _ = launch(overflow_kernel, 70000, races=False)
    assert report.bad() == {"overflows": 3}
    assert "int32 overflow detected for operation mul" in report.describe()
    report, _ = launch(overflow_kernel, 70000, races=False, overflow=False)
    assert report.bad() == {}


@pytest.mark.parametrize("source", ["empty", "empty_like", "new_empty", "empty_strided"])
def test_uninitialised_read(source: str) -> None:
    with sanitize() as report:
        x = {
            "empty": lambda: torch.empty(COUNT),
            "empty_like": lambda: torch.empty_like(torch.zeros(COUNT)),
            "new_empty": lambda: torch.zeros(1).new_empty(COUNT),
            "empty_strided": lambda: torch.empty_strided((COUNT,), (1,)),
        }[source]()
        x[:90] = 1.0
        y = torch.empty(COUNT)
        clean_kernel[(4,)](x, y, COUNT, BLOCK=BLOCK)
    assert report.bad() == {"uninitialised_reads": 10}
    assert "x[90] of 100" in report.describe()
    assert y[:90].eq(2).all()
    assert y[90:].isnan().all()


def test_what_a_kernel_wrote_is_initialised() -> None:
    with sanitize() as report:
        middle, y = torch.empty(COUNT), torch.empty(COUNT)
        clean_kernel[(4,)](torch.ones(COUNT), middle, COUNT, BLOCK=BLOCK)
        clean_kernel[(4,)](middle, y, COUNT, BLOCK=BLOCK)
    report.assert_clean()
    assert y.eq(4).all()


def test_integers_are_filled_too() -> None:
    with sanitize():
        assert torch.empty(4, dtype=torch.int8).tolist() == [-1] * 4
        assert torch.empty(4, dtype=torch.bool).all()
        assert torch.empty(4, dtype=torch.float8_e4m3fn).float().isnan().all()


def test_order_dependence_shows() -> None:
    results = []
    for order in (None, "reverse", 1):
        y = torch.zeros(4 * BLOCK)
        with sanitize(order=order, races=False):
            load_race_kernel[(4,)](torch.ones(COUNT), y, COUNT, BLOCK=BLOCK)
        results.append(y)
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])
    forward, _ = launch(clean_kernel)
    assert torch.equal(launch(clean_kernel, order=7)[1], launch(clean_kernel)[1])
    assert forward.bad() == {}


def test_each_program_of_a_3d_grid_runs_once_in_any_order() -> None:
    for order in ("reverse", 3):
        y = torch.zeros(24)
        with sanitize(order=order) as report:
            visit_kernel[(2, 3, 4)](y)
        report.assert_clean()
        assert torch.equal(y, torch.arange(24).float())


@triton.jit
def visit_kernel(y):
    x, row, plane = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    number = (x * 3 + row) * 4 + plane
    tl.store(y + number, number)


@pytest.mark.parametrize("wide", [False, True])
def test_offsets_beyond_two_gigabytes(wide: bool) -> None:
    buffer = torch.empty((3 << 30) + 64, dtype=torch.uint8)  # virtual: only 128 bytes are touched
    x = torch.as_strided(buffer, (4, 32), (1 << 30, 1))
    x.copy_(torch.arange(128, dtype=torch.uint8).view(4, 32))
    y = torch.zeros(4, 32, dtype=torch.uint8)
    with sanitize() as report:
        row_copy_kernel[(4,)](x, y, x.stride(0), WIDE=wide, COLUMNS=32)
    assert torch.equal(x, y) == wide
    assert report.bad() == ({} if wide else {"out_of_bounds_reads": 64, "overflows": 2})


def test_everything_is_restored() -> None:
    from triton.runtime import interpreter as stock

    builder = stock.interpreter_builder
    before = (dict(vars(type(builder))), builder.options, stock.GridExecutor.__call__)
    launch(clean_kernel, order="reverse")
    with pytest.raises(KeyError), sanitize():
        raise KeyError
    assert (dict(vars(type(builder))), builder.options, stock.GridExecutor.__call__) == before


def test_unknown_fault_name_is_refused() -> None:
    with pytest.raises(ValueError, match="allow must hold names of"):
        Report(launches=1).assert_clean(allow=["rases"])
