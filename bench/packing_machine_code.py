"""What decoding costs: instructions per weight of the Triton loops, read from machine code.

    PYTHONPATH=tests python bench/packing_machine_code.py > bench/results/packing_machine_code.md

No GPU is needed. A cell is: thread instructions of the hot loop other than tensor ones, per weight;
then registers per thread, and "spill" with bytes where they did not suffice. Counts say what is
issued, not how long it takes.
"""

from __future__ import annotations

import dataclasses

import torch
import triton

from cases import DTYPES
from lath.formats.activations import activation_format
from lath.formats.families import weight_codec
from lath.formats.plan import Plan
from lath.formats.qtensor import QTensor
from lath.kernels.linear import triton as launcher
from tools.fake_gpu import CompileError, compile_recorded, fake_gpu
from tools.machine_code import analyze

ROWS, TOKENS = 1024, 16
# Architecture, orientation: n, x on the left; s, the weight on the left; 8, the same with what the
# planner takes for up to 8 tokens.
TARGETS = [
    ("sm_80", "n"), ("sm_80", "s"), ("sm_80", "8"), ("sm_86", "n"), ("sm_86", "8"), ("sm_90", "n"),
    ("sm_90", "s"), ("sm_90", "8"), ("sm_100", "n"), ("sm_100", "8"), ("sm_120", "n"),
    ("sm_120", "8"), ("gfx90a", "n"), ("gfx942", "n"), ("gfx942", "s"), ("gfx950", "n"),
]  # fmt: skip
# Codec, dtype of x, activations, K, dataflow.
CASES = [
    *((f"int{bits}-g128", "fp16", "float", 2048, "flat") for bits in range(1, 9)),
    ("int8-g128-nested", "fp16", "float", 2048, "flat"),
    ("int4-g128", "bf16", "float", 2048, "flat"),
    ("int8-g128", "bf16", "float", 2048, "flat"),
    ("int4-g128", "fp16", "float", 2000, "flat"),
    ("int4-g128-asym", "fp16", "float", 2048, "flat"),
    ("int4-g64-asym", "fp16", "float", 2048, "flat"),
    ("int4-g32", "fp16", "float", 2048, "flat"),
    ("int4-g16", "fp16", "float", 2048, "flat"),
    *((f"int{bits}", "fp16", "int8", 2048, "flat") for bits in range(1, 9)),
    ("ternary", "fp16", "int8", 2048, "flat"),
    ("ternary-1.6", "fp16", "int8", 2000, "flat"),
    ("int4-g128", "fp16", "int8", 2048, "flat"),
    ("int4-g64", "fp16", "int8-g64", 2048, "flat"),
    ("int4-g32", "fp16", "int8-g32", 2048, "flat"),
    ("int4-g128", "fp32", "float", 2048, "gemv"),
]


def plan_of(architecture: str, orientation: str, dataflow: str, dtype: str, act: str) -> Plan:
    """The plan of a cell: 16 tokens by 128 rows, 4 warps ("8": 8 by 64, 2); a gemv 1 by 64."""
    per_channel = act == "int8"
    few = orientation == "8" and dataflow == "flat"
    return Plan(
        backend="triton",
        dataflow=dataflow,  # type: ignore[arg-type]
        dot="fp32" if dataflow == "gemv" else "int8" if act != "float" else dtype,
        reason="a measurement",
        bytes_moved=0,
        operations=0,
        block_m=1 if dataflow == "gemv" else 8 if few else TOKENS,
        block_n=64 if dataflow == "gemv" or few else 128,
        block_k=256 if per_channel else 128,
        swap=orientation != "n",
        warps=2 if few else 4,
        stages=2 if architecture.startswith("gfx") else 3,
    )


def cell(
    target: tuple[str, str], codec: str, dtype: str, activations: str, columns: int, dataflow: str
) -> str:
    architecture, orientation = target
    if dataflow == "gemv" and orientation != "n":
        return "-"
    plan = plan_of(architecture, orientation, dataflow, dtype, activations)
    if codec.startswith("ternary-1.6"):  # its blocks have 160 columns
        plan = dataclasses.replace(plan, block_k=320 if activations == "int8" else 160)
    weight = QTensor.empty(weight_codec(codec), (ROWS, columns), device="cpu")
    x = torch.empty(plan.block_m, columns, dtype=DTYPES[dtype])
    with fake_gpu(architecture) as recording:
        launcher.linear(x, weight, None, activation_format(activations), plan)
    (loop,) = [s for s in recording.specialisations() if s.name in ("matmul_kernel", "gemv_kernel")]
    try:
        found = analyze(compile_recorded(loop))
    except CompileError:
        return "does not compile"
    weights = plan.block_n * (128 if dataflow == "gemv" else plan.block_k)
    spill = f" spill {found.resources.spill_bytes}" if found.resources.spill_bytes else ""
    return f"{found.non_tensor_per_weight(weights):.2f} / {found.resources.registers}{spill}"


def main() -> None:
    """Print the table as Markdown."""
    print("# Machine code of the packed layout\n")
    print(__doc__)
    print(
        f"Triton {triton.__version__}. {TOKENS} tokens, 128 rows of the weight, 4 warps;", end=" "
    )
    print("128 columns per step (256: int8 with a scale per row); gemv: 1 token, 64 rows.", end=" ")
    print(
        "n: x on the left of the dot; s: the weight; 8: the weight, 8 tokens, 64 rows, 2 warps, ",
        end="",
    )
    print("as planned for up to 8 tokens. AMD has 64 lanes per wave.\n")
    heads = [f"{architecture} {orientation}" for architecture, orientation in TARGETS]
    print("| loop, codec, x, activations, K |", " | ".join(heads), "|", flush=True)
    print("|---" * (len(heads) + 1) + "|")
    for codec, dtype, activations, columns, dataflow in CASES:
        cells = [cell(t, codec, dtype, activations, columns, dataflow) for t in TARGETS]
        name = f"{dataflow} {codec} {dtype} {activations} {columns}"
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
