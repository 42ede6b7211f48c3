"""The Triton loops of `linear` over tables, ternary numbers and scales of 8 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases_tables import answer, bound_of, make, make_weight

import cases
import lath
import oracle
from cases import LinearCase, LinearData, plan_of
from lath.formats import packing
from lath.formats import values as value_tables
from lath.formats.activations import ActivationFormat, activation_format
from lath.formats.plan import Plan
from lath.formats.qtensor import QTensor
from lath.kernels.linear import triton as launcher
from lath.kernels.linear.triton_tables import e4m3_to_fp32, table_for
from tools.sanitizer import sanitize

# As in test_triton_linear.py. Each kind of value meets each dot type that it can, each kind of
# scale each span; groups of 16, 32, 48, 64, 128 and none, all tails, orientations and splits.
CATALOGUE = [
    "nf4-g64 5 37 300 fp16 float normal True | flat fp16 16x32x128 k2",
    "nf4-g16 3 20 200 bf16 float one_sign False | flat bf16 8x32x128 swap",
    "nf4-g64-dq 17 33 200 bf16 float normal False | tiled bf16 16x32x128 swap",
    "nf4-s32 3 21 150 fp32 float normal True | flat fp32 16x16x128",
    "nf4-g48 2 20 200 bf16 int8 normal False | flat fp16 8x32x128 swap",
    "nf4-g128-dq 1 37 300 fp16 int8-g128 normal True | gemv fp32 1x32x128 k2",
    "nf4-g32 5 20 200 fp16 float normal True | decode_matmul fp16 16x64x128",
    "fp4-g64 5 37 300 fp16 float one_sign True | flat fp16 16x32x128",
    "fp4-g128-dq 3 20 300 bf16 float normal False | flat bf16 16x32x128 k2",
    "fp4 17 33 300 fp32 int8 normal False | tiled int8 16x32x256 swap",
    "fp4-g32-dq 3 37 200 fp16 int8-g32 one_sign True | flat int8 8x32x128 swap",
    "fp4-g48 3 20 200 bf16 int8 normal False | flat fp16 16x32x128",
    "mxfp4 5 37 300 fp16 float normal False | flat fp16 16x32x128 swap",
    "mxfp4 3 20 260 bf16 int8-g64 normal True | flat int8 16x32x128 k3",
    "mxfp4 2 16 96 fp32 float one_sign False | gemv fp32 2x16x128",
    "nvfp4 5 37 300 bf16 float normal True | flat bf16 8x32x128 k2 swap",
    "nvfp4 3 20 150 fp16 int8-g16 normal False | flat fp16 16x32x128",
    "nvfp4 4 16 77 fp32 int8 normal False | gemv fp32 4x16x128",
    "mxfp6 5 37 300 fp16 float normal False | flat fp16 16x32x128 k2",
    "mxfp6 3 20 200 bf16 float normal True | flat bf16 8x32x128 swap",
    "mxfp6 5 37 300 fp32 int8-g32 one_sign False | flat int8 16x32x128",
    "mxfp6 1 20 140 fp32 float normal False | gemv fp32 1x32x128",
    "mxfp6-e3m2 5 33 200 fp16 int8-g96 normal True | flat fp16 16x32x128 k2",
    "mxfp6-e3m2 3 20 150 bf16 float normal False | tiled bf16 16x32x128",
    "mxfp6-e3m2 2 20 300 fp32 float normal False | flat fp32 16x32x128 swap",
    "mxfp8 5 37 300 fp16 float normal True | flat fp16 8x32x128 k2 swap",
    "mxfp8 3 20 200 bf16 float one_sign False | flat bf16 16x32x128",
    "mxfp8-e5m2 5 37 300 fp16 float normal False | flat fp16 16x32x128",
    "mxfp8-e5m2 3 20 200 bf16 float normal True | flat bf16 8x32x128 swap",
    "mxfp8-e5m2 4 17 130 fp16 int8-g32 normal False | gemv fp32 4x16x128 k2",
    "e4m3 5 37 300 bf16 int8 normal True | flat fp16 16x32x128 k2",
    "e4m3-g128 17 20 260 fp16 float normal False | tiled fp16 16x32x256",
    "e4m3-g48 3 20 200 fp32 float one_sign False | flat fp32 16x32x128",
    "e5m2-g64 5 20 200 fp32 int8-g64 normal False | flat fp16 8x32x128 swap",
    "e5m2 3 20 260 bf16 float normal True | decode_matmul bf16 16x64x128",
    "lut1-g16 3 20 140 fp16 float normal False | flat fp16 16x32x128",
    "lut2 5 37 300 bf16 float normal True | flat bf16 16x32x128 k2",
    "lut3-g64-dq 3 20 200 fp16 float normal False | flat fp16 8x32x128 k2 swap",
    "lut3-g128 5 37 300 fp32 float one_sign False | flat fp32 16x32x128",
    "lut4-g128-s32 5 37 300 bf16 int8-g128 normal True | flat fp16 16x32x128 k2",
    "lut5-g32 3 20 200 bf16 float normal False | flat bf16 8x32x128 swap",
    "lut6-s32 5 20 200 fp16 int8 normal False | flat fp16 16x32x128",
    "lut7-g48-dq 3 17 150 fp16 float normal False | flat fp16 16x32x128 k2",
    "lut8-g64 2 20 200 bf16 float normal True | gemv fp32 2x16x128",
    "lut8 5 37 300 fp16 float one_sign False | flat fp16 16x32x128",
    "ternary 5 37 300 bf16 int8 normal True | flat int8 16x32x256 k2",
    "ternary-g64 3 20 200 fp16 int8-g64 one_sign False | flat int8 8x32x128 swap",
    "ternary-s32 17 33 200 fp16 float normal False | tiled fp16 16x32x128 swap",
    "ternary-g48 3 20 200 bf16 float normal True | flat bf16 16x32x128",
    "ternary-g32 2 16 100 fp32 float normal False | gemv fp32 2x16x128",
    "ternary-1.6 5 37 700 bf16 int8 normal True | flat int8 16x32x320 k2",
    "ternary-1.6 3 20 500 fp16 int8 one_sign False | flat int8 8x32x160 k3 swap",
    "ternary-1.6-g160 3 20 500 fp16 int8-g64 normal True | flat int8 16x32x160 k2",
    "ternary-1.6-s32 17 33 330 fp16 float normal False | tiled fp16 16x32x160 swap",
    "ternary-1.6-g48 3 20 200 bf16 float normal True | flat bf16 16x32x160",
    "ternary-1.6-g80 3 20 330 fp16 int8 normal False | flat fp16 16x32x160",
    "ternary-1.6-g128 5 37 300 fp32 float one_sign True | flat fp32 16x32x160",
    "ternary-1.6-g32 2 16 400 fp32 float normal False | gemv fp32 2x16x160 k2",
    "ternary-1.6 1 37 500 bf16 int8 normal True | gemv fp32 1x32x160 k2",
    "ternary-1.6-g64 5 20 200 fp16 float normal True | decode_matmul fp16 16x64x160",
    "int4-g128-s8 5 37 300 fp16 float normal True | flat fp16 16x32x128 k2",
    "int4-g64-asym-s8 3 20 200 bf16 int8-g64 normal False | flat int8 8x32x128 swap",
    "int3-g16-s8 3 20 200 fp32 int8-g16 one_sign False | flat fp16 16x32x128",
    "int2-g32-asym-s8 4 20 140 fp32 float normal True | gemv fp32 4x16x128 k2",
    "int4-s8 3 20 200 fp16 float normal False | decode_matmul fp16 16x64x128",
    "int4-g128-s8 5 37 300 fp16 int8 normal True | flat int8 16x32x128 k2",
    "int4-g64-asym-s8 17 33 300 bf16 int8 one_sign False | tiled int8 16x32x256 swap",
    "int3-g96-asym-s8 3 20 300 fp32 int8 normal False | flat int8 8x32x128 k2 swap",
    "int2-g32-s8 3 20 200 fp32 int6 normal True | flat int8 16x32x128",
    "int3-s8 5 37 300 fp32 int8-g512 normal False | flat int8 16x32x128",
    "int4-g48-s8 3 20 200 fp16 int8 normal False | flat fp16 16x32x128",
    "int4-g128-s8 3 20 300 bf16 int8 normal False | gemv fp32 4x16x128",
    "int4-g128-fp8 5 37 300 fp16 fp8 normal True | flat e4m3 16x32x128 k2",
    "int4-g48-fp8 3 20 200 bf16 fp8 one_sign False | flat e4m3 8x32x128 swap",
    "int3-g16-fp8 17 33 300 fp32 fp8-g64 normal False | tiled e4m3 16x32x256 swap",
    "int2-fp8 3 20 200 fp32 fp8-g32 normal True | flat e4m3 16x32x128 k2",
    "int4-g128-fp8 5 37 300 fp16 fp8 normal True | flat fp16 16x32x128 k2",
    "int4-g64-fp8 3 20 200 bf16 fp8-e5m2 normal False | flat fp16 8x32x128 swap",
    "int3-g48-fp8 5 37 300 fp16 float normal True | flat fp16 16x32x128",
    "int4-g32-fp8 3 20 200 bf16 float one_sign False | flat bf16 8x32x128 k2 swap",
    "int4-g64-fp8 3 20 200 fp32 float normal False | flat fp32 16x32x128",
    "int2-g16-fp8 2 20 140 fp16 int8 normal True | flat fp16 16x32x128",
    "int4-g64-fp8 4 16 140 bf16 fp8 normal False | gemv fp32 4x16x128 k2",
    "int4-g128-fp8 3 20 200 fp16 float normal True | decode_matmul fp16 16x64x128",
    "e4m3 5 37 300 bf16 fp8 normal True | flat e4m3 16x32x128 k2",
    "e4m3-g64 17 33 300 fp16 fp8-g128 normal False | tiled e4m3 16x32x256 swap",
    "mxfp8 3 20 200 fp32 fp8 one_sign False | flat e4m3 8x32x128 swap",
    "e5m2-g64 3 20 200 fp32 fp8-e5m2 normal True | flat fp16 16x32x128",
    "nf4-g64 3 20 200 fp16 fp8 normal False | flat fp16 16x32x128 k2",
]


def run(data: LinearData, activations: str, plan: Plan) -> torch.Tensor:
    fmt = activation_format(activations)
    return launcher.linear(data.x, data.weight, data.bias, fmt, plan)


def ratio(data: LinearData, activations: str, plan: Plan) -> float:
    y = run(data, activations, plan)
    assert y.dtype == data.x.dtype
    return oracle.test_ratio(y, data.y64, bound_of(data, activations, plan))


@pytest.mark.parametrize("text", CATALOGUE)
def test_parity(text: str) -> None:
    case, chosen = (part.strip() for part in text.split("|"))
    parsed = LinearCase.parse(case)
    data, plan = make(parsed), plan_of(chosen)
    y = run(data, parsed.activations, plan)
    assert y.dtype == parsed.torch_dtype
    bound = bound_of(data, parsed.activations, plan)
    assert oracle.test_ratio(y, data.y64, bound) <= 1, oracle.worst(y, data.y64, bound)


TABLES = [
    "nf4-g64", "fp4-g32-dq", "mxfp4", "nvfp4", "mxfp6", "mxfp6-e3m2", "mxfp8", "mxfp8-e5m2", "e4m3",
    "e5m2-g48", "lut1", "lut2-g16", "lut3-g64-dq", "lut4", "lut5-g32", "lut6", "lut7-g64", "lut8",
    "ternary-g32", "ternary-1.6-g48", "int4-g64-s8", "int2-asym-s8",
    "int4-g16-fp8", "int3-g48-fp8", "int2-fp8",
]  # fmt: skip


@pytest.mark.parametrize("text", TABLES)
def test_dequantize_is_the_definition_bit_for_bit(text: str) -> None:
    """Every code, those that stand for no number too, every scale byte that a weight may hold."""
    weight = make_weight(text, 21, 200, np.random.default_rng(1))
    codec = weight.codec
    if codec.values != "ternary":
        codes = torch.arange(21 * 200).reshape(21, 200) % (1 << codec.bits)
        weight.codes = packing.pack(codes.to(torch.uint8), codec)
    if codec.scale_dtype == "e8m0":  # powers of which no product leaves the range of fp32
        weight.scales = torch.arange(weight.scales.numel()).reshape(weight.scales.shape) % 200
        weight.scales = weight.scales.to(torch.uint8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = launcher.dequantize(weight, dtype)
        assert torch.equal(got.nan_to_num(-7), weight.dequantize(dtype).nan_to_num(-7))
        assert torch.equal(got.isnan(), weight.dequantize(dtype).isnan())
    decoded = weight.dequantize()
    assert bool(decoded.isnan().any()) == (codec.values in ("e4m3", "e5m2"))
    assert bool(decoded.isinf().any()) == (codec.values == "e5m2")


@pytest.mark.parametrize("dot", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("text", ["nf4", "fp4", "mxfp6", "mxfp6-e3m2", "mxfp8", "e5m2", "lut3"])
def test_identity_gives_the_decoded_weight(text: str, dot: str) -> None:
    """Entries are exact in every dot type, but those of a table, which are rounded once."""
    weight = make_weight(text, 18, 144, np.random.default_rng(2), "integers")
    dtype = cases.DTYPES[dot]
    x = torch.eye(144, dtype=dtype)
    y = launcher.linear(x, weight, None, ActivationFormat(), plan_of(f"tiled {dot} 32x32x128"))
    entries = weight.entries().to(dtype).float()
    scales = weight.effective_scales()[:, :18].repeat_interleave(
        weight.codec.group_size(144), dim=0
    )[:144]
    expected = entries[weight.unpack_codes().long()] * scales.T
    assert torch.equal(y, expected.to(dtype).T)
    if text not in ("nf4", "lut3"):
        assert torch.equal(entries.isfinite(), weight.entries().isfinite())
        finite = entries.isfinite()
        assert torch.equal(entries[finite], weight.entries()[finite])


@pytest.mark.parametrize(
    "text", ["ternary-s32", "ternary-1.6-s32", "fp4-s32", "fp4-g64", "mxfp4", "mxfp6"]
)
@pytest.mark.parametrize("chosen", ["flat int8 16x32x128", "flat int8 8x32x128 swap"])
def test_int8_sums_are_exact_at_every_split(text: str, chosen: str) -> None:
    """Activations that are their own codes, scales that are powers of two: fp32 holds all sums."""
    if "1.6" in text:
        chosen = chosen.replace("128", "160")
    rng = np.random.default_rng(3)
    weight = make_weight(text, 20, 400, rng, "integers")
    x = torch.from_numpy(rng.integers(-127, 128, (5, 400)).astype(np.float32))
    x[:, 0] = 127
    data = answer(x, weight, None, "int8")
    for pieces in (1, 2, 4):
        y = run(data, "int8", plan_of(f"{chosen} k{pieces}"))
        assert torch.equal(y.double(), torch.from_numpy(data.y64)), pieces


def test_scales_of_eight_bits_are_read_as_they_are_defined() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def decode(bytes_, numbers):
        lane = tl.arange(0, 256)
        tl.store(numbers + lane, e4m3_to_fp32(tl.load(bytes_ + lane)))

    every = torch.arange(256, dtype=torch.uint8)
    numbers = torch.empty(256)
    decode[(1,)](every, numbers)
    expected = every.view(torch.float8_e4m3fn).float()
    assert torch.equal(numbers.nan_to_num(-7), expected.nan_to_num(-7))
    assert torch.equal(numbers.isnan(), expected.isnan())
    # The least power of two is a subnormal number; the largest that is finite is 254.
    for byte in (0, 1, 127, 254):
        weight = make_weight("mxfp4", 16, 32, np.random.default_rng(4))
        weight.scales = torch.full_like(weight.scales, byte)
        weight.codes = packing.pack(torch.full((16, 32), 2, dtype=torch.uint8), weight.codec)
        assert launcher.dequantize(weight, torch.float32)[3, 3].item() == 2.0 ** (byte - 127)


def test_a_number_that_is_none_stays_in_its_row_of_the_weight() -> None:
    for text, code, dot in (
        ("e4m3", 127, "fp16"), ("e4m3", 255, "bf16"), ("e4m3-g64", 127, "fp32"),
        ("e5m2", 125, "fp16"), ("e5m2", 127, "bf16"), ("e5m2-g64", 254, "fp32"),
        ("mxfp8-e5m2", 124, "bf16"),
    ):  # fmt: skip
        weight = make_weight(text, 20, 150, np.random.default_rng(5))
        x = torch.randn(3, 150).abs().to(cases.DTYPES[dot])
        plan = plan_of(f"flat {dot} 16x32x128 k2")
        clean = launcher.linear(x, weight, None, ActivationFormat(), plan)
        codes = weight.unpack_codes()
        codes[7, 11] = code
        weight.codes = packing.pack(codes, weight.codec)
        y = launcher.linear(x, weight, None, ActivationFormat(), plan)
        number = weight.entries()[code]
        assert bool(y[:, 7].isnan().all() if number.isnan() else y[:, 7].isinf().all()), text
        keep = [n for n in range(20) if n != 7]
        assert torch.equal(y[:, keep], clean[:, keep])


@pytest.mark.parametrize("factor", [2.0**-100, 1e-6, 3e4, 2.0**100])
@pytest.mark.parametrize("text", ["lut4-g32-s32", "lut5-s32"])
def test_learned_tables_of_any_size(text: str, factor: float) -> None:
    """A fp16 dot holds numbers up to 65504: the table is brought there, and the scales follow."""
    weight = make_weight(text, 20, 150, np.random.default_rng(6))
    assert weight.table is not None
    weight.table = weight.table * factor
    least = int(weight.table.abs().argmin())  # a subnormal of fp16, even as it is stored
    weight.table[least] = weight.table.abs().max() * 2.0**-30
    weight.scales = weight.scales / factor
    data = answer(torch.randn(4, 150).half(), weight, None, "float")
    assert ratio(data, "float", plan_of("flat fp16 16x32x128")) <= 1
    assert ratio(data, "float", plan_of("gemv fp32 4x32x128")) <= 1


def test_tables_are_kept_with_the_weight_and_made_anew_when_it_changes() -> None:
    weight = make_weight("lut4", 20, 150, np.random.default_rng(7))
    first = table_for(weight, "fp16")
    assert first is not None
    assert table_for(weight, "fp16") is first
    assert weight.view_nbytes == 256 * 4 + 4
    assert weight.table is not None
    weight.table.mul_(2)
    assert table_for(weight, "fp16") is not first
    assert table_for(make_weight("mxfp4", 16, 32, np.random.default_rng(7)), "fp16") is None


CHANGES = [
    ("nf4-g64", "fp16 float", "flat fp16 16x32x128"),
    ("fp4-g32-dq", "fp32 float", "flat fp32 16x32x128"),
    ("mxfp4", "fp32 int8", "flat int8 16x32x128"),
    ("nvfp4", "bf16 float", "flat bf16 8x32x128 swap"),
    ("mxfp6", "fp32 int8", "flat int8 8x32x128 swap"),
    ("mxfp8", "fp16 float", "flat fp16 16x32x128"),
    ("lut3-g64-dq", "fp16 float", "flat fp16 16x32x128"),
    ("lut5", "fp32 float", "gemv fp32 4x32x128"),
    ("ternary-g32", "fp32 int8", "flat int8 16x32x128"),
    ("ternary-1.6-g32", "fp32 int8", "flat int8 16x32x160"),
    ("ternary-1.6", "fp16 float", "flat fp16 16x32x160"),
    ("int4-g64-s8", "fp32 float", "gemv fp32 4x32x128"),
    ("int4-g32-asym-s8", "fp32 int8", "flat int8 16x32x128"),
    ("int4-g32-fp8", "fp32 fp8", "flat e4m3 16x32x128"),
    ("int4-g32-fp8", "fp32 float", "flat fp32 16x32x128"),
    ("e4m3", "fp32 fp8", "flat e4m3 8x32x128 swap"),
]


@pytest.mark.parametrize(("text", "how", "chosen"), CHANGES)
def test_one_wrong_number_is_seen(text: str, how: str, chosen: str) -> None:
    """The bound is tight enough that any single stored number shows when it is another."""
    dtype, activations = how.split()
    weight = make_weight(text, 16, 64, np.random.default_rng(8), "one_sign")
    plan, seen = plan_of(chosen), set()
    x = torch.ones(3, 64, dtype=cases.DTYPES[dtype])
    data = answer(x, weight, None, activations)
    assert ratio(data, activations, plan) <= 1
    for name, tensor in weight.tensors.items():
        changed = tensor.clone()
        flat = changed.reshape(-1)
        if name == "codes":
            codes = weight.unpack_codes()
            numbers = torch.arange(weight.codec.levels).float()
            numbers = weight.entries() if weight.codec.is_table else numbers
            codes[5, 9] = (numbers - numbers[int(codes[5, 9])]).abs().nan_to_num(0).argmax()
            changed = packing.pack(codes, weight.codec)
        elif name == "table":
            # The entry of a code that is there, by a quarter of the largest.
            flat[int(weight.unpack_codes()[5, 9])] += float(flat.abs().max()) / 4
        elif tensor.dtype == torch.uint8:
            flat[5] = int(flat[5]) - 1 if flat[5] > 1 else 2
        else:
            flat[min(5, len(flat) - 1)] *= 1.25
        tensors = {**weight.tensors, name: changed}
        wrong = QTensor(weight.codec, weight.shape, **tensors)
        other = LinearData(x, wrong, None, data.y64, data.gauge)
        y = run(other, activations, plan)
        assert oracle.test_ratio(y, data.y64, bound_of(data, activations, plan)) > 1, name
        seen.add(name)
    assert {"codes", "scales"} <= seen


@pytest.mark.parametrize(
    "text",
    [
        "nf4-g64-dq 5 37 300 fp16 float normal True | flat fp16 16x32x128 k2",
        "lut5-g48 3 20 200 bf16 float normal False | flat bf16 8x32x128 swap",
        "mxfp4 5 37 300 fp16 int8-g32 normal True | flat int8 16x32x128 k2",
        "nvfp4 3 20 200 fp16 float normal True | flat fp16 8x32x128 swap",
        "mxfp6-e3m2 3 37 300 fp32 float normal False | gemv fp32 4x32x128 k2",
        "e4m3 5 33 200 bf16 int8 normal True | flat fp16 16x32x256",
        "lut3-g64-dq 5 37 300 fp16 float normal True | decode_matmul fp16 16x32x128",
        "int4-g96-asym-s8 5 37 300 fp16 int8 normal True | flat int8 16x32x128 k2",
        "int3-g48-fp8 5 37 300 fp16 fp8 normal True | flat e4m3 8x32x128 k2 swap",
        "int2-g32-fp8 3 20 200 bf16 fp8-e5m2 normal False | flat fp16 16x32x128",
        "ternary-1.6 5 37 500 bf16 int8 normal True | flat int8 16x32x320 k2",
        "ternary-1.6-g48 3 20 200 fp16 float normal False | flat fp16 8x32x160 swap",
        "ternary-1.6-g160 4 37 330 fp32 float normal True | gemv fp32 4x32x160 k2",
        "ternary-1.6 5 37 300 fp16 float normal False | decode_matmul fp16 16x32x160",
    ],
)
def test_sanitizer_is_clean_and_order_does_not_matter(text: str) -> None:
    case, chosen = (part.strip() for part in text.split("|"))
    parsed = LinearCase.parse(case)
    data, results = make(parsed), []
    for order in (None, "reverse"):
        with sanitize(order=order) as report:  # type: ignore[arg-type]
            results.append(run(data, parsed.activations, plan_of(chosen)))
        report.assert_clean()
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize(
    "text", ["nf4-g64", "mxfp4", "nvfp4", "e4m3", "ternary", "ternary-1.6", "lut3-g64-dq"]
)
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_the_verb_takes_them(text: str, activations: str) -> None:
    torch.manual_seed(1)
    packed = lath.quantize(torch.randn(20, 130), text)
    data = answer(torch.randn(3, 130), packed, None, activations)
    y = lath.linear(data.x, packed, activations=activations, backend="triton")
    plan = lath.plan(3, 20, 130, packed.codec, torch.float32, "sm_80", activations)
    assert oracle.test_ratio(y, data.y64, bound_of(data, activations, plan)) <= 1


@pytest.mark.parametrize("text", ["nf4", "lut4-g64", "mxfp6-e3m2", "e4m3", "e5m2"])
def test_entries_that_are_no_int8_are_refused_an_int8_dot(text: str) -> None:
    weight = make_weight(text, 16, 64, np.random.default_rng(9))
    assert text.split("-g")[0] not in value_tables.UNITS
    with pytest.raises(ValueError, match=r"plan dot .* 'fp16', as int8 times .* got 'int8'"):
        launcher.linear(
            torch.randn(3, 64), weight, None, ActivationFormat("int8"),
            plan_of("flat int8 16x32x128"),
        )  # fmt: skip
