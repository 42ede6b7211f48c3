"""MatQuant: one store of 8 bits and its views of fewer, by the definition and on every backend."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

import cases
import lath
import oracle
from cases import LinearCase, plan_of
from lath.formats import packing
from lath.formats.activations import ActivationFormat, activation_format
from lath.formats.codec import Codec
from lath.formats.qtensor import QTensor
from lath.kernels.linear import triton as launcher
from lath.kernels.linear.cpu_views import cpu_view
from lath.reference import codecs, nested

EVERY_CODE = torch.arange(256, dtype=torch.uint8).repeat(16, 1)


def every_code(text: str) -> QTensor:
    """Sixteen rows of all 256 codes, a scale for each 64 of them."""
    codec = Codec.parse(text)
    scales = 2.0 ** torch.arange(-4, 0)[:, None].expand(-1, 16)
    zeros = -scales * 100 if codec.zero == "float" else None
    dtype = torch.float32 if codec.scale_dtype == "fp32" else torch.float16
    sides = [None if side is None else side.to(dtype).contiguous() for side in (scales, zeros)]
    return QTensor(codec, (16, 256), packing.pack(EVERY_CODE, codec), *sides)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", range(1, 8))
def test_slices_of_all_codes(bits: int) -> None:
    """clamp(round(q / 2**(8 - r)), 0, 2**r - 1), half up, in exact rationals."""
    codes = np.arange(256, dtype=np.uint8)
    got = nested.slice_codes(codes, 8, bits)
    step, top = 2 ** (8 - bits), 2**bits - 1
    unclamped = [int(Fraction(q, step) + Fraction(1, 2)) for q in range(256)]
    assert got.tolist() == [min(n, top) for n in unclamped]
    # The clamp is needed from here on: at r = 4 from q = 248, which would become 16.
    assert [q for q in range(256) if unclamped[q] > top] == list(range(256 - step // 2, 256))
    assert np.array_equal(nested.upper_bits(codes, 8, bits), codes >> (8 - bits))


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("text", ["int8-g64", "int8-g64-fzero", "int8-g64-fzero-s32"])
def test_ordinary_codes_are_rounded(text: str, bits: int) -> None:
    weight = every_code(text)
    view = weight.nested(bits)
    assert str(view.codec) == text.replace("int8", f"int{bits}")
    sliced = nested.slice_codes(EVERY_CODE.numpy(), 8, bits)
    assert np.array_equal(view.unpack_codes().numpy(), sliced)
    assert view.codes.nbytes * 8 == bits * weight.codes.nbytes
    # What it stands for: the slice in the place of the code.
    placed = torch.from_numpy(sliced) * 2 ** (8 - bits)
    scales = weight.scales[:, :1].float().repeat_interleave(64, dim=0).T
    offset = -128.0 * scales
    if weight.zeros is not None:
        offset = weight.zeros[:, :1].float().repeat_interleave(64, dim=0).T
    assert torch.equal(view.dequantize(), placed * scales + offset)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_view_is_the_end_of_the_store(bits: int) -> None:
    """No byte is copied, and a view's codes are the share of the bytes that its bits are."""
    weight = every_code("int8-g64-nested")
    view = weight.nested(bits)
    assert str(view.codec) == ("int4-g64-nested" if bits == 4 else "int2-g64-nested")
    assert view.codes.untyped_storage().data_ptr() == weight.codes.untyped_storage().data_ptr()
    assert view.codes.nbytes * 8 == bits * weight.codes.nbytes
    upper = nested.upper_bits(EVERY_CODE.numpy(), 8, bits)
    assert np.array_equal(view.unpack_codes().numpy(), upper)
    # The middle of the codes that it stands for: an error of half its step at most, both ways.
    full, coarse = weight.dequantize(), view.dequantize()
    step = view.scales[:, :1].float().repeat_interleave(64, dim=0).T
    difference = (coarse - full) / step
    assert float(difference.max()) == -float(difference.min()) == 0.5 - 2.0 ** (bits - 9)
    for whole in (weight, view):
        assert torch.equal(QTensor.from_state_dict(whole.state_dict()).codes, whole.codes)
    again = weight.nested(4).nested(2)
    assert torch.equal(again.dequantize(), weight.nested(2).dequantize())


@pytest.mark.parametrize("text", ["int8-g32-nested-s32", "int8-nested-s32"])
def test_a_view_is_what_rounding_to_its_bits_gives(text: str) -> None:
    """No second rounding: each code of r bits is the nearest one to the weight itself."""
    dense = torch.randn(20, 150) * 10.0 ** torch.randint(-3, 2, (20, 1))
    dense[2] = 0
    weight = lath.quantize(dense, text)
    definition = codecs.quantize(dense.numpy(), weight.codec)
    assert np.array_equal(weight.unpack_codes().numpy(), definition.codes)
    for bits in (8, 4, 2):
        view = weight.nested(bits)
        size = view.codec.group_size(150)
        scale = view.scales[:, :20].T.repeat_interleave(size, dim=1)[:, :150]
        levels = 2**bits
        safe = torch.where(scale == 0, 1, scale)  # of the row of zeros
        direct = (torch.floor(dense / safe) + levels // 2).clamp(0, levels - 1)
        assert torch.equal(view.unpack_codes(), direct.to(torch.uint8))
        error = (view.dequantize() - dense).abs()
        # Three fp32 roundings of a number of up to levels / 2 steps.
        assert bool((error <= scale * (0.5 + 3 * levels / 2 * 2.0**-24)).all())


CASES = [
    LinearCase("int8-g64-nested", 1, 40, 300, "bf16", "int8-g64", bias=True),
    LinearCase("int8-nested", 9, 21, 256, "fp16", "int8", "one_sign"),
    LinearCase("int8-g48-nested", 3, 20, 200, "fp32", "float"),
    LinearCase("int4-g64-nested", 1, 40, 300, "fp16", "int8-g64"),
    LinearCase("int4-g32-nested-s32", 9, 21, 200, "bf16", "float", bias=True),
    LinearCase("int4-nested", 2, 33, 130, "fp32", "fp8"),
    LinearCase("int2-g128-nested", 5, 40, 300, "fp32", "int8", "one_sign"),
    LinearCase("int2-g16-nested", 1, 17, 129, "fp16", "float"),
]


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case: LinearCase, backend: str) -> None:
    data = cases.make(case)
    y = lath.linear(data.x, data.weight, data.bias, activations=case.activations, backend=backend)
    bound = oracle.linear_bound(data.y64, data.gauge, case.k + 1, case.torch_dtype)
    assert oracle.test_ratio(y, data.y64, bound) <= 1, (
        f"LinearCase.parse({str(case)!r}) {backend}: {oracle.worst(y, data.y64, bound)}"
    )


PLANS = [
    "int8-g64-nested 5 37 300 fp16 float normal True | flat fp16 16x32x128 k2",
    "int8-nested 3 20 200 bf16 float normal False | flat bf16 8x32x128 swap",
    "int8-g128-nested 17 33 300 fp32 int8 normal False | tiled int8 16x32x256 swap",
    "int8-g32-nested 2 20 140 fp32 float normal False | gemv fp32 2x32x128",
    "int4-g64-nested 5 37 300 fp16 int8-g64 one_sign True | flat int8 8x32x128 k2 swap",
    "int4-nested 3 20 200 bf16 float normal False | flat bf16 16x32x128",
    "int4-g48-nested 3 20 200 fp16 float normal False | decode_matmul fp16 16x64x128",
    "int2-g64-nested 3 20 200 fp16 float normal False | flat fp16 8x32x128 k2 swap",
]


@pytest.mark.parametrize("text", PLANS)
def test_parity_of_gpu_plans(text: str) -> None:
    case, chosen = (part.strip() for part in text.split("|"))
    parsed = LinearCase.parse(case)
    data = cases.make(parsed)
    fmt, plan = activation_format(parsed.activations), plan_of(chosen)
    y = launcher.linear(data.x, data.weight, data.bias, fmt, plan)
    rounds = int(plan.dataflow == "decode_matmul")
    bound = oracle.linear_bound(data.y64, data.gauge, parsed.k, parsed.torch_dtype, rounds)
    assert oracle.test_ratio(y, data.y64, bound) <= 1, oracle.worst(y, data.y64, bound)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_views_of_one_weight_run_and_read_their_share(backend: str) -> None:
    weight = lath.quantize(torch.randn(64, 512), "int8-g64-nested")
    x, bytes_read = torch.randn(3, 512), []
    results = {}
    for bits in (8, 4, 2):
        view = weight.nested(bits)
        y = lath.linear(x, view, activations="int8-g64", backend=backend)
        y64, gauge = cases.definition(x, view, None, "int8-g64")
        bound = oracle.linear_bound(y64, gauge, 512, torch.float32)
        assert oracle.test_ratio(y, y64, bound) <= 1, bits
        results[bits] = y, bound
        plan = lath.plan(3, 64, 512, view.codec, torch.float32, "sm_90", "int8-g64")
        bytes_read.append(plan.bytes_moved)
        on_cpu = cpu_view(view, ActivationFormat("int8", 64))
        assert on_cpu.nbytes == 64 * 512 * bits // 8 + view.scales.nbytes
    codes = 64 * 512
    assert bytes_read[0] - bytes_read[1] == codes // 2
    assert bytes_read[1] - bytes_read[2] == codes // 4
    # Negative control: the numbers of another view are far outside the bound.
    y64 = results[4][0].double().numpy()
    assert oracle.test_ratio(results[8][0], y64, results[8][1]) > 10


def test_what_has_no_views_is_refused() -> None:
    for text in ("int8-asym", "nf4", "e4m3", "int4-g64-s8"):
        weight = lath.quantize(torch.randn(16, 64), text)
        with pytest.raises(ValueError, match=r"nested needs a codec of whole numbers"):
            weight.nested(2)
    weight = lath.quantize(torch.randn(16, 64), "int8-nested")
    for bits in (0, 9, 2.0):
        with pytest.raises(ValueError, match=r"bits must be an integer from 1 to 8"):
            weight.nested(bits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs 2, 4 or 8 bits"):
        weight.nested(6)
    large = lath.quantize(torch.full((16, 64), 3e5), "int8-nested")
    with pytest.raises(ValueError, match=r"overflow; use '-s32'"):
        large.nested(2)
