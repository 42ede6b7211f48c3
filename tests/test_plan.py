"""The planner on devices that are not here: legal, explained, pure, and sensible as M grows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lath
from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.device import KNOWN_DEVICES, DeviceDescription
from lath.formats.values import UNITS
from lath.kernels.linear.plan import shared_bytes
from lath.kernels.linear.plan_facts import weight_bytes

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
GPUS = [name for name, device in KNOWN_DEVICES.items() if device.kind != "cpu"]
WHOLE_NUMBERS = st.builds(
    Codec,
    bits=st.integers(1, 8),
    group=st.sampled_from([None, 16, 32, 48, 64, 96, 128, 256]),
    zero=st.sampled_from(["none", "integer", "float"]),
    scale_dtype=st.sampled_from(["fp16", "fp32"]),
)
TABLES = [
    "ternary", "ternary-g64", "nf4-g64", "nf4-g16-dq", "fp4-g48", "fp4-s32", "lut1", "lut3-g64-dq",
    "lut8-g128", "e4m3", "e5m2-g48", "mxfp4", "mxfp6", "mxfp6-e3m2", "mxfp8", "mxfp8-e5m2", "nvfp4",
    "int4-g128-s8", "int2-g16-asym-s8",
]  # fmt: skip
CODECS = st.one_of(WHOLE_NUMBERS, st.sampled_from(TABLES).map(Codec.parse))
FORMATS = st.sampled_from(
    [ActivationFormat(), ActivationFormat("int8")]
    + [ActivationFormat("int8", group) for group in (16, 32, 48, 64, 128)]
)
SIZES = st.one_of(st.integers(0, 40), st.integers(1, 20000))
DOT_DEPTH = {"int8": 32, "fp16": 16, "bf16": 16, "fp32": 16}
ORDER = ["gemv", "flat", "tiled", "decode_matmul"]


def invented(base: str, units: int) -> DeviceDescription:
    return dataclasses.replace(KNOWN_DEVICES[base], compute_units=units)


@settings(deadline=None, max_examples=300)
@given(SIZES, SIZES, SIZES, CODECS, DTYPES, FORMATS, st.sampled_from(GPUS), st.integers(1, 400))
def test_plans_for_gpus_are_legal(m, n, k, codec, dtype, activations, base, units) -> None:  # type: ignore[no-untyped-def]
    device = invented(base, units)
    plan = lath.plan(m, n, k, codec, dtype, device, activations)
    assert plan == lath.plan(m, n, k, codec, dtype, device, activations)
    assert plan.backend == "triton"
    assert plan.dataflow in ORDER
    assert plan.reason
    assert plan.operations == 2 * m * n * k
    assert plan.bytes_moved >= weight_bytes(n, k, codec)
    if plan.dataflow == "decode_matmul":
        return
    for value in (plan.block_m, plan.block_n, plan.warps):
        assert value > 0
        assert value & (value - 1) == 0, "tiles are powers of two"
    assert plan.stages >= 1
    assert 1 <= plan.split_k <= max(1, -(-k // 128)), "no piece of K is empty"
    assert plan.warps * device.lanes <= 1024
    if plan.dataflow == "gemv":
        assert m <= 4
        assert plan.dot == "fp32"
        return
    assert plan.dot in DOT_DEPTH
    assert plan.block_m >= (8 if plan.swap and device.kind == "cuda" else 16)
    assert plan.block_n >= 16
    if activations.kind == "int8":
        whole = not codec.is_table or codec.values in UNITS
        assert plan.dot in (("int8", "fp16") if whole else ("fp16",))
    else:
        assert (
            plan.dot
            == {2: "bf16" if dtype is torch.bfloat16 else "fp16", 4: "fp32"}[dtype.itemsize]
        )
    assert shared_bytes(plan, plan.stages, codec, device) <= device.shared_memory


@pytest.mark.parametrize("base", GPUS)
def test_dataflows_follow_one_another_as_m_grows(base: str) -> None:
    for n, k in ((4096, 4096), (192, 576), (14336, 4096)):
        flows = [lath.plan(m, n, k, "int4-g128", device=base).dataflow for m in range(1, 2049, 7)]
        ranks = [ORDER.index(flow) for flow in flows]
        assert ranks == sorted(ranks), flows
        assert len(set(flows)) >= 2


@pytest.mark.parametrize("base", GPUS)
def test_few_tiles_split_k_to_fill_the_device(base: str) -> None:
    plan = lath.plan(4, 512, 8192, "int4-g128", device=base)
    tiles = -(-512 // plan.block_n)
    assert plan.split_k > 1
    assert plan.split_k * tiles <= 2 * KNOWN_DEVICES[base].compute_units + tiles


@settings(deadline=None)
@given(
    SIZES, SIZES, SIZES, WHOLE_NUMBERS, DTYPES, FORMATS, st.sampled_from(["avx512_vnni", "avx2"])
)
def test_plans_for_cpus(m, n, k, codec, dtype, activations, base) -> None:  # type: ignore[no-untyped-def]
    plan = lath.plan(m, n, k, codec, dtype, base, activations)
    assert plan.backend == "cpu"
    assert plan.dot == ("fp32" if activations.kind == "float" else "int8")
    assert base in plan.reason
    assert ("widened" in plan.reason) == (codec.bits in (1, 3, 5, 6, 7))


@pytest.mark.parametrize("text", ["int4-g128", "int3-g48-asym", "int8-fzero-s32", *TABLES])
def test_bytes_are_what_quantize_makes(text: str) -> None:
    """All but those of a learned table."""
    packed = lath.quantize(torch.randn(33, 300), text)
    table = 0 if packed.table is None else packed.table.nbytes
    assert weight_bytes(33, 300, packed.codec) == packed.nbytes - table


@pytest.mark.parametrize(
    ("text", "activations", "dot"),
    [
        ("ternary", "int8", "int8"), ("fp4-g64", "int8-g64", "int8"), ("mxfp4", "int8", "int8"),
        ("mxfp6", "int8-g32", "int8"), ("int4-g128-s8", "int8", "int8"), ("nvfp4", "int8", "fp16"),
        ("nf4-g64", "int8", "fp16"), ("lut4", "int8", "fp16"), ("mxfp6-e3m2", "int8", "fp16"),
        ("e4m3", "int8", "fp16"), ("mxfp8-e5m2", "int8-g32", "fp16"), ("nf4-g64", "float", "bf16"),
    ],
)  # fmt: skip
def test_only_whole_numbers_of_8_bits_meet_int8_activations_in_an_int8_dot(
    text: str, activations: str, dot: str
) -> None:
    plan = lath.plan(8, 4096, 4096, text, torch.bfloat16, "sm_90", activations)
    assert plan.dot == dot
    if activations == "int8" and text not in ("nvfp4", "ternary"):
        assert ("no int8 holds" in plan.reason) == (dot == "fp16")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 2, 3, "int4"), ValueError, "M must be 0 or more, got -1"),
        ((1, 2.5, 3, "int4"), TypeError, "N must be an int"),
        ((1, 2, 3, "int4", torch.float64), TypeError, "dtype must be"),
        ((1, 2, 3, "int4", torch.float16, "sm_10"), ValueError, "device must be"),
        ((1, 2, 3, "int4", torch.float16, "meta"), ValueError, "device must be"),
        ((1, 2, 3, "int4", torch.float16, "cpu", "int9"), ValueError, "activations must be"),
    ],
)
def test_malformed_calls_are_refused(arguments, error, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        lath.plan(*arguments)
