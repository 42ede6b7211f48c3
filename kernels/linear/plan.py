"""The plan of `linear`: a pure function of the sizes, the formats and the device.

Every rule says why in the plan's `reason`. A GPU's rules follow from three facts: a small M leaves
the tensor core mostly idle, so bytes decide and K is split until every unit has work; a decoded
operand on the left can stay in registers; and a dot needs a depth of 16 (16-bit) or 32 (8-bit).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from lath.formats import packing
from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.device import DeviceDescription, known_device
from lath.formats.plan import Backend, Plan

OPERAND_BYTES = {"int8": 1, "fp16": 2, "bf16": 2, "fp32": 4}
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Above this many tokens a decoded weight is used often enough to pay for storing it (CPU, float).
CPU_GEMV_TOKENS = 8
# Up to this many tokens a product per weight costs less than filling a dot's tile (GPU, fp32).
GEMV_TOKENS = 4
# Above this many tokens the tile is full and splitting K only adds workspace (GPU).
FLAT_TOKENS = 64
# A piece of K shorter than this spends more on its share of the reduction than it saves.
MIN_BLOCKS_PER_PIECE = 2
# The interpreter has no device; its launches are planned as for this one.
INTERPRETED_DEVICE = known_device("sm_80")


def plan_linear(
    m: int,
    n: int,
    k: int,
    codec: Codec,
    activations: ActivationFormat,
    dtype: torch.dtype,
    device: DeviceDescription,
    backend: Backend | None = None,
) -> Plan:
    """The plan for x [m, k] and a weight [n, k]; backend None means the device's own."""
    if backend is None:
        backend = "cpu" if device.kind == "cpu" else "triton"
    draft = Plan(
        backend=backend,
        dataflow="definition",
        dot="fp64",
        reason="the NumPy definition",
        bytes_moved=_bytes_moved(m, n, k, codec, activations, dtype),
        operations=2 * m * n * k,
    )
    if backend == "reference":
        return draft
    if backend == "cpu":
        return _plan_cpu(draft, m, codec, activations, dtype, device)
    if device.kind == "cpu":
        device = INTERPRETED_DEVICE
    return _plan_gpu(draft, m, n, k, codec, activations, dtype, device)


def weight_bytes(n: int, k: int, codec: Codec) -> int:
    """Bytes of a packed weight [n, k]: codes, scales and zeros, padding included."""
    rows, columns = packing.round_up(n, packing.PANEL), packing.round_up(k, packing.BLOCK)
    scale = 4 if codec.scale_dtype == "fp32" else 2
    zero = {"none": 0, "integer": 1, "float": scale}[codec.zero]
    return rows * columns * codec.bits // 8 + codec.num_groups(k) * rows * (scale + zero)


def _bytes_moved(
    m: int, n: int, k: int, codec: Codec, activations: ActivationFormat, dtype: torch.dtype
) -> int:
    """Each byte of weight, x and y once; int8 activations are also written and read as codes."""
    size = dtype.itemsize
    x = m * k * (size + (2 if activations.kind == "int8" else 0))
    return weight_bytes(n, k, codec) + x + m * n * size


def common_group(k: int, codec: Codec, activations: ActivationFormat) -> int:
    """Longest run along K that has one weight scale and one activation scale."""
    groups = [g for g in (codec.group, activations.group) if g is not None and g < k]
    return math.gcd(*groups) if groups else packing.round_up(max(k, 1), packing.BLOCK)


def _plan_cpu(
    draft: Plan,
    m: int,
    codec: Codec,
    activations: ActivationFormat,
    dtype: torch.dtype,
    device: DeviceDescription,
) -> Plan:
    stored = next(bits for bits in (2, 4, 8) if bits >= codec.bits)
    reasons = [f"{device.architecture}, {device.threads} thread(s)"]
    if stored != codec.bits:
        reasons.append(f"{codec.bits}-bit codes are widened to {stored} bits in the CPU's view")
    if activations.kind == "float":
        if m <= CPU_GEMV_TOKENS:
            reasons.append("float activations: codes are decoded to fp32 in registers")
            dataflow, dot = "gemv", "fp32"
        else:
            reasons.append(f"more than {CPU_GEMV_TOKENS} tokens: decoded once, then a matmul")
            dataflow, dot = "decode_matmul", "fp32"
    else:
        dataflow, dot = ("gemv" if m == 1 else "tiled"), "int8"
        reasons.append("int8 dot products; one token streams, more share a register tile")
        if (
            activations.group is not None
            and codec.group is not None
            and activations.group % codec.group
        ):
            shared = math.gcd(activations.group, codec.group)
            reasons.append(
                f"groups of {activations.group} and {codec.group} share runs of {shared}"
            )
    return replace(
        draft,
        dataflow=dataflow,
        dot=dot,
        reason="; ".join(reasons),
        threads=device.threads,
        block_m=1 if dataflow == "gemv" else 8,
        block_n=16 if dataflow == "gemv" else 48,
    )


def _plan_gpu(
    draft: Plan,
    m: int,
    n: int,
    k: int,
    codec: Codec,
    activations: ActivationFormat,
    dtype: torch.dtype,
    device: DeviceDescription,
) -> Plan:
    dot, why_dot = _dot_type(k, codec, activations, dtype)
    crossover = _decode_crossover(n, device)
    if m > crossover and activations.kind == "float":
        return replace(
            draft,
            dataflow="decode_matmul",
            dot=dot,
            reason=f"{m} tokens, above {crossover} on {device.architecture}: decoding once to "
            f"{dot} and a library matmul cost less than decoding in every tile",
        )
    if dot == "fp32" and m <= GEMV_TOKENS:
        draft = replace(draft, dataflow="gemv", block_m=1 << max(m - 1, 0).bit_length())
        draft = replace(draft, block_n=32, block_k=packing.BLOCK, warps=4, stages=2)
        why = "fp32 and few tokens: no tensor core would help, products are summed directly"
        return _split(draft, m, n, k, device, [why_dot, why])
    if m <= FLAT_TOKENS:
        draft = replace(draft, dataflow="flat")
        why = f"{m} tokens: weight bytes decide, K is split until every unit has work"
        return _split(_tile(draft, m, n, dot, device), m, n, k, device, [why_dot, why])
    draft = _tile(replace(draft, dataflow="tiled"), m, n, dot, device)
    return replace(draft, reason=f"{why_dot}; {m} tokens fill the tiles, K is not split")


def _dot_type(
    k: int, codec: Codec, activations: ActivationFormat, dtype: torch.dtype
) -> tuple[str, str]:
    """The type that is multiplied, and why."""
    if activations.kind == "float":
        name = DTYPE_NAMES[dtype]
        return name, f"{name} activations are multiplied as they are"
    run = common_group(k, codec, activations)
    if run % 32 == 0:
        return "int8", "int8 activations: int8 dot, summed in int32"
    return "fp16", f"scales change every {run} columns, less than an int8 dot's depth of 32: fp16"


def _decode_crossover(n: int, device: DeviceDescription) -> int:
    """Tokens above which decode-then-matmul is taken: fewer where the matmul unit is faster."""
    if device.kind == "hip":
        return 256
    if device.capability >= 100:
        return 64
    return 128 if device.capability == 90 else 256


def _tile(draft: Plan, m: int, n: int, dot: str, device: DeviceDescription) -> Plan:
    """Tile, orientation, warps and stages of a dataflow with a dot."""
    tokens = max(16, min(64, 1 << max(m - 1, 0).bit_length()))
    swap = False
    if m <= 8 and device.kind == "cuda":
        swap, tokens = True, 8
    elif tokens == 64 and device.kind == "cuda" and device.capability < 100:
        swap = True
    rows = 128 if n >= 128 * device.compute_units and tokens < 64 else 64
    warps = 4
    if device.capability == 100 and swap:
        rows, warps = 64, 2
    most = 2 if device.kind == "hip" or device.capability < 80 else 3
    stage_bytes = packing.BLOCK * (tokens * OPERAND_BYTES[dot] + rows)
    stages = max(1, min(most, device.shared_memory // stage_bytes))
    return replace(
        draft,
        dot=dot,
        swap=swap,
        block_m=rows if swap else tokens,
        block_n=tokens if swap else rows,
        block_k=packing.BLOCK,
        warps=warps,
        stages=stages,
    )


def _split(
    draft: Plan, m: int, n: int, k: int, device: DeviceDescription, reasons: list[str]
) -> Plan:
    """K in pieces of whole blocks: enough programs for the device, no piece empty."""
    rows = draft.block_m if draft.swap else draft.block_n
    tiles = max(1, -(-n // rows))
    blocks = max(1, -(-k // packing.BLOCK))
    split = max(1, min(device.compute_units // tiles, blocks // MIN_BLOCKS_PER_PIECE))
    while split > 1 and -(-blocks // split) * (split - 1) >= blocks:
        split -= 1
    workspace = 8 * split * m * n if split > 1 else 0
    if split > 1:
        reasons = [*reasons, f"{tiles} tiles on {device.compute_units} units: K in {split} pieces"]
    return replace(
        draft, split_k=split, reason="; ".join(reasons), bytes_moved=draft.bytes_moved + workspace
    )
