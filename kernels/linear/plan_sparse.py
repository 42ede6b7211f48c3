"""The plan of `linear` for sparse weights: the dataflows of packed planes, other bytes, tiles."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from lath.formats import packing
from lath.formats.activations import ActivationFormat
from lath.formats.codec import Codec
from lath.formats.device import DeviceDescription
from lath.formats.plan import Backend, Plan
from lath.formats.sparse import SparseCodec
from lath.kernels.linear.plan import INTERPRETED_DEVICE, has_no_tensor_core, plan_gpu
from lath.kernels.linear.plan_cpu import plan_cpu
from lath.kernels.linear.plan_facts import SCALE_BYTES, bytes_moved, power_of_two


@functools.lru_cache(maxsize=4096)  # a decode step asks for the same few plans again and again
def plan_linear(
    m: int,
    n: int,
    k: int,
    codec: SparseCodec,
    activations: ActivationFormat,
    dtype: torch.dtype,
    device: DeviceDescription,
    backend: Backend | None = None,
) -> Plan:
    """The plan for x [m, k] and a weight [n, k] of which the codec's share is zero; backend None
    means the device's own."""
    if backend is None:
        backend = "cpu" if device.kind == "cpu" else "triton"
    stored = weight_bytes(n, k, codec)
    draft = Plan(
        backend=backend,
        dataflow="definition",
        dot="fp64",
        reason="the NumPy definition",
        bytes_moved=bytes_moved(m, n, k, stored, activations, dtype),
        operations=2 * m * n * k,
    )
    if backend == "reference":
        return draft
    if backend == "cpu":
        return _plan_cpu(draft, m, k, codec, activations, device)
    if device.kind == "cpu":
        device = INTERPRETED_DEVICE
    plan = plan_gpu(draft, m, n, k, codec, activations, dtype, device, _tile)
    return replace(plan, reason=f"{plan.reason}; read by its bitmap, multiplied as dense tiles")


def weight_bytes(n: int, k: int, codec: SparseCodec) -> int:
    """Bytes of a packed weight [n, k] that had no zeros: bitmap, offsets, kept numbers, scales."""
    rows, columns = packing.round_up(n, packing.PANEL), packing.round_up(k, packing.BLOCK)
    tiles = rows // packing.PANEL * (columns // packing.BLOCK)
    kept = -(-n * codec.kept_in_row(k) * codec.bits // 8)
    scale = 0 if codec.scale_dtype is None else SCALE_BYTES[codec.scale_dtype]
    return rows * columns // 8 + 8 * (tiles + 1) + kept + codec.num_groups(k) * rows * scale


def _plan_cpu(
    draft: Plan,
    m: int,
    k: int,
    codec: SparseCodec,
    activations: ActivationFormat,
    device: DeviceDescription,
) -> Plan:
    if codec.is_table and activations.kind != "float":
        why = f"int8 activations times {codec.values} numbers: their products in fp32"
        plan = plan_cpu(draft, m, k, Codec(8), ActivationFormat(), device)
        plan = replace(plan, reason=f"{plan.reason}; {why}")
    else:
        plan = plan_cpu(draft, m, k, Codec(8, codec.group), activations, device)
    if plan.dot != "int8" or m <= plan.block_m:
        how = "the bitmap expands kept numbers in registers, 64 bytes at a time"
    else:
        how = "the bitmap expands a panel once for all tokens, then its tile is the dense one"
    return replace(plan, reason=f"{plan.reason}; {how}")


def _tile(
    draft: Plan,
    m: int,
    n: int,
    k: int,
    codec: SparseCodec,
    activations: ActivationFormat,
    dot: str,
    device: DeviceDescription,
) -> Plan:
    """Tile, orientation, warps and stages of a GPU loop with a dot.

    Numbers are gathered one by one: a warp keeps a place and a number for each, so that tiles stay
    narrow. Loads whose addresses come from other loads are not fetched ahead by more stages.
    """
    tokens, rows, warps, swap = power_of_two(m, 16, 64), 64, 4, False
    if has_no_tensor_core(dot, device):
        tokens, rows, warps = 16, 32, 8
    elif device.kind == "cuda" and device.capability in (89, 90) and tokens == 16:
        rows = 32  # with 64, ptxas spills 8 or 16 bytes a thread of some codecs here
    return replace(
        draft, dot=dot, swap=swap, block_m=tokens, block_n=rows, block_k=packing.BLOCK,
        warps=warps, stages=2,
    )  # fmt: skip
