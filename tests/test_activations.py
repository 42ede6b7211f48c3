"""Activation formats beyond int8: int6 (FlexQ), 8-bit floats, W8A8; on every backend."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import cases
import lath
import oracle
from cases import LinearCase, plan_of
from lath.formats import values as value_tables
from lath.formats.activations import ActivationFormat, activation_format
from lath.integration.report_table import typical_error
from lath.kernels.linear import triton as launcher
from lath.kernels.linear.triton_settings import Settings
from lath.reference import codecs
from lath.reference import linear as reference

BACKENDS = ["reference", "cpu", "triton"]
FORMATS = ["int8", "int6", "int6-g128", "fp8", "fp8-g64", "fp8-e5m2", "fp8-e5m2-g16"]


@pytest.mark.parametrize("text", FORMATS)
def test_text_forms_round_trip(text: str) -> None:
    fmt = ActivationFormat.parse(text)
    assert str(fmt) == text
    assert eval(repr(fmt)) == fmt
    assert fmt.bits == (6 if text.startswith("int6") else 8)


@pytest.mark.parametrize("text", ["int7", "int6-g8", "fp8-e4m3", "fp8-g0", "float-g64", "fp16"])
def test_text_forms_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"activations (must be|group must)"):
        ActivationFormat.parse(text)


def awkward(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    """Rows of every size, with zeros, tiny, infinite and missing numbers among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-4, 5, (rows, 1))
    x = x.astype(np.float32)
    x[0], x[1, 3], x[2, -1], x[3, : columns // 2] = 0, np.nan, -np.inf, 1e-35
    return x


@pytest.mark.parametrize("text", FORMATS)
def test_no_other_code_is_nearer(text: str) -> None:
    """Exact rationals: of all codes, the one nearest to x / scale, of two as near the even one."""
    fmt = ActivationFormat.parse(text)
    x = awkward(7, 150)
    codes, scales = reference.quantize_activations(x, fmt)
    table = np.arange(-fmt.largest, fmt.largest + 1) if fmt.is_integer else np.array([])
    if fmt.values is not None:
        entries = np.array(value_tables.table(fmt.values))
        table = np.unique(entries[np.isfinite(entries)])
        assert fmt.largest == table.max()
    group = np.arange(150) // fmt.group_size(150)
    for m, k in np.ndindex(*x.shape):
        block, scale = x[m, group == group[k]], scales[m, group[k]]
        if not np.isfinite(block).all():
            assert np.isnan(scale)
            assert codes[m, k] == 0
            continue
        absmax = np.abs(block).max()
        if absmax < 2.0**-100:
            assert (scale, codes[m, k]) == (1, 0)
            continue
        assert scale == np.float32(Fraction(float(absmax)) / fmt.largest)
        # inverse and product are rounded once each.
        scaled = float(np.float32(x[m, k]) * (np.float32(fmt.largest) / absmax))
        assert abs(scaled - float(x[m, k]) / float(scale)) <= 4 * 2.0**-24 * fmt.largest
        distance = np.abs(table - scaled)
        assert float(codes[m, k]) in table[distance == distance.min()]
    ties = np.zeros((1, 16), np.float32)
    ties[0, :5] = [fmt.largest, 0.5, 1.5, 2.5, -0.5]
    rounded = reference.quantize_activations(ties, ActivationFormat(fmt.kind))[0][0, :5]
    want = [fmt.largest, 0, 2, 2, 0] if fmt.is_integer else [fmt.largest, 0.5, 1.5, 2.5, -0.5]
    assert rounded.tolist() == want


CASES = [
    LinearCase("int6-g128", 1, 40, 300, "bf16", "int6-g128", bias=True),
    LinearCase("int6-g128", 9, 40, 300, "fp16", "int6-g128"),
    LinearCase("int6-g128", 3, 21, 256, "fp32", "int8-g128"),
    LinearCase("int6-asym", 5, 20, 130, "fp32", "int6", "one_sign"),
    LinearCase("int8", 1, 40, 300, "bf16", "int8", bias=True),
    LinearCase("int8-g64", 17, 33, 300, "fp16", "int8"),
    LinearCase("int4-g64", 2, 20, 200, "fp16", "fp8", bias=True),
    LinearCase("int8", 5, 37, 300, "bf16", "fp8"),
    LinearCase("int4-g32-asym", 9, 20, 140, "fp32", "fp8-g64", "one_sign"),
    LinearCase("int3-fzero", 1, 20, 140, "fp32", "fp8-e5m2"),
    LinearCase("int5-g48", 3, 20, 200, "fp16", "fp8-e5m2-g48"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: LinearCase, backend: str) -> None:
    data = cases.make(case)
    y = lath.linear(data.x, data.weight, data.bias, activations=case.activations, backend=backend)
    assert y.dtype == case.torch_dtype
    # On a CPU code * scale is rounded to fp32 before the dot: a rounding more.
    bound = oracle.linear_bound(data.y64, data.gauge, case.k + 1, case.torch_dtype)
    assert oracle.test_ratio(y, data.y64, bound) <= 1, (
        f"LinearCase.parse({str(case)!r}) {backend}: {oracle.worst(y, data.y64, bound)}"
    )


GPU_CASES = [
    "int6-g128 5 37 300 fp16 int6-g128 normal True | flat int8 16x32x128 k2",
    "int6-g64 3 37 300 fp32 int6 normal False | flat int8 8x32x128 swap",
    "int6-g48 3 20 200 bf16 int6-g16 normal False | flat fp16 16x32x128",
    "int6 2 20 140 fp32 int6 normal False | gemv fp32 2x32x128",
    "int4-g64 5 37 300 fp16 fp8 normal True | flat fp16 16x32x128 k2",
    "int8-asym 3 37 300 bf16 fp8-g64 normal False | flat fp16 8x32x128 swap",
    "int5-g32-fzero 17 20 200 fp32 fp8-e5m2 normal False | tiled fp16 16x32x128",
    "int2-g64 2 20 140 fp16 fp8-e5m2-g32 normal True | gemv fp32 2x32x128 k2",
]


@pytest.mark.parametrize("text", GPU_CASES)
def test_parity_of_gpu_plans(text: str) -> None:
    case, chosen = (part.strip() for part in text.split("|"))
    parsed = LinearCase.parse(case)
    data = cases.make(parsed)
    fmt = activation_format(parsed.activations)
    y = launcher.linear(data.x, data.weight, data.bias, fmt, plan_of(chosen))
    bound = oracle.linear_bound(data.y64, data.gauge, parsed.k, parsed.torch_dtype)
    assert oracle.test_ratio(y, data.y64, bound) <= 1, oracle.worst(y, data.y64, bound)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(
    ("right", "wrong"), [("int6", "int8"), ("fp8", "fp8-e5m2"), ("fp8", "int8")]
)
def test_another_format_is_noticed(right: str, wrong: str, backend: str) -> None:
    """Negative control: the numbers of another format put the ratio far above 1."""
    case = LinearCase("int6-g64", 2, 20, 128, "fp32", right)
    data = cases.make(case)
    bound = oracle.linear_bound(data.y64, data.gauge, case.k, case.torch_dtype)
    y = lath.linear(data.x, data.weight, activations=wrong, backend=backend)
    assert oracle.test_ratio(y, data.y64, bound) > 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activations", ["int6-g32", "fp8", "fp8-e5m2-g64"])
def test_nan_and_infinity_stay_in_their_row(backend: str, activations: str) -> None:
    packed = lath.quantize(torch.randn(20, 160), "int4-g32")
    x = torch.randn(6, 160)
    clean = lath.linear(x, packed, activations=activations, backend=backend)
    x[1, 5], x[4, 159] = float("nan"), float("inf")
    y = lath.linear(x, packed, activations=activations, backend=backend)
    assert bool(y[1].isnan().all())
    assert not bool(y[4].isfinite().any())
    assert torch.equal(y[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


@pytest.mark.parametrize("text", ["int6-g64", "fp8", "fp8-g48", "fp8-e5m2", "fp8-e5m2-g512"])
def test_triton_quantises_as_the_definition_bit_for_bit(text: str) -> None:
    fmt = activation_format(text)
    x = torch.from_numpy(awkward(8, 300))
    span = {"int6-g64": 64, "fp8-g48": 16}.get(text, 128)
    rows = launcher._prepare(x, fmt, Settings("fp16", span, 128, 16, True, False, {}))
    codes, scales = reference.quantize_activations(x.numpy(), fmt)
    assert rows.scales is not None
    assert rows.sums is not None
    np.testing.assert_array_equal(rows.scales[:, : len(x)].T.numpy(), scales)
    np.testing.assert_array_equal(rows.values[:, :300].float().numpy(), codes)
    padded = np.pad(codes.astype(np.float64), ((0, 0), (0, 84)))
    sums = padded.reshape(8, -1, span).sum(axis=2)
    got = rows.sums[:, :8].T.double().numpy()
    if fmt.is_integer:
        np.testing.assert_array_equal(got, sums)
    else:
        assert (np.abs(got - sums) <= span * 2.0**-24 * np.abs(padded).sum(axis=1)[:, None]).all()


@pytest.mark.parametrize("x_bits", [6, 8])
def test_bit_planes_are_the_integer_matmul(x_bits: int) -> None:
    """FlexQ's kernel on binary tensor cores, Σ 2^(i+j) popcount(w_i AND x_j) with the planes of
    the sign negative, gives exactly the integers of one int8 dot."""
    rng = np.random.default_rng(x_bits)
    weight = rng.standard_normal((8, 256)).astype(np.float32)
    x = rng.standard_normal((5, 256)).astype(np.float32)
    w = codecs.quantize(weight, codecs.Codec.parse("int6-g128")).codes.astype(np.int64) - 32
    a = reference.quantize_activations(x, ActivationFormat.parse(f"int{x_bits}-g128"))[0]
    a = a.astype(np.int64)
    w[0, :2], a[0, :2] = [-32, 31], [-(1 << (x_bits - 1)), (1 << (x_bits - 1)) - 1]

    def planes(codes: NDArray[np.int64], bits: int) -> list[tuple[int, NDArray[np.uint8]]]:
        """Weight and packed bits of each plane of two's complement."""
        signs = [1] * (bits - 1) + [-1]
        return [
            (sign << i, np.packbits(((codes >> i) & 1).astype(np.uint8), axis=1))
            for i, sign in enumerate(signs)
        ]

    total = np.zeros((5, 8), np.int64)
    for w_weight, w_bits in planes(w, 6):
        for a_weight, a_bits in planes(a, x_bits):
            both = a_bits[:, None] & w_bits[None]
            total += w_weight * a_weight * np.unpackbits(both, axis=2).sum(axis=2, dtype=np.int64)
    assert np.array_equal(total, a @ w.T)


def test_flexq_stores_six_bits() -> None:
    packed = lath.quantize(torch.randn(64, 1024), "int6-g128")
    assert packed.codes.nbytes * 8 == 6 * 64 * 1024
    assert packed.nbytes * 8 == (6 + 16 / 128) * 64 * 1024
    assert ActivationFormat.parse("int6-g128").bits == 6


def test_flexq_patches_each_layer_as_it_asks() -> None:
    """6-bit activations, and 8 bits where a layer is sensitive: two calls."""
    block = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(128, 256, bias=False)})
    block["down_proj"] = torch.nn.Linear(256, 128, bias=False)
    x = torch.randn(4, 128)
    with torch.no_grad():
        want = block["down_proj"](block["up_proj"](x))
        with (
            lath.patch(block, "int6-g128", only=("down_proj",), activations="int8-g128"),
            lath.patch(block, "int6-g128", skip=("down_proj",), activations="int6-g128") as report,
        ):
            assert {name: str(m.activations) for name, m in block.items()} == {  # type: ignore[union-attr]
                "up_proj": "int6-g128", "down_proj": "int8-g128",
            }  # fmt: skip
            assert "int6-g128" in str(report)
            got = block["down_proj"](block["up_proj"](x))
    # 6-bit weights twice and 6-bit activations once err by 3.1 % of normal numbers each, 8-bit
    # activations by 0.8 %: in all no more than their sum.
    most = 3 * typical_error("int6-g128") + typical_error("int8-g128")
    assert 0 < float((got - want).norm() / want.norm()) < most
