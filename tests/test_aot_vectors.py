"""Vector codebooks and lattices: what is planned for them, compiled for GPUs that are not here."""

from __future__ import annotations

import pytest
import torch
from test_aot_linear import ARCHITECTURES, check, check_instructions, record

from cases import DTYPES, plan_of
from lath.formats.activations import activation_format
from lath.formats.device import known_device
from lath.formats.families import weight_codec
from lath.formats.lattice import LatticeCodec, LatticeTensor
from lath.kernels.linear import lattice
from lath.kernels.linear.plan import plan_linear
from tools.fake_gpu import fake_gpu

# Codec, dtype, activations, K, bias.
COVER = [
    "vq8-256 fp16 float 2048 True",
    "vq8-256-g128 bf16 float 2000 False",
    "vq8-65536 fp16 float 2048 False",
    "vq8-65536+256 bf16 float 2048 False",
    "vq4-256-g64 fp16 int8-g64 2048 False",
    "vq2-16 bf16 float 2048 False",
    "vq16-65536 fp16 float 2048 False",
    "vq4-16 fp16 int8 2048 True",
    "vq2-256 fp16 float 2048 False",
]
MATRIX = [
    pytest.param(
        text, tokens, architecture, id=f"{architecture} M{tokens} {text}",
        marks=[] if i == j and (i % 2 == 0) == (tokens == 1) else [pytest.mark.slow],
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
        tokens, 4096, int(columns), weight_codec(codec), activation_format(activations),  # type: ignore[arg-type]
        DTYPES[dtype], known_device(architecture), "triton",
    )  # fmt: skip
    for found in record(text, plan, architecture):
        check(found, plan.dot)


# As in test_aot_tables.py: instructions per weight in the hot loop, 16 tokens; measured, and 8 %.
FIGURES = [("vq8-256 fp16 float 2048 False", 2.03), ("vq8-65536+256 fp16 float 2048 False", 4.02)]


@pytest.mark.parametrize(("text", "figure"), FIGURES)
def test_instructions_per_weight(text: str, figure: float) -> None:
    """And entries of 8 numbers arrive in one load of 16 bytes each, copied ahead of their use."""
    codec, dtype, activations, columns, _ = text.split()
    plan = plan_linear(
        16, 4096, int(columns), weight_codec(codec), activation_format(activations),  # type: ignore[arg-type]
        DTYPES[dtype], known_device("sm_90"), "triton",
    )  # fmt: skip
    compiled, _ = check_instructions(record(text, plan, "sm_90"), plan, figure)
    assert "cp.async.cg.shared.global" in compiled.asm["ptx"]
    assert "ld.global.b16" not in compiled.asm["ptx"]


def test_indices_that_share_a_word_are_one_load() -> None:
    """A load for each index of a pair took 5.61, 80 registers and the stack for one token."""
    text = "vq2-256 fp16 float 2048 False"
    plan = plan_linear(
        1, 4096, 2048, weight_codec("vq2-256"), activation_format("float"),  # type: ignore[arg-type]
        DTYPES["fp16"], known_device("sm_89"), "triton",
    )  # fmt: skip
    check_instructions(record(text, plan, "sm_89"), plan, 4.70)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("vq8-256 fp16 float 2048 False", "gemv fp32 1x64x128 k1 w4"),
        ("vq8-65536+256 bf16 float 2048 False", "decode_matmul bf16 16x64x128 k1 w4"),
        ("vq8-256-g128 fp16 float 2048 False", "tiled fp16 64x64x128 k1 w8"),
        ("vq4-256 fp32 float 2000 False", "flat fp32 16x32x128 k1 w8"),
    ],
)
@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=[] if name == "sm_90" else [pytest.mark.slow])
        for name in ARCHITECTURES
    ],
)
def test_other_dataflows_compile(architecture: str, text: str, chosen: str) -> None:
    plan = plan_of(chosen)
    for found in record(text, plan, architecture):
        check(found, plan.dot)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=[] if name in ("sm_90", "gfx942") else [pytest.mark.slow])
        for name in ARCHITECTURES
    ],
)
def test_what_a_lattice_launches_compiles(architecture: str, activations: str) -> None:
    """The loops of its whole numbers, with the dot that the plan names: rounded x G in fp16."""
    codec, fmt = LatticeCodec.parse("lattice2-d8-g128"), activation_format(activations)
    weight = LatticeTensor.empty(codec, (1024, 2048), "cpu")
    for tensor in weight.tensors.values():
        tensor.zero_()
    device = known_device(architecture)
    plan = lattice.plan_linear(16, 1024, 2048, codec, fmt, torch.float16, device, "triton")
    with fake_gpu(architecture) as recording:
        lattice.linear(torch.zeros(16, 2048).half(), weight, None, fmt, plan)
    assert plan.dot == ("fp16" if activations == "float" else "int8")
    assert {found.name for found in recording.specialisations()} >= {"matmul_kernel"}
    for found in recording.specialisations():
        check(found, plan.dot)
