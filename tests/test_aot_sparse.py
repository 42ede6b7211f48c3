"""Sparse weights: what `plan_linear` picks for them, compiled for every target."""

from __future__ import annotations

import pytest
import torch
from test_aot_linear import ARCHITECTURES, ROWS, check, check_instructions

from cases import DTYPES
from lath.formats.activations import activation_format
from lath.formats.device import known_device
from lath.formats.plan import Plan
from lath.formats.sparse import SparseCodec, SparseTensor
from lath.kernels.linear import triton as launcher
from lath.kernels.linear.plan_sparse import plan_linear
from tools.fake_gpu import Specialisation, fake_gpu

# Codec, dtype, activations, K, bias: each kind of number in each dot type, spans of all and some.
COVER = [
    "sparse50-int8 fp16 float 2048 True",
    "sparse50-int8-g128 bf16 float 2048 False",
    "sparse50-int8-g64 fp16 int8-g64 2048 False",
    "sparse80-int8 bf16 int8 2048 True",
    "sparse70-int4-g64 fp16 float 2000 False",
    "sparse50-int4 bf16 int8 2048 False",
    "sparse50-fp16 fp16 float 2048 True",
    "sparse50-bf16 bf16 float 2048 False",
    "sparse50-fp16 bf16 int8 2048 False",
]
# As in test_aot_tables.py: each architecture with one of them at every run, two tiles.
MATRIX = [
    pytest.param(
        text, tokens, architecture, id=f"{architecture} M{tokens} {text}",
        marks=[] if i == j and (i % 2 == 0) == (tokens == 1) else [pytest.mark.slow],
    )
    for i, text in enumerate(COVER)
    for tokens in (1, 16, 64)
    for j, architecture in enumerate(ARCHITECTURES)
]  # fmt: skip


def record(text: str, chosen: Plan, architecture: str) -> list[Specialisation]:
    """What the launcher would compile for a case under a plan."""
    codec, dtype, activations, columns, bias = text.split()
    weight = SparseTensor.empty(SparseCodec.parse(codec), (ROWS, int(columns)), device="cpu")
    x = torch.zeros(max(chosen.block_m, 1), int(columns), dtype=DTYPES[dtype])
    offsets = torch.zeros(ROWS, dtype=DTYPES[dtype]) if bias == "True" else None
    with fake_gpu(architecture) as recording:
        launcher.linear(x, weight, offsets, activation_format(activations), chosen)
    assert recording.launches
    return recording.specialisations()


@pytest.mark.parametrize(("text", "tokens", "architecture"), MATRIX)
def test_the_planner_picks_what_compiles(text: str, tokens: int, architecture: str) -> None:
    """No spill at all, and the dot that the codec and the activations ask for."""
    codec, dtype, activations, columns, _ = text.split()
    plan = plan_linear(
        tokens, 4096, int(columns), SparseCodec.parse(codec), activation_format(activations),
        DTYPES[dtype], known_device(architecture), "triton",
    )  # fmt: skip
    for found in record(text, plan, architecture):
        check(found, plan.dot)


def test_instructions_per_weight() -> None:
    """As in test_aot_tables.py, measured and 8 %: most count bits and gather: 7 times
    what a dense int8 weight costs, so that a GPU must be short of bandwidth for this to pay."""
    text = "sparse50-int8 fp16 float 2048 False"
    plan = plan_linear(
        16, 4096, 2048, SparseCodec.parse("sparse50-int8"), activation_format("float"),
        DTYPES["fp16"], known_device("sm_90"), "triton",
    )  # fmt: skip
    check_instructions(record(text, plan, "sm_90"), plan, 21.6)
