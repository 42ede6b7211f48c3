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

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Above this many tokens a decoded weight is used often enough to pay for storing it (CPU, float).
CPU_GEMV_TOKENS = 8
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
    return draft
