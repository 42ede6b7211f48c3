"""Sums of packed weights in Triton: the kernel of outliers, and terms together."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases_sums import TEXTS, answer_of, make_sum, ratio_of, slow_but_every_second
from test_cpu_sums import make_outliers

import cases
import lath
from lath.formats.activations import ActivationFormat
from lath.formats.device import known_device
from lath.formats.outliers import Outliers
from lath.kernels.linear import triton as planes
from lath.kernels.outliers import triton as launcher
from lath.kernels.outliers.plan import plan_linear
from lath.verbs import sum_triton
from tools.sanitizer import sanitize


def run(x: torch.Tensor, weight: Outliers, bias: torch.Tensor | None, **changes: int) -> object:
    plan = plan_linear(
        x.shape[0], *weight.shape, weight.codec, ActivationFormat(), x.dtype,
        known_device("sm_80"), "triton",
    )  # fmt: skip
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan)
    plan = dataclasses.replace(plan, **changes)
    return launcher.linear(x, weight, bias, ActivationFormat(), plan, out)


@pytest.mark.parametrize("text", slow_but_every_second(TEXTS))
def test_parity(text: str) -> None:
    turn = TEXTS.index(text) // 2 + TEXTS.index(text) % 2  # both halves meet every count and dtype
    m, dtype = (1, 5, 3, 17)[turn % 4], tuple(cases.DTYPES)[turn % 3]
    activations = ("float", "int8-g32", "int8")[turn % 3 if "nf4" not in text else 0]
    packed = make_sum(text, 37, 200, seed=turn)
    x = torch.randn(m, 203)[:, :200].to(cases.DTYPES[dtype])
    bias = torch.randn(37).to(x.dtype) if turn % 2 else None
    y = lath.linear(x, packed, bias, activations=activations, backend="triton")
    assert y.dtype == x.dtype
    found = answer_of(x, packed, bias, activations)
    assert ratio_of(y, found, packed, roundings=int("nf4" in text)) <= 1, text


@pytest.mark.parametrize("activations", ["int8", "int8-g16", "fp8"])
@pytest.mark.parametrize("text", ["mix2.5-g16", "billm10%-g64"])
def test_columns_are_read_where_they_lie(
    text: str, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where x is rounded: bit for bit what a gather before gives, nothing read beside x, and of
    another order another product. Salient columns are single ones."""
    packed, x = make_sum(text, 20, 75), torch.randn(3, 80)[:, :75].half()
    with sanitize() as report:
        found = lath.linear(x, packed, activations=activations, backend="triton")
    report.assert_clean()
    real = planes.linear

    def gathered(x, weight, bias, how, plan, out=None, order=None):  # type: ignore[no-untyped-def]
        return real(x if order is None else x[:, order.long()], weight, bias, how, plan, out)

    with monkeypatch.context() as patched:
        patched.setattr(planes, "linear", gathered)
        assert torch.equal(lath.linear(x, packed, activations=activations, backend="triton"), found)
    assert packed.columns is not None
    packed.columns.copy_(packed.columns.roll(16))
    other = lath.linear(x, packed, activations=activations, backend="triton")
    assert not torch.equal(other, found)
    term = packed.terms[0]
    plan = lath.plan(3, *term.shape, str(term.codec), x.dtype, "sm_80")
    with pytest.raises(ValueError, match="order needs activations that are rounded"):
        planes.linear(x, term, None, ActivationFormat(), plan, None, packed.columns_of(0))  # type: ignore[arg-type]


@pytest.mark.parametrize(("m", "columns"), [(1, 70), (3, 70), (33, 70), (2, 33000), (5, 33000)])
def test_outliers_are_exact(m: int, columns: int) -> None:
    weight = make_outliers(23, columns, 40 if columns == 70 else 0.01)
    x = torch.randint(-8, 9, (m, columns)).float()
    bias = torch.arange(23)
    expected = x.double() @ weight.dequantize().double().T
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(run(x.to(dtype), weight, None).double(), expected)  # type: ignore[attr-defined]
    assert torch.equal(run(x, weight, bias).double(), expected + bias)  # type: ignore[attr-defined]


def test_nan_reaches_only_rows_that_read_it() -> None:
    weight = make_outliers(23, 70, 30)
    for m in (2, 9):
        x = torch.randn(m, 70)
        clean = run(x, weight, None)
        column = int(weight.codes[-1])
        x[:, column] = torch.nan
        y = run(x, weight, None)
        reads = weight.dequantize()[:, column] != 0
        assert bool(y[:, reads].isnan().all())  # type: ignore[index]
        assert torch.equal(y[:, ~reads], clean[:, ~reads])  # type: ignore[index]


@pytest.mark.parametrize("m", [3, 9])
def test_sanitizer_is_clean_and_order_does_not_matter(m: int) -> None:
    weight, results = make_outliers(21, 70, 20), []
    x, bias = torch.randn(m, 75)[:, :70].half(), torch.randn(21)
    for order in (None, "reverse"):
        with sanitize(order=order) as report:  # type: ignore[arg-type]
            results.append(run(x, weight, bias))
        report.assert_clean()
    assert torch.equal(results[0], results[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["mix2.5-g32+out1%", "billm10%-g64"])
def test_sanitizer_is_clean_over_a_sum(text: str) -> None:
    packed = make_sum(text, 20, 150)
    with sanitize() as report:
        lath.linear(torch.randn(3, 150), packed, torch.randn(20), backend="triton")
    report.assert_clean()


def test_a_wrong_offset_is_found() -> None:
    """Negative control: a row that ends behind the entries reads out of bounds."""
    weight = make_outliers(21, 70, 20)
    weight.offsets[-1] += 40
    with sanitize() as report:
        run(torch.randn(3, 70), weight, None)
    with pytest.raises(AssertionError, match="bounds"):
        report.assert_clean()


def test_a_wrong_term_is_seen() -> None:
    packed = make_sum("int4-g64+out1%")
    x = torch.randn(3, 200)
    found = answer_of(x, packed, None, "float")
    packed.terms[1].values[5] *= 1.5  # type: ignore[attr-defined]
    y = lath.linear(x, packed, backend="triton")
    assert ratio_of(y, found, packed) > 1


@pytest.mark.parametrize("text", ["int4-g64+out1%", "mix2.5-g32"])
def test_many_tokens_decode_once(text: str) -> None:
    """The whole is rounded once to x's dtype and multiplied by a library."""
    packed = make_sum(text)
    x = torch.randn(300, 200).half()
    plan = lath.plan(300, 37, 200, packed.codec, torch.float16, "sm_80")
    assert plan.dataflow == "decode_matmul"
    assert "multiplied once" in plan.reason
    y = lath.linear(x, packed, torch.ones(37).half(), backend="triton")
    found = answer_of(x, packed, torch.ones(37).half(), "float")
    assert ratio_of(y, found, packed, roundings=1) <= 1


def test_out_is_filled_and_returned() -> None:
    packed = make_sum("mix2.5-g32")
    x, out = torch.randn(3, 200).half(), torch.full((3, 37), torch.nan)
    plan = lath.plan(3, 37, 200, packed.codec, torch.float16, "sm_80")
    y = sum_triton.linear(x, packed, None, ActivationFormat(), plan, out)
    assert y is out
    assert torch.equal(out.half(), lath.linear(x, packed, backend="triton"))
    empty = sum_triton.linear(x[:0], packed, None, ActivationFormat(), plan)
    assert tuple(empty.shape) == (0, 37)
