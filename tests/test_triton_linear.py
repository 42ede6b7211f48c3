"""The Triton loops of `linear`, each under plans chosen here, against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cases
import lath
import oracle
from cases import LinearCase, plan_of
from lath.formats.activations import ActivationFormat, activation_format
from lath.formats.plan import Plan
from lath.kernels.linear import triton as launcher
from lath.kernels.linear import triton_settings
from lath.kernels.linear.triton_settings import Settings, settings_of
from lath.reference import linear as reference
from tools import inline_assembly
from tools.sanitizer import sanitize

# Codec, M, N, K, dtype, activations, data, bias | plan. Each row varies what the ones before did
# not: together they meet each bits x dot type, zero x dot type, span (16, 32, 64, 128, 256, a whole
# step, all of K), both orientations, splits that leave a piece empty, and tails of M, N and K.
CATALOGUE = [
    "int1 5 37 300 fp16 float normal True | flat fp16 16x32x128",
    "int2-g16 17 37 300 fp16 float one_sign False | flat fp16 16x64x128 k2 swap",
    "int3-g48 3 37 300 fp16 float normal True | flat fp16 8x32x128 k3 swap",
    "int4-g128 5 37 300 fp16 float normal True | flat fp16 16x32x128 k2",
    "int4-g64-fzero 1 20 260 fp16 float normal False | flat fp16 8x16x128 swap",
    "int5-g96-asym 2 16 200 fp16 float one_sign False | flat fp16 16x16x128 k2",
    "int6-g256 5 37 600 fp16 float normal False | flat fp16 16x32x256 k2",
    "int7-asym 17 33 140 fp16 float normal False | tiled fp16 16x32x128 swap",
    "int8-fzero-s32 3 37 300 fp16 float one_sign True | flat fp16 16x32x128 k8",
    "int1-g128-asym 3 21 300 bf16 float normal False | flat bf16 16x32x128",
    "int2 5 37 384 bf16 float normal True | flat bf16 8x64x256 k2 swap",
    "int3-g32-fzero 17 20 150 bf16 float normal False | tiled bf16 32x32x128",
    "int4-g112-s32 2 37 300 bf16 float normal True | flat bf16 16x32x128 k2 swap",
    "int5 5 17 129 bf16 float one_sign False | flat bf16 16x32x128",
    "int6-g64-asym 3 37 300 bf16 float normal False | flat bf16 8x32x128 k3 swap",
    "int7-g128 5 16 127 bf16 float normal False | flat bf16 16x16x128",
    "int8 17 37 300 bf16 float normal True | tiled bf16 16x32x128",
    "int8-g128-asym 5 37 300 bf16 float normal False | flat bf16 16x32x128 k2 swap",
    "int1-g32 2 19 77 fp32 float normal False | flat fp32 16x32x128",
    "int3-g64 5 37 300 fp32 float normal True | flat fp32 16x32x128 k2 swap",
    "int4-asym 17 37 300 fp32 float one_sign False | tiled fp32 32x16x128",
    "int8-g80-fzero 1 1 1 fp32 float normal True | flat fp32 16x16x128",
    "int6 3 20 140 fp32 float normal False | flat fp32 16x32x256 swap",
    "int1 5 37 300 fp16 int8 normal False | flat int8 16x32x128 k2",
    "int1-g64-fzero 3 20 200 bf16 int8-g32 normal False | flat int8 8x32x128 swap",
    "int2 17 37 520 fp32 int8 normal True | tiled int8 16x64x256 swap",
    "int3-g128 5 37 300 fp16 int8-g128 one_sign False | flat int8 16x32x128 k3",
    "int4 5 37 600 bf16 int8 normal True | flat int8 16x32x256 k2",
    "int4-g64 3 37 300 fp16 int8-g64 normal False | flat int8 8x64x128 k2 swap",
    "int4-g256-asym 17 20 600 fp32 int8-g96 normal False | tiled int8 32x32x256",
    "int5-g32-asym 2 37 300 fp32 int8 normal True | flat int8 16x32x128 swap",
    "int6-fzero 5 16 150 bf16 int8-g64 normal False | flat int8 16x16x128",
    "int7 3 37 300 fp32 int8 one_sign False | flat int8 16x32x128 k2 swap",
    "int8 17 33 300 fp32 int8 normal True | tiled int8 16x32x128",
    "int8-asym-s32 2 20 300 fp16 int8 normal False | flat int8 8x32x128 k2 swap",
    "int8-g128-fzero 5 37 300 fp32 int8-g256 normal False | flat int8 16x32x128",
    "int4-g48-asym 5 37 300 fp32 int8 normal True | flat fp16 16x32x128 k2",
    "int2-g16 3 20 200 bf16 int8-g16 normal False | flat fp16 8x32x128 swap",
    "int8-g96-fzero 17 20 200 fp32 int8-g48 normal False | tiled fp16 16x32x128",
    "int3-g64 5 20 200 fp16 int8-g80 normal False | flat fp16 16x32x128 swap",
    "int1-g16-asym 1 37 300 fp16 float normal True | gemv fp32 1x32x128",
    "int2-fzero 2 20 260 bf16 float one_sign False | gemv fp32 2x32x128 k2",
    "int3 3 37 300 fp32 float normal False | gemv fp32 4x32x128 k3",
    "int4-g128 1 37 300 bf16 int8-g128 normal True | gemv fp32 1x64x128",
    "int5-g48 4 16 140 fp32 int8-g32 normal False | gemv fp32 4x16x128 k2",
    "int6-g96-asym 1 20 77 fp16 int8 normal False | gemv fp32 1x32x128",
    "int7-g64-s32 2 20 300 fp16 float normal False | gemv fp32 2x32x128",
    "int8 3 37 256 fp32 int8 normal True | gemv fp32 4x32x128 k2",
    "int4-g32 17 37 300 fp16 float normal True | decode_matmul fp16 16x64x128",
    "int1-g48-asym 5 20 300 bf16 float normal True | decode_matmul bf16 16x64x128",
    "int7-fzero 5 37 130 fp32 float normal True | decode_matmul fp32 16x64x128",
    "int8-g16-s32 3 17 140 bf16 float one_sign False | decode_matmul bf16 16x64x128",
]


def run(case: LinearCase, chosen: Plan, data: cases.LinearInputs | None = None) -> torch.Tensor:
    data = data or cases.make_inputs(case)
    formats = activation_format(case.activations)
    return launcher.linear(data.x, data.weight, data.bias, formats, chosen)


@pytest.mark.parametrize("text", CATALOGUE)
def test_parity(text: str) -> None:
    case, chosen = (part.strip() for part in text.split("|"))
    parsed = LinearCase.parse(case)
    data = cases.make(parsed)
    y = run(parsed, plan_of(chosen), data)
    assert y.dtype == parsed.torch_dtype
    rounds = int(plan_of(chosen).dataflow == "decode_matmul")
    bound = oracle.linear_bound(data.y64, data.gauge, parsed.k, parsed.torch_dtype, rounds)
    assert oracle.test_ratio(y, data.y64, bound) <= 1, oracle.worst(y, data.y64, bound)


@pytest.mark.parametrize(
    "text",
    [
        "int4-g32-asym 5 40 400 fp32 float integers True | flat fp32 16x64x128",
        "int5-g64-fzero 5 40 400 fp16 float integers True | flat fp16 16x64x128",
        "int3 5 40 400 bf16 float integers False | flat bf16 8x64x128 swap",
        "int8-g128 5 40 400 bf16 float integers True | flat bf16 16x64x128",
        "int1-g16 2 40 400 fp32 float integers False | gemv fp32 2x64x128",
    ],
)
def test_small_integers_are_exact_at_every_split(text: str) -> None:
    """All fp32 sums are exact, so neither the split nor the order may show."""
    case, chosen = (part.strip() for part in text.split("|"))
    parsed = LinearCase.parse(case)
    data = cases.make(parsed)
    want = torch.from_numpy(data.y64).to(parsed.torch_dtype)
    for pieces in (1, 2, 3, 4):
        assert torch.equal(run(parsed, plan_of(f"{chosen} k{pieces}"), data), want), pieces


@pytest.mark.parametrize(
    ("codec", "chosen"),
    [
        ("int4-g48-asym", "tiled fp16 64x32x128"),
        ("int3-g16", "tiled fp16 64x32x128 swap"),
        ("int8-fzero", "tiled fp16 64x32x128"),
        ("int7-g64", "tiled bf16 64x32x128"),
        ("int8", "tiled bf16 64x32x128 swap"),
        ("int1-g64", "decode_matmul fp16 64x32x128"),
    ],
)
def test_identity_gives_the_decoded_weight(codec: str, chosen: str) -> None:
    packed = lath.quantize(torch.randn(18, 144), codec)
    picked = plan_of(chosen)
    dtype = cases.DTYPES[picked.dot]
    y = launcher.linear(torch.eye(144, dtype=dtype), packed, None, ActivationFormat(), picked)
    assert torch.equal(y, packed.dequantize(dtype).T)


@pytest.mark.parametrize(
    ("activations", "chosen"),
    [
        ("float", "flat fp16 16x32x128 k2"),
        ("float", "flat fp16 8x32x128 swap"),
        ("float", "gemv fp32 4x32x128"),
        ("int8", "flat int8 16x32x128"),
        ("int8-g32", "flat int8 8x32x128 k2 swap"),
        ("int8-g16", "flat fp16 16x32x128"),
    ],
)
def test_nan_and_infinity_stay_in_their_row(activations: str, chosen: str) -> None:
    packed = lath.quantize(torch.randn(20, 200), "int4-g32-asym")
    formats, picked = activation_format(activations), plan_of(chosen)
    x = torch.randn(4, 200).half()
    clean = launcher.linear(x, packed, None, formats, picked)
    x[1, 5], x[3, 199] = float("nan"), float("inf")
    y = launcher.linear(x, packed, None, formats, picked)
    assert bool(y[1].isnan().all())
    assert not bool(y[3].isfinite().any())
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    "text",
    [
        "int4-g48-asym 17 37 300 fp16 float normal True | flat fp16 16x32x128 k2",
        "int5 3 37 300 bf16 float normal True | flat bf16 8x64x256 swap",
        "int3-g64-fzero 5 20 200 fp16 int8-g64 normal True | flat int8 8x32x128 k2 swap",
        "int8 5 33 300 fp32 int8 normal False | tiled int8 16x32x256",
        "int2-g16 3 20 200 fp32 int8-g48 normal True | flat fp16 16x32x128 k3",
        "int7-g96-asym 3 37 300 fp32 float normal True | gemv fp32 4x32x128 k2",
        "int6-g64 5 37 300 fp16 float normal True | decode_matmul fp16 16x32x128",
    ],
)
def test_sanitizer_is_clean_and_order_does_not_matter(text: str) -> None:
    case, chosen = (part.strip() for part in text.split("|"))
    parsed = LinearCase.parse(case)
    data = cases.make_inputs(parsed)
    before = data.x.clone()
    results = []
    for order in (None, "reverse"):
        with sanitize(order=order) as report:  # type: ignore[arg-type]
            results.append(run(parsed, plan_of(chosen), data))
        report.assert_clean()
    assert torch.equal(results[0], results[1])
    assert torch.equal(data.x, before)


@pytest.mark.parametrize("activations", ["int8", "int8-g16", "int8-g48", "int8-g64", "int8-g512"])
@pytest.mark.parametrize("natural", [True, False])
def test_row_quantiser_is_the_definition_bit_for_bit(activations: str, natural: bool) -> None:
    formats = activation_format(activations)
    span = {"int8-g16": 16, "int8-g48": 16, "int8-g64": 64}.get(activations, 128)
    if not natural and span < 32:
        pytest.skip("a run of 32 needs a group of 32")
    x = torch.randn(6, 300) * 10.0 ** torch.arange(-3, 3)[:, None]
    x[0, :40] = torch.arange(40) - 19.5  # ties, with the scale below
    x[0, 40] = 127.0
    x[1, 70], x[2, 299], x[3] = float("nan"), -float("inf"), 0.0
    x[4, :64] *= 2.0**-110
    dot = "fp16" if natural else "int8"
    settings = Settings(dot, span, 128, 16, natural, False, {})
    rows = launcher._prepare(x, formats, settings)
    codes, scales = reference.quantize_activations(x.numpy(), formats)
    assert rows.scales is not None
    assert rows.sums is not None
    np.testing.assert_array_equal(rows.scales[:, : len(x)].T.numpy(), scales)
    got = rows.values.float().numpy()
    if not natural:
        got = got.reshape(6, -1, 16, 2).transpose(0, 1, 3, 2).reshape(6, -1)
    padded = np.pad(codes, ((0, 0), (0, 84)))
    np.testing.assert_array_equal(got, padded)
    sums = padded.reshape(6, -1, span).sum(axis=2, dtype=np.int32)
    np.testing.assert_array_equal(rows.sums[:, :6].T.numpy(), sums)
    assert not rows.sums[:, 6:].any()


def test_row_quantiser_of_a_long_token() -> None:
    """Longer than what a program holds at once: read twice, in pieces."""
    x = torch.randn(2, 9000)
    x[1, 8999] = 50.0
    settings = Settings("int8", 0, 128, 16, True, False, {})
    rows = launcher._prepare(x, ActivationFormat("int8"), settings)
    codes, scales = reference.quantize_activations(x.numpy(), ActivationFormat("int8"))
    assert rows.scales is not None
    np.testing.assert_array_equal(rows.scales[:, : len(x)].T.numpy(), scales)
    np.testing.assert_array_equal(rows.values[:, :9000].numpy(), codes)


def test_int8_sums_of_a_long_row_do_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """K so long that int32 might overflow is summed in fp32 from step to step."""
    monkeypatch.setattr(triton_settings, "MOST_INT32_COLUMNS", 128)
    settings_of.cache_clear()
    for text in ("int8-asym 3 20 300 fp32 int8", "int4 3 20 300 fp32 int8-g512"):
        case = LinearCase.parse(f"{text} one_sign False")
        data = cases.make(case)
        y = run(case, plan_of("flat int8 16x32x128 k2"), data)
        bound = oracle.linear_bound(data.y64, data.gauge, case.k, case.torch_dtype)
        assert oracle.test_ratio(y, data.y64, bound) <= 1
    assert settings_of.cache_info().currsize == 2
    settings_of.cache_clear()


def test_many_tiles() -> None:
    """More rows of tiles than run together, and a last group of them that is not full."""
    case = LinearCase("int2-g128", 150, 40, 128, "fp16")
    data = cases.make(case)
    y = run(case, plan_of("tiled fp16 16x16x128"), data)
    bound = oracle.linear_bound(data.y64, data.gauge, case.k, case.torch_dtype)
    assert oracle.test_ratio(y, data.y64, bound) <= 1


@pytest.mark.parametrize("chosen", ["flat fp16 16x32x128 k2", "gemv fp32 4x32x128"])
def test_rows_far_apart(chosen: str) -> None:
    """Offsets inside a tile are 32 bits wide; where a stride does not fit, x is copied."""
    packed = lath.quantize(torch.randn(20, 130), "int4-g64")
    buffer = torch.empty((2 << 28) + 256, dtype=torch.float16)  # virtual: three rows are touched
    x = torch.as_strided(buffer, (3, 130), (1 << 28, 1))
    x.copy_(torch.randn(3, 130))
    with sanitize() as report:
        y = launcher.linear(x, packed, None, ActivationFormat(), plan_of(chosen))
    report.assert_clean()
    near = launcher.linear(x.clone(), packed, None, ActivationFormat(), plan_of(chosen))
    assert torch.equal(y, near)


@pytest.mark.parametrize("chosen", ["flat fp16 8x32x128 k2 swap", "decode_matmul fp16 16x64x128"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_of_another_type_is_added_before_the_rounding(chosen: str, dtype: torch.dtype) -> None:
    packed = lath.quantize(torch.randn(20, 130), "int4-g64")
    x, bias = torch.randn(3, 130).half(), (300 * torch.randn(20)).to(dtype)
    y = launcher.linear(x, packed, bias, ActivationFormat(), plan_of(chosen))
    y64, gauge = cases.definition(x, packed, bias, "float")
    bound = oracle.linear_bound(y64, gauge, 130, torch.float16, int("decode" in chosen))
    assert oracle.test_ratio(y, y64, bound) <= 1


@pytest.mark.parametrize("shape", [(0, 64, 20), (3, 64, 0), (3, 0, 20), (0, 0, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    packed = lath.quantize(torch.randn(n, k), "int4-g32")
    bias = torch.randn(n)
    y = launcher.linear(
        torch.randn(m, k), packed, bias, ActivationFormat(), plan_of("flat fp32 16x32x128")
    )
    assert torch.equal(y, bias.expand(m, n) if k == 0 else torch.empty(m, n))


@pytest.mark.parametrize(
    ("chosen", "activations", "message"),
    [
        ("gemv fp32 3x32x128", "float", "plan block_m .*'gemv' must be 1, 2 or 4, got 3"),
        ("gemv fp32 2x32x128", "float", "plan block_m .* at least 3 for 3 tokens, got 2"),
        ("flat fp16 8x32x128", "float", "plan block_m .* a power of two from 16 to 256, got 8"),
        ("flat fp16 16x48x128", "float", "plan block_n .* a power of two from 16 to 256, got 48"),
        ("flat fp16 16x32x64", "float", "plan block_k .* 128 or 256, got 64"),
        ("flat bf16 16x32x128", "float", "plan dot .* that of x, 'fp16', got 'bf16'"),
        ("flat int8 16x32x128", "int8-g48", "plan dot .* 'fp16', as scales change every 16 colu"),
        ("flat fp32 16x32x128", "int8", "plan dot .* 'int8' or 'fp16', got 'fp32'"),
        ("definition fp64 16x32x128", "float", "plan dataflow .* 'gemv', 'flat' or 'tiled'"),
        ("decode_matmul fp16 16x32x128", "int8", "'decode_matmul' takes activations 'float'"),
    ],
)
def test_impossible_plans_are_refused(chosen: str, activations: str, message: str) -> None:
    packed = lath.quantize(torch.randn(20, 64), "int4-g32")
    x = torch.randn(3, 64).half()
    with pytest.raises(ValueError, match=message):
        launcher.linear(x, packed, None, activation_format(activations), plan_of(chosen))


# Of three planes every NVIDIA target takes pairs that the kernel writes itself, sm_80 of any.
@pytest.mark.parametrize("dot", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize(
    ("codec", "target"),
    [(f"int{bits}{zero}", "sm_80") for bits in range(1, 9) for zero in ("", "-g64-asym")]
    + [("int7-g64-asym", "sm_90"), ("int8-g64-nested", "sm_90"), ("int8-nested", "sm_120")],
)
def test_what_nvidia_computes_in_assembly_is_the_same(
    codec: str, target: str, dot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoders of sm_80 and of all of NVIDIA, with twins of their instructions, bit for bit."""
    dtype = torch.bfloat16 if dot == "bf16" else torch.float16
    activations = activation_format("int8" if dot == "int8" else "float")
    weight = lath.quantize(torch.randn(20, 300), codec)
    x = torch.randn(3, 300).to(dtype)
    plan = plan_of(f"flat {dot} 16x32x128")
    plain = launcher.linear(x, weight, None, activations, plan)
    monkeypatch.setattr(launcher, "_target", lambda x: target)
    assert torch.equal(plain, launcher.linear(x, weight, None, activations, plan))


@pytest.mark.parametrize(
    ("codec", "target", "runs"),
    [
        ("int4", "sm_80", True), ("int4", "sm_90", False), ("int6", "sm_90", False),
        ("int7", "sm_90", True), ("int8-g64-nested", "sm_120", True), ("int7", "sm_75", False),
    ],
)  # fmt: skip
def test_a_wrong_twin_shows(
    codec: str, target: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the assembly is what runs, another instruction in its place gives other numbers."""
    weight, x = lath.quantize(torch.randn(20, 128), codec), torch.randn(3, 128).half()
    plan = plan_of("flat fp16 16x32x128")
    plain = launcher.linear(x, weight, None, ActivationFormat(), plan)
    monkeypatch.setattr(launcher, "_target", lambda x: target)
    text = "fma.rn.f16x2 $0, $1, $2, $3;"
    monkeypatch.setitem(inline_assembly.INSTRUCTIONS, text, lambda a, b, c: a)
    found = launcher.linear(x, weight, None, ActivationFormat(), plan)
    assert torch.equal(plain, found) != runs
