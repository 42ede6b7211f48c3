"""Rounded activations and scales that are multiplied into the codes, compiled for GPUs that are not
here: the dot that the formats ask for, no spill, and what a decoded weight costs."""

from __future__ import annotations

import pytest
from test_aot_linear import ARCHITECTURES, LOOPS, check, check_instructions, record

from cases import DTYPES
from lath.formats.activations import activation_format
from lath.formats.codec import codec as parse_codec
from lath.formats.device import has_e4m3, known_device
from lath.formats.plan import Plan
from lath.kernels.linear.plan import plan_linear
from tools.fake_gpu import compile_recorded
from tools.machine_code import analyze

# Codec, dtype, activations, K, bias; the dot that is planned, "e4m3" where the device has one.
COVER = {
    "int6-g128 bf16 int6-g128 2048 True": "int8",
    "int8 fp16 int8 2048 False": "int8",
    "int4-g128-s8 fp16 int8 2048 False": "int8",
    "int4-g64-asym-s8 bf16 int8 2000 True": "int8",
    "int2-g32-s8 fp16 int8 2048 False": "int8",
    "int4-g128-fp8 fp16 fp8 2048 True": "e4m3",
    "int3-g48-fp8 bf16 fp8 2000 False": "e4m3",
    "int4-g64-fp8 bf16 float 2048 False": "bf16",
    "int4-g128-fp8 fp16 int8 2048 False": "fp16",
    "e4m3 bf16 fp8 2048 True": "e4m3",
    "mxfp8 fp16 fp8-g128 2048 False": "e4m3",
    "e5m2-g128 fp16 fp8-e5m2 2048 False": "fp16",
    "int4-g64 fp16 fp8 2048 False": "fp16",
    "int8-g64-nested fp16 float 2048 False": "fp16",
    "int4-g64-nested bf16 int8-g64 2048 False": "int8",
}
# Each with one token or sixteen on one architecture at every run, the others when there is time.
MATRIX = [
    pytest.param(
        text, tokens, architecture, id=f"{architecture} M{tokens} {text}",
        marks=[] if i % 9 == j and (i % 2 == 0) == (tokens == 1) else [pytest.mark.slow],
    )
    for i, text in enumerate(COVER)
    for tokens in (1, 16)
    for j, architecture in enumerate(ARCHITECTURES)
]  # fmt: skip


# ptxas puts some bytes on the stack that the loop never touches.
BESIDE_THE_LOOP = {
    ("sm_86", 1, "int3-g48-fp8 bf16 fp8 2000 False"): 8,
}


def multiplied(plan: Plan, architecture: str) -> str:
    """What an E4M3 dot becomes: sm_90 and sm_100 take 8-bit floats only with 64 rows on the left
    for four warps (and sm_100 not even those of 16 tokens); Triton multiplies smaller tiles as
    fp16, which holds the same numbers."""
    large = plan.swap and plan.warps == 4
    small = architecture == "sm_100" or (architecture == "sm_90" and not large)
    return "fp16" if plan.dot == "e4m3" and small else plan.dot


def plan_of(text: str, tokens: int, architecture: str) -> Plan:
    codec, dtype, activations, columns, _ = text.split()
    return plan_linear(
        tokens, 4096, int(columns), parse_codec(codec), activation_format(activations),
        DTYPES[dtype], known_device(architecture), "triton",
    )  # fmt: skip


@pytest.mark.parametrize(("text", "tokens", "architecture"), MATRIX)
def test_the_planner_picks_what_compiles(text: str, tokens: int, architecture: str) -> None:
    plan = plan_of(text, tokens, architecture)
    native = COVER[text] != "e4m3" or has_e4m3(architecture)
    assert plan.dot == (COVER[text] if native else "fp16")
    stack = BESIDE_THE_LOOP.get((architecture, tokens, text), 0)
    for found in record(text, plan, architecture):
        check(found, multiplied(plan, architecture), stack)
        if stack and found.name in LOOPS:
            assert not analyze(compile_recorded(found)).hot.counts.get("local", 0)


# As in test_aot_linear.py: instructions per weight in the hot loop, 16 tokens; measured, and 8 %.
# The first two hold the same 4-bit codes: one sum over all groups against one for each.
FIGURES = [
    ("int4-g128-s8 fp16 int8 2048 False", 1.73),
    ("int4-g128 fp16 int8-g128 2048 False", 2.64),
    ("int4-g128-fp8 fp16 fp8 2048 False", 4.10),
    ("e4m3 fp16 fp8 2048 False", 0.84),
    # Three planes: 11.7 where the compiler pairs 16-bit numbers.
    ("int8-g64-nested fp16 float 2048 False", 5.30),
]


@pytest.mark.parametrize(("text", "figure"), FIGURES)
def test_instructions_per_weight(text: str, figure: float) -> None:
    plan = plan_of(text, 16, "sm_90")
    check_instructions(record(text, plan, "sm_90"), plan, figure)
