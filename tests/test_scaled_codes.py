"""Scales of 8 bits that are multiplied into the codes: DGQ (integers) and FireQ (E4M3 numbers)."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases_tables import answer, make_weight
from numpy.typing import NDArray

import lath
from cases import plan_of
from lath.formats import packing
from lath.formats import values as value_tables
from lath.formats.activations import ActivationFormat, activation_format
from lath.formats.codec import Codec
from lath.formats.qtensor import QTensor
from lath.kernels import quantize_tables
from lath.kernels.linear import cpu
from lath.kernels.linear import triton as launcher
from lath.kernels.linear.cpu_views import cpu_view
from lath.kernels.linear.plan_facts import folds_scales
from lath.reference import codecs
from lath.reference import scales as scales_of_codec

DGQ = ["int4-g64-s8", "int4-g64-asym-s8", "int3-g96-s8", "int2-g32-asym-s8", "int4-s8"]
PLANS = ["flat int8 16x32x128", "flat int8 8x32x128 k3 swap", "tiled int8 16x32x256"]


def dgq_weight(text: str, rows: int, columns: int, extreme: bool) -> QTensor:
    """Scales of rows that are powers of two; extreme: the largest products there are, positive."""
    rng = np.random.default_rng([rows, columns])
    weight = make_weight(text, rows, columns, rng)
    codec = weight.codec
    assert weight.outer is not None
    weight.outer = 2.0 ** torch.from_numpy(rng.integers(-3, 4, len(weight.outer))).half()
    if extreme:
        weight.scales = torch.full_like(weight.scales, codec.largest_inner_scale)
        weight.scales[:, ::3] -= 1
        codes = torch.full((rows, columns), codec.levels - 1, dtype=torch.uint8)
        weight.codes = packing.pack(codes, codec)
        if weight.zeros is not None:
            weight.zeros = torch.zeros_like(weight.zeros)
    return weight


def sum_of_group_matmuls(x: NDArray[np.int64], weight: QTensor) -> NDArray[np.int64]:
    """Σ over groups of scale * (one int4 matmul of the group), in int64."""
    codec, (rows, columns) = weight.codec, weight.shape
    codes, size = weight.unpack_codes().numpy().astype(np.int64), codec.group_size(columns)
    total = np.zeros((len(x), rows), np.int64)
    for g in range(codec.num_groups(columns)):
        part = slice(g * size, (g + 1) * size)
        zero: NDArray[np.int64] | int = int(codec.zero_code)
        if weight.zeros is not None:
            zero = weight.zeros[g, :rows].numpy().astype(np.int64)[:, None]
        scale = weight.scales[g, :rows].numpy().astype(np.int64)
        total += scale * (x[:, part] @ (codes[:, part] - zero).T)
    return total


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("text", DGQ)
def test_dgq_is_one_integer_sum_over_all_groups(text: str, extreme: bool) -> None:
    """One int8 matmul is the sum of the groups' matmuls, as exact integers that fp32 cannot hold:
    a kernel that added groups in fp32 would round before the end, and shows (see below)."""
    columns = 5000 if extreme else 500
    weight = dgq_weight(text, 20, columns, extreme)
    rng = np.random.default_rng(1)
    codes = rng.integers(60 if extreme else -127, 128, (5, columns))
    codes[:, ::50] = 127
    x = torch.from_numpy(codes).float()
    exact = sum_of_group_matmuls(codes, weight)
    assert np.abs(exact).max() < 2**31
    assert (np.abs(exact).max() > 2**24) == extreme
    assert weight.outer is not None
    outer = weight.outer[:20].double().numpy()
    want = torch.from_numpy((exact.astype(np.float32) * outer).astype(np.float32))
    fmt = ActivationFormat("int8")
    assert cpu_view(weight, fmt).record.is_folded
    for m in (1, 5):
        assert torch.equal(cpu.linear(x[:m], weight, None, fmt), want[:m]), f"cpu, M = {m}"
    for chosen in PLANS if not extreme else PLANS[::2]:
        y = launcher.linear(x, weight, None, fmt, plan_of(chosen))
        assert torch.equal(y, want), chosen


def test_sums_of_groups_in_fp32_are_another_number() -> None:
    """Negative control of the test above: the same weights and numbers, scaled group by group."""
    weight = dgq_weight("int4-g64-s8", 20, 5000, True)
    codes = np.random.default_rng(1).integers(60, 128, (5, 5000))
    codes[:, ::50] = 127
    x = torch.from_numpy(codes).float()
    by_group = ActivationFormat("int8", 64)
    assert not folds_scales(5000, weight.codec, by_group)
    one, many = (cpu.linear(x, weight, None, f) for f in (ActivationFormat("int8"), by_group))
    assert not torch.equal(one, many)
    assert torch.allclose(one, many, rtol=1e-5)


def test_scales_that_leave_int8_are_refused() -> None:
    """Negative control: the least scale of which scale * |code - zero| passes 127."""
    for text, most in (("int4-g64-s8", 15), ("int4-g64-asym-s8", 8), ("int2-g64-s8", 63)):
        state = lath.quantize(torch.randn(20, 128), text).state_dict()
        codec = Codec.parse(text)
        reach = codec.levels - 1 if codec.zero == "integer" else int(codec.zero_code)
        assert most == codec.largest_inner_scale
        assert most * reach <= 127 < (most + 1) * reach
        state["scales"][1, 3] = most + 1
        with pytest.raises(ValueError, match=f"must be {most} or less, so that scale . code fits"):
            QTensor.from_state_dict(state)


def row_errors(weight: torch.Tensor, packed: lath.PackedWeight) -> NDArray[np.float64]:
    decoded = packed.dequantize().double() - weight.double()
    return decoded.square().sum(dim=1).numpy()  # type: ignore[no-any-return]


def rows_of_unlike_groups(rows: int, columns: int) -> torch.Tensor:
    """Groups of 16 columns that differ up to twentyfold, a row and a group of zeros."""
    rng = np.random.default_rng(columns)
    sizes = np.exp(rng.uniform(-3, 0, (rows, -(-columns // 16)))).repeat(16, axis=1)
    weight = rng.standard_normal((rows, columns)) * sizes[:, :columns]
    weight[2], weight[3, 16:32] = 0, 0
    return torch.from_numpy(weight.astype(np.float32))


@pytest.mark.parametrize("text", ["int4-g16-s8", "int4-g32-asym-s8", "int2-g16-asym-s8", "int4-s8"])
def test_the_search_of_rows_lowers_errors(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DGQ's second phase: as the definition bit for bit; the error of no row is larger than the
    first phase leaves it, that of all together is smaller; products stay in int8."""
    weight, codec = rows_of_unlike_groups(21, 200), Codec.parse(text)
    found = lath.quantize(weight, text, search=True)
    assert isinstance(found, QTensor)
    expected = codecs.quantize(weight.numpy(), codec, search=True)
    assert expected.outer is not None
    assert np.array_equal(found.unpack_codes().numpy(), expected.codes)
    assert np.array_equal(found.scales[:, :21].numpy(), expected.scales)
    assert np.array_equal(found.outer[:21].numpy(), expected.outer)  # type: ignore[index]
    assert np.abs(integers_of(found)).max() <= 127
    found.check_values()
    monkeypatch.setattr(quantize_tables, "_ROW_RATIOS", [1.0])
    monkeypatch.setattr(quantize_tables, "_INNER_STEPS", [0])
    first = lath.quantize(weight, text, search=True)
    exact, both = row_errors(weight, first), row_errors(weight, found)
    assert (both <= exact * (1 + 1e-9)).all()
    assert both.sum() < (0.98 if codec.group is not None else 1) * exact.sum()
    # Negative control: with the search switched off so, only the first phase is left.
    monkeypatch.setattr(codecs, "ROW_RATIOS", [1.0])
    monkeypatch.setattr(codecs, "INNER_STEPS", [0])
    alone = codecs.quantize(weight.numpy(), codec, search=True)
    assert np.array_equal(first.scales[:, :21].numpy(), alone.scales)
    assert not np.array_equal(found.scales, first.scales)


def integers_of(weight: QTensor) -> NDArray[np.int64]:
    """scale * (code - zero), what the dot multiplies."""
    codec, (rows, columns) = weight.codec, weight.shape
    group = np.arange(columns) // codec.group_size(columns)
    zero: NDArray[np.int64] | int = int(codec.zero_code)
    if weight.zeros is not None:
        zero = weight.zeros[:, :rows].numpy().astype(np.int64).T[:, group]
    scales = weight.scales[:, :rows].numpy().astype(np.int64).T[:, group]
    product: NDArray[np.int64] = scales * (weight.unpack_codes().numpy().astype(np.int64) - zero)
    return product


def test_the_search_of_rows_by_brute_force() -> None:
    """Every row scale with every choice of the integers beside the nearest, all groups at once."""
    weight, codec = rows_of_unlike_groups(6, 48), Codec.parse("int4-g16-s8")
    exact = np.abs(weight.numpy()).reshape(6, 3, 16).max(axis=2).T / np.float32(7.5)
    stored, outer = scales_of_codec.store_scales(exact, codec)
    assert outer is not None
    inner, rows = codecs.search_rows(weight.numpy(), codec, exact, outer)

    def error(n: int, row: np.float32, chosen: tuple[int, ...]) -> float:
        scale = (np.array(chosen, np.float32) * row).repeat(16)
        code = np.clip(np.rint(weight[n].numpy() / scale), -8, 7)
        return float(((code * scale.astype(np.float64) - weight[n].numpy()) ** 2).sum())

    for n in range(6):
        least = np.inf
        for ratio in codecs.ROW_RATIOS:
            row = np.float32(np.float16(np.float32(outer[n]) * np.float32(ratio)))
            near = np.rint(exact[:, n] / row)
            beside = [sorted({int(np.clip(m + s, 1, 15)) for s in (-1, 0, 1)}) for m in near]
            least = min([least, *(error(n, row, c) for c in itertools.product(*beside))])
        got = error(n, np.float32(rows[n]), tuple(inner[:, n]))
        assert got == pytest.approx(least, rel=1e-12)
        assert got <= error(n, np.float32(outer[n]), tuple(stored[:, n]))


def test_dgq_reads_a_byte_of_scale_on_a_cpu() -> None:
    weight = lath.quantize(torch.randn(64, 1024), "int4-g128-s8")
    view = cpu_view(weight, ActivationFormat("int8"))
    assert view.records.numel() == 64 * 1024 // 2 + 64 * 1024 // 128
    assert not cpu_view(weight, ActivationFormat()).record.is_folded


def nearest_e4m3(number: Fraction) -> float:
    """By exact distances; of two as near, the one with an even mantissa."""
    entries = value_tables.table("e4m3")
    finite = [code for code in range(256) if entries[code] == entries[code]]
    best = min(finite, key=lambda c: (abs(Fraction(entries[c]) - number), c % 2))
    return entries[best]


@pytest.mark.parametrize("text", ["int4-g16-fp8", "int3-g16-fp8"])
def test_fireq_entries_are_rounded_to_e4m3(text: str) -> None:
    """Every code with every scale there is, from the least (2**-9) to the largest."""
    codec = Codec.parse(text)
    scales = torch.arange(1, 127, dtype=torch.uint8)
    numbers = scales.view(torch.float8_e4m3fn).float()
    scales = scales[numbers <= codec.largest_inner_scale]
    assert codec.largest_inner_scale * codec.zero_code == 448
    codes = (torch.arange(16) % codec.levels).to(torch.uint8).repeat(16, len(scales))
    weight = QTensor(
        codec, (16, 16 * len(scales)), packing.pack(codes, codec),
        scales[:, None].expand(-1, 16).contiguous(), None, torch.full((16,), 0.5),
    )  # fmt: skip
    decoded = weight.dequantize()[3].reshape(len(scales), 16)
    rounded = 0
    for i, scale in enumerate(scales.view(torch.float8_e4m3fn).double().tolist()):
        for code in range(codec.levels):
            product = Fraction(scale) * int(code - codec.zero_code)
            want = nearest_e4m3(product)
            assert decoded[i, code] == want / 2, (scale, code)
            rounded += want != product
            # The extra error over exact integers: none for powers of two, else 2**-4 at most.
            assert abs(Fraction(want) - product) <= abs(product) / 16
            if abs(code - codec.zero_code) in (0, 1, 2, 4, 8):
                assert want == product
    assert rounded > 100
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(launcher.dequantize(weight, dtype), weight.dequantize(dtype))
    assert torch.equal(cpu.linear(torch.eye(weight.shape[1]), weight, None, ActivationFormat()),
                       weight.dequantize().T)  # fmt: skip


def test_fireq_scales_at_the_edge_of_e4m3() -> None:
    """Groups far below the largest of their row: scales become subnormal, then the least."""
    dense = torch.randn(16, 128)
    for g in range(8):
        dense[:, 16 * g : 16 * g + 16] *= 4.0 ** -(2 * g)
    dense[3] = 0
    weight = lath.quantize(dense, "int4-g16-fp8")
    inner = weight.scales.view(torch.float8_e4m3fn).float()
    assert inner.max() == 56
    assert inner.min() == 2.0**-9
    assert bool(((inner > 2.0**-9) & (inner < 2.0**-6)).any())
    decoded = weight.dequantize()
    assert bool(decoded.isfinite().all())
    assert not decoded[3].any()
    assert not decoded[:, 96:].any()  # smaller than half the least step: zero, not noise
    reference = codecs.quantize(dense.numpy(), weight.codec)
    assert np.array_equal(
        decoded.double().numpy(),
        codecs.dequantize(
            reference.codes, reference.scales, None, weight.codec, reference.outer
        ).astype(np.float32),
    )


@pytest.mark.parametrize("text", ["int4-g32-fp8", "e4m3", "mxfp8"])
def test_fp16_stands_in_for_e4m3_exactly(text: str) -> None:
    """Where a GPU has no E4M3 dot: the same numbers, so that exact sums are equal bit for bit."""
    weight = make_weight(text, 20, 300, np.random.default_rng(2), "integers")
    codes = torch.from_numpy(np.random.default_rng(3).integers(0, weight.codec.levels, (20, 300)))
    if weight.codec.values == "e4m3":
        codes = torch.from_numpy(np.random.default_rng(3).choice([0, 0x30, 0x38, 0xB8], (20, 300)))
    weight.codes = packing.pack(codes.to(torch.uint8), weight.codec)
    if weight.outer is not None:
        weight.scales = torch.full_like(weight.scales, 0x38)  # 1
        weight.scales[::2] = 0x34  # 3/4: 15/4 and 21/4 are rounded
        weight.outer = torch.ones_like(weight.outer)
    x = torch.from_numpy(np.random.default_rng(4).integers(-7, 8, (5, 300))).float()
    x[:, 0] = 7.0
    y64 = torch.from_numpy(answer(x, weight, None, "fp8").y64)
    for chosen in ("flat e4m3 16x32x128 k2", "flat e4m3 8x32x128 swap", "flat fp16 16x32x128"):
        y = launcher.linear(x, weight, None, activation_format("fp8"), plan_of(chosen))
        assert torch.equal(y.double(), y64), chosen


def test_plans_say_where_e4m3_is_multiplied() -> None:
    for text, activations, device, dot in (
        ("int4-g128-fp8", "fp8", "sm_90", "e4m3"), ("int4-g128-fp8", "fp8", "sm_80", "fp16"),
        ("int4-g128-fp8", "fp8", "gfx950", "e4m3"), ("int4-g128-fp8", "fp8", "gfx942", "fp16"),
        ("int4-g128-fp8", "float", "sm_90", "bf16"), ("int4-g128-fp8", "int8", "sm_90", "fp16"),
        ("e4m3", "fp8", "sm_100", "e4m3"), ("e4m3-g48", "fp8", "sm_90", "fp16"),
        ("e4m3", "fp8-e5m2", "sm_90", "fp16"), ("int8", "fp8", "sm_90", "fp16"),
        ("int4-g128-s8", "int8", "sm_90", "int8"), ("int4-g48-s8", "int8", "sm_90", "fp16"),
        ("int4-g128-fp8", "fp8", "cpu", "fp32"),
    ):  # fmt: skip
        plan = lath.plan(16, 4096, 4096, text, torch.bfloat16, device, activations)
        assert plan.dot == dot, (text, activations, device)
    packed = lath.quantize(torch.randn(20, 64), "int4-g32")
    with pytest.raises(ValueError, match=r"plan dot .* no dot of 8-bit floats .* got 'e4m3'"):
        launcher.linear(torch.randn(3, 64), packed, None, activation_format("fp8"),
                        plan_of("flat e4m3 16x32x128"))  # fmt: skip


def test_both_go_through_patch() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    x = torch.randn(6, 128)
    model.requires_grad_(False)
    want = model(x)
    for codec, activations in (("int4-g32-s8", "int8"), ("int4-g32-fp8", "fp8")):
        with lath.patch(model, codec, activations=activations) as report:
            assert report.replaced[0].activations == activations
            error = float((model(x) - want).norm() / want.norm())
            assert 0 < error < 0.25  # two layers of 4 bits, each about 8 % (step / sqrt(12))
        assert torch.equal(model(x), want)
