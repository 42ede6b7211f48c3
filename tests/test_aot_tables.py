"""Tables, ternary numbers and scales of 8 bits: what `plan_linear` picks for them, compiled."""

from __future__ import annotations

import pytest
from test_aot_linear import ARCHITECTURES, LOOPS, check, check_instructions, record

from cases import DTYPES, plan_of
from lath.formats.activations import activation_format
from lath.formats.codec import codec as parse_codec
from lath.formats.device import known_device
from lath.kernels.linear.plan import plan_linear
from tools.fake_gpu import compile_recorded
from tools.machine_code import analyze

# Codec, dtype, activations, K, bias. Each kind of value in each dot type, each kind of scale.
COVER = [
    "nf4-g64 fp16 float 2048 True",
    "nf4-g64-dq bf16 float 2048 False",
    "nf4-g64 bf16 int8-g64 2048 False",
    "fp4-g64 fp16 float 2048 False",
    "fp4-g64 fp16 int8-g64 2048 True",
    "mxfp4 bf16 float 2000 False",
    "mxfp4 fp16 int8-g32 2048 False",
    "nvfp4 bf16 float 2048 False",
    "nvfp4 fp16 int8-g16 2048 False",
    "mxfp6 bf16 int8-g32 2048 False",
    "mxfp6 fp16 float 2048 True",
    "mxfp6-e3m2 bf16 float 2048 False",
    "mxfp8 fp16 float 2048 False",
    "mxfp8-e5m2 fp16 float 2048 False",
    "e4m3 fp16 int8 2048 True",
    "e4m3-g128 bf16 float 2048 False",
    "lut3-g64-dq fp16 float 2048 False",
    "lut8 bf16 float 2048 False",
    "ternary fp16 int8 2048 True",
    "ternary-g64 fp16 float 2048 False",
    "ternary-1.6 fp16 int8 2048 True",
    "ternary-1.6 bf16 float 2560 False",
    "ternary-1.6-g160 bf16 int8 2560 False",
    "ternary-1.6-g64 fp16 float 2000 False",
    "int4-g128-s8 fp16 float 2048 False",
    "int4-g128-asym-s8 bf16 int8-g128 2048 False",
]
# ptxas puts 8 bytes on the stack that the loop never touches.
BESIDE_THE_LOOP = {("sm_89", 1, "nvfp4 fp16 int8-g16 2048 False"): 8}
# One token and sixteen take the two tiles of a flat loop. Each codec with one of them on one
# architecture at every run, each architecture with some; the others are for the slow one.
MATRIX = [
    pytest.param(
        text, tokens, architecture, id=f"{architecture} M{tokens} {text}",
        marks=[] if i % 9 == j and (i % 2 == 0) == (tokens == 1) else [pytest.mark.slow],
    )
    for i, text in enumerate(COVER)
    for tokens in (1, 16)
    for j, architecture in enumerate(ARCHITECTURES)
]  # fmt: skip


@pytest.mark.parametrize(("text", "tokens", "architecture"), MATRIX)
def test_the_planner_picks_what_compiles(text: str, tokens: int, architecture: str) -> None:
    """No spill at all, and the dot that the codec and the activations ask for."""
    codec, dtype, activations, columns, _ = text.split()
    plan = plan_linear(
        tokens, 4096, int(columns), parse_codec(codec), activation_format(activations),
        DTYPES[dtype], known_device(architecture), "triton",
    )  # fmt: skip
    stack = BESIDE_THE_LOOP.get((architecture, tokens, text), 0)
    for found in record(text, plan, architecture):
        check(found, plan.dot, stack)
        if stack and found.name in LOOPS:
            assert not analyze(compile_recorded(found)).hot.counts.get("local", 0)


# As in test_aot_linear.py: instructions per weight in the hot loop, 16 tokens; measured, and 8 %.
FIGURES = [
    ("nf4-g64 fp16 float 2048 False", 4.93),
    ("fp4-g64 fp16 float 2048 False", 3.79),
    ("ternary fp16 int8 2048 False", 1.50),
    ("ternary-1.6 fp16 int8 2560 False", 3.98),
    ("ternary-1.6 fp16 float 2560 False", 3.89),
    ("e4m3 fp16 float 2048 False", 4.80),
]


@pytest.mark.parametrize(("text", "figure"), FIGURES)
def test_instructions_per_weight(text: str, figure: float) -> None:
    codec, dtype, activations, columns, _ = text.split()
    plan = plan_linear(
        16, 4096, int(columns), parse_codec(codec), activation_format(activations),
        DTYPES[dtype], known_device("sm_90"), "triton",
    )  # fmt: skip
    check_instructions(record(text, plan, "sm_90"), plan, figure)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("nf4-g64 fp16 float 2048 False", "gemv fp32 1x64x128 k1 w4"),
        ("mxfp4 fp32 float 2000 False", "gemv fp32 2x64x128 k2 w4"),
        ("lut6-g32-dq bf16 float 2048 True", "decode_matmul bf16 16x64x128 k1 w4"),
        ("mxfp8-e5m2 fp16 float 2048 False", "tiled fp16 64x64x128 k1 w8"),
        ("fp4-g64 fp32 float 2048 False", "flat fp32 16x32x128 k1 w8"),
        ("ternary-1.6 fp32 int8 2048 False", "gemv fp32 1x64x160 k2 w4"),
        ("ternary-1.6-g48 fp16 float 2048 False", "decode_matmul fp16 16x64x160 k1 w4"),
    ],
)
@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=[] if name == "gfx942" else [pytest.mark.slow])
        for name in ARCHITECTURES
    ],
)
def test_other_dataflows_compile(architecture: str, text: str, chosen: str) -> None:
    plan = plan_of(chosen)
    for found in record(text, plan, architecture):
        check(found, plan.dot)
