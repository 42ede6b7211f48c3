"""The Triton kernels of `linear`, compiled for GPUs that are not here.

Our own launchers run on CPU tensors under `fake_gpu`; what they would have launched is compiled and
read: registers suffice, it fits the device, and a dot became tensor instructions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from cases import DTYPES, plan_of
from lath.formats.activations import activation_format
from lath.formats.codec import codec as parse_codec
from lath.formats.device import known_device
from lath.formats.families import weight_class, weight_codec
from lath.formats.plan import Plan
from lath.kernels.linear import triton as launcher
from lath.kernels.linear.plan import plan_linear
from tools.fake_gpu import Specialisation, compile_recorded, fake_gpu
from tools.machine_code import Analysis, analyze, resources

ARCHITECTURES = [
    "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950",
]  # fmt: skip
ROWS = 1024
LOOPS = ("matmul_kernel", "gemv_kernel")
# Tensor instructions of a dot, where it is not one of 16-bit floats.
_FAMILIES = {"int8": ["IMMA", "IGMMA", "UTCI"], "e4m3": ["QMMA", "QGMMA", "UTCQ"]}
# ptxas stops at a register count that lets one more block run (80, 96, 128, ...) and then puts a
# few values that the loop hardly needs on the stack. In the full matrix more than this counts as a
# spill; what the cover and the catalogue launch has none at all.
MOST_STACK, MOST_RELOADS = 32, 2  # bytes per thread; accesses per trip of the hot loop

# Codec, dtype, activations, K, bias | plan, the same in words as in test_triton_linear.py, with
# warps. For each width: a float dot, an int8 dot, the loop without a dot and the decoder; over the
# widths every zero, span, orientation, split, dtype and tail.
COVER = {
    1: [
        "int1-g128 fp16 float 2048 False | flat fp16 16x64x128 k1 w4",
        "int1 bf16 int8 2048 True | flat int8 16x128x256 k4 w4",
        "int1-g64-asym fp32 float 2000 False | gemv fp32 1x64x128 k4 w4",
        "int1-g48 fp16 float 2048 False | decode_matmul fp16 16x64x128 k1 w4",
    ],
    2: [
        "int2 bf16 float 2048 True | flat bf16 16x64x128 k1 w4 swap",
        "int2-g64 fp16 int8-g64 2048 False | tiled int8 64x128x128 k1 w8 swap",
        "int2-g32 bf16 float 2048 True | gemv fp32 4x32x128 k1 w4",
        "int2-asym bf16 float 2048 False | decode_matmul bf16 16x64x128 k1 w4",
    ],
    3: [
        "int3-g64-asym fp16 float 2048 False | flat fp16 16x64x128 k2 w4",
        "int3-g128 fp16 int8 2048 False | flat int8 16x64x128 k1 w4",
        "int3 fp32 float 2048 False | gemv fp32 1x32x128 k1 w4",
        "int3-g16-fzero fp32 float 2000 False | decode_matmul fp32 16x64x128 k1 w4",
    ],
    4: [
        "int4-g128 fp16 float 2048 True | flat fp16 16x128x128 k1 w4 swap",
        "int4-g128 fp16 float 2000 False | tiled fp16 64x64x128 k1 w8",
        "int4-g32 bf16 float 2048 False | flat bf16 16x32x128 k2 w4",
        "int4-g64 bf16 int8-g64 2048 True | flat int8 16x128x128 k4 w4 swap",
        "int4-g64 fp32 float 2048 False | flat fp32 16x32x128 k1 w8",
        "int4-g48 fp16 int8 2048 False | flat fp16 16x64x128 k1 w4",
        "int4-g128 fp16 int8 2048 False | gemv fp32 1x64x128 k1 w4",
        "int4-g128 fp16 float 2048 False | decode_matmul fp16 16x64x128 k1 w4",
    ],
    5: [
        "int5-g96-fzero bf16 float 2048 False | flat bf16 16x64x128 k1 w4",
        "int5-asym fp32 int8 2048 False | flat int8 16x64x256 k1 w4 swap",
        "int5-g128-fzero fp16 float 2048 False | gemv fp32 1x64x128 k2 w4",
        "int5-s32 bf16 float 2048 False | decode_matmul bf16 16x64x128 k1 w4",
    ],
    6: [
        "int6-g256 fp16 float 2048 False | flat fp16 16x128x256 k1 w4 swap",
        "int6-g64-fzero bf16 int8-g128 2048 False | flat int8 16x64x128 k1 w4",
        "int6 fp32 float 2000 False | gemv fp32 2x64x128 k1 w4",
        "int6-g32-asym fp16 float 2048 False | decode_matmul fp16 16x64x128 k1 w4",
    ],
    7: [
        "int7 bf16 float 2048 False | flat bf16 16x64x128 k1 w4",
        "int7-g128 fp16 int8-g128 2048 False | flat int8 16x64x128 k1 w4",
        "int7-g16 fp32 float 2048 False | gemv fp32 1x64x128 k1 w4",
        "int7-g64 fp32 float 2048 False | decode_matmul fp32 16x64x128 k1 w4",
    ],
    8: [
        "int8 bf16 float 2048 True | flat bf16 16x64x128 k1 w4 swap",
        "int8-g128-asym fp16 float 2048 False | flat fp16 16x64x128 k1 w4",
        "int8-s32 bf16 int8 2048 False | tiled int8 64x64x128 k1 w4 swap",
        "int8-g64 fp32 float 2048 False | gemv fp32 2x64x128 k1 w4",
        "int8-asym bf16 float 2048 False | decode_matmul bf16 16x64x128 k1 w4",
    ],
}


def record(text: str, chosen: Plan, architecture: str) -> list[Specialisation]:
    """What the launcher would compile for a case under a plan."""
    codec, dtype, activations, columns, bias = text.split()
    parsed = weight_codec(codec)
    weight = weight_class(parsed).empty(parsed, (ROWS, int(columns)), device="cpu")
    for tensor in weight.tensors.values():
        tensor.zero_()
    tokens = max(chosen.block_m, 1)  # a plan to decode has no tile of tokens
    x = torch.zeros(tokens, int(columns), dtype=DTYPES[dtype])
    offsets = torch.zeros(ROWS, dtype=DTYPES[dtype]) if bias == "True" else None
    with fake_gpu(architecture) as recording:
        launcher.linear(x, weight, offsets, activation_format(activations), chosen)
    assert recording.launches
    return recording.specialisations()


def check_instructions(
    launches: list[Specialisation], chosen: Plan, figure: float
) -> tuple[Any, Analysis]:
    """Per weight in the one hot loop among some launches at most 8 % more than `figure`; returns
    that kernel, compiled, and its machine code."""
    (found,) = [one for one in launches if one.name in LOOPS]
    compiled = compile_recorded(found)
    measured = analyze(compiled)
    assert measured.looped
    per_weight = measured.non_tensor_per_weight(chosen.block_n * chosen.block_k)
    assert per_weight <= 1.08 * figure, str(measured)
    return compiled, measured


def chosen_plan(case: str, text: str, architecture: str) -> Plan:
    """A plan in words with as many stages as the planner gives the case on the architecture."""
    plan = plan_of(text)
    codec, dtype, activations, columns, _ = case.split()
    planned = plan_linear(
        max(plan.block_m, 1), ROWS, int(columns), parse_codec(codec),
        activation_format(activations), DTYPES[dtype], known_device(architecture),
    )  # fmt: skip
    few = architecture.startswith("gfx") or plan.dot == "fp32"
    stages = planned.stages if planned.dataflow in ("flat", "tiled") else 2 if few else 3
    return dataclasses.replace(plan, stages=min(stages, 2) if few else stages)


def check(found: Specialisation, dot: str, most_stack: int = 0) -> None:
    """It compiles, spills nothing (or little), fits, and a matmul's dots use the tensor unit."""
    kernel = compile_recorded(found)
    usage = resources(kernel)
    device = known_device(found.architecture)
    if usage.spill_bytes:
        reloads = analyze(kernel).hot.counts.get("local", 0)
        small = usage.spill_bytes <= most_stack and reloads <= MOST_RELOADS
        assert small, f"{found} spills {usage.spill_bytes} bytes, {reloads} accesses in its loop"
    assert usage.shared_memory <= device.shared_memory, str(found)
    assert usage.blocks_per_unit >= 1, f"{found}: {usage.limiter}"
    if found.name != "matmul_kernel":
        assert not usage.tensor_instructions, str(found)
        return
    if device.kind == "hip":
        letter = {"int8": "v_mfma_i32", "fp16": "v_mfma_f32", "bf16": "v_mfma_f32"}
        families = [letter.get(dot, "v_mfma_f32")]
    elif dot == "fp32":  # no architecture multiplies fp32 exactly in its tensor unit
        assert not usage.tensor_instructions, str(found)
        return
    else:
        families = _FAMILIES.get(dot, ["HMMA", "HGMMA", "UTCH"])
    assert any(usage.uses(family) for family in families), f"{found}: {usage.tensor_instructions}"


@pytest.mark.parametrize("bits", COVER)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cover_compiles(architecture: str, bits: int) -> None:
    for text in COVER[bits]:
        case, chosen = (part.strip() for part in text.split("|"))
        picked = chosen_plan(case, chosen, architecture)
        for found in record(case, picked, architecture):
            check(found, picked.dot)


def test_a_dot_that_compiles_to_nothing_is_refused() -> None:
    """Triton 3.9: depth 16, weight on the left, tensor memory of sm_100 (64 tokens or more)."""
    text, chosen = "int4-g16 fp16 float 2048 False", "tiled fp16 64x64x128 k1 w4 swap"
    with pytest.raises(ValueError, match=r"plan warps .* must be 1 or 2 on sm_100"):
        record(text, chosen_plan(text, chosen, "sm_100"), "sm_100")
    for found in record(text, chosen_plan(text, chosen.replace("w4", "w2"), "sm_100"), "sm_100"):
        assert resources(compile_recorded(found)).uses("HMMA")


MIXTURE = [
    ("-g128", "fp16", "float"),
    ("-g64-asym", "bf16", "float"),
    ("-g32-fzero", "fp16", "int8-g32"),
    ("-g64", "bf16", "int8-g64"),
    ("", "fp16", "int8"),
    ("-g48", "fp32", "int8"),
    ("-asym", "fp32", "float"),
]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 4, 8, 16, 32, 64, 200, 1000])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_planner_picks_what_compiles(architecture: str, tokens: int) -> None:
    """What `plan_linear` picks for each width, with two zeros and activation formats each."""
    device = known_device(architecture)
    for bits in range(1, 9):
        for suffix, dtype, activations in (MIXTURE[bits % 7], MIXTURE[(bits + 3) % 7]):
            codec = f"int{bits}{suffix}"
            picked = plan_linear(
                tokens, 4096, 2048, parse_codec(codec), activation_format(activations),
                DTYPES[dtype], device, "triton",
            )  # fmt: skip
            case = f"{codec} {dtype} {activations} 2048 True"
            for found in record(case, picked, architecture):
                check(found, picked.dot, MOST_STACK)


# Instructions per decoded weight other than tensor ones, in the hot loop.
# A budget is the measured figure and 8 %: a new Triton or ptxas moves counts a little.
FIGURES = [
    ("sm_80", "int4-g128 fp16 float 2048 False | flat fp16 16x128x128 k1 w4", 2.20),
    ("sm_80", "int4-g128-asym fp16 float 2048 False | flat fp16 16x128x128 k1 w4", 2.65),
    ("sm_80", "int4-g128 fp16 float 2048 False | flat fp16 8x64x128 k1 w2 swap", 2.20),
    ("sm_86", "int4-g128 fp16 float 2048 False | flat fp16 8x64x128 k1 w2 swap", 1.81),
    ("sm_90", "int4-g128 fp16 float 2048 False | flat fp16 8x64x128 k1 w2 swap", 1.83),
    ("sm_100", "int4-g128 fp16 float 2048 False | flat fp16 16x64x128 k1 w2 swap", 2.02),
    ("sm_120", "int4-g128 bf16 float 2048 False | flat bf16 16x64x128 k1 w2 swap", 1.97),
    ("sm_80", "int4 fp16 int8 2048 False | flat int8 8x64x256 k1 w2 swap", 0.81),
    ("sm_90", "int2 fp16 int8 2048 False | flat int8 16x128x256 k1 w4", 0.79),
    ("sm_80", "ternary fp16 int8 2048 False | flat int8 16x64x256 k1 w2 swap", 0.82),
    ("sm_80", "int4-g32 fp16 float 2048 False | flat fp16 8x64x128 k1 w2 swap", 3.24),
    ("sm_90", "int4-g128-fzero fp16 float 2048 False | flat fp16 8x64x128 k1 w2 swap", 2.84),
    ("gfx942", "int4-g128 fp16 float 2048 False | flat fp16 16x128x128 k1 w4", 2.89),
]


@pytest.mark.parametrize(("architecture", "text", "figure"), FIGURES)
def test_instructions_per_weight(architecture: str, text: str, figure: float) -> None:
    case, chosen = (part.strip() for part in text.split("|"))
    picked = dataclasses.replace(chosen_plan(case, chosen, architecture), stages=3)
    _, measured = check_instructions(record(case, picked, architecture), picked, figure)
    widest = {"LDGSTS.128", "buffer.128"} & measured.hot.global_loads.keys()
    assert widest, f"weights are not loaded 16 bytes a lane: {measured.hot.global_loads}"
