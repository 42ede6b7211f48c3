"""Sums of packed weights on the CPU: the compiled kernel of outliers, and terms together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases_sums import (
    TEXTS,
    Answer,
    answer_of,
    make_sum,
    ratio_of,
    slow_but_every_second,
)
from test_cpu_processes import LOWERINGS, run_lowered

import cases
import lath
from lath.formats.activations import ActivationFormat
from lath.formats.outliers import OutlierCodec, Outliers
from lath.formats.sum_tensor import SumTensor
from lath.kernels.outliers import cpu as outliers_cpu
from lath.kernels.outliers import cpu_kernels
from lath.kernels.simd.compile import compile_kernel
from lath.verbs import sum_cpu

TOKENS = (1, 3, 4, 5, 16, 17, 70)


def make_outliers(rows: int, columns: int, percent: float, seed: int = 0) -> Outliers:
    """Whole numbers at random places, some rows empty and one full."""
    rng = np.random.default_rng(seed)
    codec = OutlierCodec(percent)
    count = codec.count((rows, columns))
    score = rng.random((rows, columns))
    score[::3], score[1] = -1, 2
    places = np.sort(np.argsort(-score.reshape(-1))[:count])
    values = rng.integers(1, 9, count) * rng.choice([-1, 1], count)
    return Outliers.from_places(
        codec, (rows, columns), torch.from_numpy(places), torch.from_numpy(values).float()
    )


def check(text: str, m: int, n: int, k: int, dtype: str, activations: str, bias: bool) -> None:
    packed = make_sum(text, n, k, seed=m)
    rng = np.random.default_rng([m, n, k])
    x = torch.from_numpy(rng.standard_normal((m, k))).to(cases.DTYPES[dtype])
    offsets = torch.from_numpy(rng.standard_normal(n)).to(x.dtype) if bias else None
    y = lath.linear(x, packed, offsets, activations=activations, backend="cpu")
    assert y.dtype == x.dtype
    found = answer_of(x, packed, offsets, activations)
    # Activations that are rounded to int8 and multiplied as fp32 numbers are rounded once more.
    ratio = ratio_of(y, found, packed)
    assert ratio <= 1, (text, m, n, k, dtype, activations, bias, ratio)


@pytest.mark.parametrize("text", slow_but_every_second(TEXTS))
def test_bounds(text: str) -> None:
    """Counts of tokens, dtypes and formats in turn; odd N and K."""
    formats, start = ("float", "int8-g32", "int8"), TEXTS.index(text)
    for turn in range(start, start + 3):
        m = TOKENS[turn % len(TOKENS)]
        dtype = tuple(cases.DTYPES)[turn % 3]
        n, k = (37, 16, 51)[turn % 3], (201, 330, 129)[turn % 3]
        check(text, m, n, k, dtype, formats[turn % 3], bool(turn % 2))


@pytest.mark.parametrize("m", [1, 4, 5, 16, 17, 65])
@pytest.mark.parametrize("columns", [70, 33000])
def test_outliers_are_exact(m: int, columns: int) -> None:
    """Whole numbers: every sum is exact in fp32, with both widths of columns."""
    weight = make_outliers(23, columns, 40 if columns == 70 else 0.5)
    assert (weight.codes.dtype == torch.int32) is (columns == 33000)
    assert {0, columns} <= set(weight.offsets.diff().tolist()) or columns == 33000
    rng = np.random.default_rng(m)
    x = torch.from_numpy(rng.integers(-8, 9, (m, columns))).float()
    bias = torch.arange(23).float()
    expected = x.double() @ weight.dequantize().double().T + bias
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.full((m, 23), torch.nan)
        y = outliers_cpu.linear(x.to(dtype), weight, bias, ActivationFormat(), None, out)
        assert y is out
        assert torch.equal(out.double(), expected)
    strided = torch.cat([x, x], dim=1)[:, :columns]
    assert torch.equal(outliers_cpu.linear(strided, weight, bias, ActivationFormat()), out)


@pytest.mark.parametrize("m", [1, 7, 70])
def test_nan_reaches_only_rows_that_read_it(m: int) -> None:
    weight = make_outliers(23, 70, 30)
    x = torch.randn(m, 70)
    clean = outliers_cpu.linear(x, weight, None, ActivationFormat())
    column = int(weight.codes[-1])
    x[:, column] = torch.inf
    y = outliers_cpu.linear(x, weight, None, ActivationFormat())
    reads = weight.dequantize()[:, column] != 0
    assert 0 < int(reads.sum()) < 22
    assert not bool(torch.isfinite(y[:, reads]).any())
    assert torch.equal(y[:, ~reads], clean[:, ~reads])


@pytest.mark.parametrize("text", ["mix2.5-g64", "mix3-g16-asym", "mix2:4-2.25-g32-s8+out1%"])
def test_columns_are_read_where_they_lie(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what a gather before gives: every format and dtype, a short last group, a tail of
    columns, x that is a part of another. Negative control: with the runs turned it is not."""
    packed = make_sum(text, 37, 205)
    runs = [packed.runs_of(index) for index in range(len(packed.terms))]
    assert [run is not None for run in runs] == [piece is not None for piece in packed.pieces]
    settings = [
        (m, dtype, activations)
        for m in (1, 3, 17)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for activations in ("float", "int8", "int8-g32", "fp8")
    ]
    found: list[torch.Tensor] = []
    for gathers in (False, True):
        if gathers:
            monkeypatch.setattr(sum_cpu, "_layer_of", lambda *_: None)
        for m, dtype, activations in settings:
            x = torch.randn(m, 410, generator=torch.Generator().manual_seed(m)).to(dtype)[:, 7:212]
            found.append(lath.linear(x, packed, activations=activations, backend="cpu"))
    half = len(settings)
    assert all(torch.equal(a, b) for a, b in zip(found[:half], found[half:], strict=True))
    monkeypatch.undo()
    real = SumTensor.runs_of
    monkeypatch.setattr(SumTensor, "runs_of", lambda self, index: real(self, index).roll(1))
    wrong = make_sum(text, 37, 205)
    assert not torch.equal(lath.linear(x, wrong, activations="fp8", backend="cpu"), found[-1])


def test_single_columns_are_gathered_and_changed_ones_noticed() -> None:
    """Salient columns are no runs. An order changed in place is another layer."""
    signs = make_sum("billm10%-g64", 20, 160)
    assert [signs.runs_of(index) for index in range(4)] == [None] * 4
    packed, x = make_sum("mix2.5-g16", 20, 160), torch.randn(3, 160)
    before = lath.linear(x, packed, backend="cpu")
    assert packed.columns is not None
    packed.columns.copy_(packed.columns.view(-1, 16).flip(0).reshape(-1))
    after = lath.linear(x, packed, backend="cpu")
    assert not torch.equal(before, after)
    assert ratio_of(after, answer_of(x, packed, None, "float"), packed) <= 1


@pytest.mark.parametrize("text", ["int4-g64+out1%", "mix2.5-g64", "billm10%-g64"])
def test_results_do_not_depend_on_threads(text: str) -> None:
    packed = make_sum(text, 517, 1100)
    for m in (1, 17):
        x = torch.randn(m, 1100)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(lath.linear(x, packed, activations="int8-g64", backend="cpu"))
        torch.set_num_threads(1)
        assert all(torch.equal(found[0], y) for y in found)


@pytest.mark.parametrize("text", ["int4-g64+out1%", "mix2.5-g32", "int1-g128+int1-g128"])
def test_a_sum_is_one_multiplication_by_what_it_decodes_to(text: str) -> None:
    packed = make_sum(text)
    x = torch.randn(5, 200)
    y = lath.linear(x, packed, backend="cpu")
    dense = packed.dequantize().double().numpy()
    found = answer_of(x, packed, None, "float")
    one = Answer(x.double().numpy() @ dense.T, found.gauge)
    assert ratio_of(y, one, packed) <= 1


@pytest.mark.parametrize("text", ["int4-g64+out1%", "mix2.5-g32+out1%", "billm10%-g64"])
def test_one_wrong_number_is_seen(text: str) -> None:
    """Negative control of the bounds: each tensor with one entry changed fails them."""
    packed = make_sum(text, 20, 128)
    x = 1 + torch.rand(3, 128)
    found = answer_of(x, packed, None, "float")
    assert ratio_of(lath.linear(x, packed, backend="cpu"), found, packed) <= 1
    for name, tensor in packed.tensors.items():
        changed = tensor.clone().reshape(-1)
        if name == "columns":
            changed[[0, -1]] = changed[[-1, 0]]
        elif name.startswith("offsets"):
            row = int((changed.diff() > 0).nonzero()[0])
            changed[row + 1] -= 1
        elif changed.dtype == torch.float16:
            largest = int(changed.abs().argmax())
            changed[largest] *= 1.25
        elif changed.dtype == torch.int16:
            changed[0] = (int(changed[0]) + 1) % 128
        else:
            changed[:8] ^= -1
        wrong = packed.from_tensors(
            packed.codec, packed.shape, {**packed.tensors, name: changed.view(tensor.shape)}
        )
        y = lath.linear(x + torch.arange(128) / 16, wrong, backend="cpu")
        moved = answer_of(x + torch.arange(128) / 16, packed, None, "float")
        assert ratio_of(y, moved, packed) > 1, name


@pytest.mark.slow
@pytest.mark.parametrize("name", LOWERINGS)
def test_other_instruction_sets(name: str) -> None:
    run_lowered(
        name,
        """
        import torch; torch.set_num_threads(1)
        from test_cpu_sums import test_outliers_are_exact
        for m in (1, 17):
            test_outliers_are_exact(m, 70)
        """,
    )


def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the check at first use: entries that read each other's columns."""
    honest = cpu_kernels._column

    def wrong(e, a, entry, short):  # type: ignore[no-untyped-def]
        return honest(e, a, e.add(entry, 1), short)

    outliers_cpu._checked.cache_clear()
    compile_kernel.cache_clear()
    monkeypatch.setattr(cpu_kernels, "_column", wrong)
    monkeypatch.setenv("NUMBA_DISABLE_CACHING", "1")
    with monkeypatch.context() as patch:
        patch.setattr("lath.kernels.simd.compile._cached", _uncached)
        try:
            with pytest.raises(RuntimeError, match="wrong numbers"):
                outliers_cpu._checked(True, 0)
        finally:
            compile_kernel.cache_clear()
            outliers_cpu._checked.cache_clear()


def _uncached(decorator):  # type: ignore[no-untyped-def]
    return lambda function: decorator(False)(function)


def test_activations_of_outliers_are_floats() -> None:
    from lath.kernels.outliers.plan import plan_linear
    from lath.verbs.planning import describe_device

    with pytest.raises(ValueError, match=r"activations of outliers.*int8"):
        plan_linear(
            1, 16, 64, OutlierCodec(1), ActivationFormat("int8"), torch.float32,
            describe_device("cpu"), "cpu",
        )  # fmt: skip


def test_plans_say_what_each_term_does() -> None:
    for device in ("cpu", "sm_90"):
        plan = lath.plan(1, 4096, 4096, "mix2.5-g64+out1%", device=device)
        assert len(plan.terms) == 3
        assert "of 2048 columns" in plan.reason
        assert "out1%: gather" in plan.reason
        assert plan.bytes_moved > sum(term.bytes_moved for term in plan.terms)
        assert plan.operations == sum(term.operations for term in plan.terms)
