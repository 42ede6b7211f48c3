"""The plan of `linear`: a pure function of the sizes, the formats and the device.

Every rule says why in the plan's `reason`. A GPU's rules follow from three facts: a small M leaves
the tensor core mostly idle, so bytes decide and K is split until every unit has work; a decoded
operand on the left can stay in registers; and a dot needs a depth of 16 (16-bit) or 32 (8-bit).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from lath.formats import packing
from lath.formats.activations import ActivationFormat
from lath.formats.codec import PlanesCodec
from lath.formats.device import DeviceDescription, has_e4m3, known_device
from lath.formats.plan import Backend, Plan
from lath.formats.sparse import SparseCodec
from lath.kernels.linear.plan_cpu import plan_cpu
from lath.kernels.linear.plan_facts import (
    LOOKED_UP,
    bytes_moved,
    common_group,
    folds_scales,
    held_in,
    holds_integers,
    multiplies_float8,
    power_of_two,
    weight_bytes,
)

OPERAND_BYTES = {"int8": 1, "e4m3": 1, "fp16": 2, "bf16": 2, "fp32": 4}
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Up to this many tokens products are summed directly where no tensor core takes the dot (GPU). With
# one, a dot needs fewer instructions per weight even for one token (bench/results/).
GEMV_TOKENS = 4
# Above this many tokens the tile is full and splitting K only adds workspace (GPU).
FLAT_TOKENS = 64
# A piece of K shorter than this spends more on its share of the reduction than it saves.
MIN_BLOCKS_PER_PIECE = 2
# Fills in a draft: (draft, m, n, k, codec, activations, dot, device) -> plan.
Tile = Callable[..., Plan]
# The interpreter has no device; its launches are planned as for this one.
INTERPRETED_DEVICE = known_device("sm_80")


@functools.lru_cache(maxsize=4096)  # a decode step asks for the same few plans again and again
def plan_linear(
    m: int,
    n: int,
    k: int,
    codec: PlanesCodec,
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
        bytes_moved=bytes_moved(m, n, k, weight_bytes(n, k, codec), activations, dtype),
        operations=2 * m * n * k,
    )
    if backend == "reference":
        return draft
    if backend == "cpu":
        return plan_cpu(draft, m, k, codec, activations, device)
    if device.kind == "cpu":
        device = INTERPRETED_DEVICE
    return plan_gpu(draft, m, n, k, codec, activations, dtype, device, _tile)


def plan_gpu(
    draft: Plan,
    m: int,
    n: int,
    k: int,
    codec: PlanesCodec | SparseCodec,
    activations: ActivationFormat,
    dtype: torch.dtype,
    device: DeviceDescription,
    tile: Tile,
) -> Plan:
    """The dataflow of a GPU. tile: what fills in the tile of a dataflow with a dot."""
    dot, why_dot = _dot_type(k, codec, activations, dtype, device)
    crossover, block = _decode_crossover(device), packing.block_of(codec)
    if m > crossover and activations.kind == "float":
        why = (
            f"{m} tokens, above {crossover} on {device.architecture}: decoding once to {dot} and a "
            "library matmul cost less than decoding in every tile"
        )
        return replace(
            draft, dataflow="decode_matmul", dot=dot, reason=why, block_n=64, warps=4, stages=1,
            block_k=block,
        )  # fmt: skip
    if m <= GEMV_TOKENS and has_no_tensor_core(dot, device):
        draft = replace(
            draft, dataflow="gemv", dot="fp32", block_m=power_of_two(m, 1, 4),
            block_n=32 if device.kind == "hip" and m > 2 else 64, block_k=block, warps=4,
            stages=2 if device.kind == "hip" else 3,
        )  # fmt: skip
        why = f"{m} token(s) and no tensor core for {dot}: products are summed directly"
        return _split(draft, m, n, k, device, [why])
    if m <= FLAT_TOKENS:
        draft = tile(replace(draft, dataflow="flat"), m, n, k, codec, activations, dot, device)
        why = f"{m} tokens: weight bytes decide, K is split until every unit has work"
        return _split(draft, m, n, k, device, [why_dot, why])
    draft = tile(replace(draft, dataflow="tiled"), m, n, k, codec, activations, dot, device)
    return replace(draft, reason=f"{why_dot}; {m} tokens fill the tiles, K is not split")


def _dot_type(
    k: int,
    codec: PlanesCodec | SparseCodec,
    activations: ActivationFormat,
    dtype: torch.dtype,
    device: DeviceDescription,
) -> tuple[str, str]:
    """The type that is multiplied, and why."""
    if activations.kind == "float":
        name = DTYPE_NAMES[dtype]
        return name, f"{name} activations are multiplied as they are"
    if multiplies_float8(k, codec, activations) and has_e4m3(device.architecture):
        return "e4m3", "fp8 activations: e4m3 dot, summed in fp32"
    held = held_in(codec)
    if not activations.is_integer:
        return held, f"{activations.kind} activations: their numbers in {held}, which holds them"
    if not holds_integers(codec):
        why = f"{activations.kind} activations, but numbers of {codec} that no int8 holds"
        return held, f"{why}: {held}"
    run = common_group(k, codec, activations)
    if run % 32:
        return "fp16", f"scales change every {run} columns, below an int8 dot's depth of 32: fp16"
    if folds_scales(k, codec, activations):
        return "int8", "codes times the 8-bit scales of their groups: one int8 dot over all of K"
    return "int8", f"{activations.kind} activations: int8 dot, summed in int32"


def has_no_tensor_core(dot: str, device: DeviceDescription) -> bool:
    """fp32 products are never a tensor core's; Triton uses none on architectures before sm_80."""
    return dot == "fp32" or (device.kind == "cuda" and device.capability < 80)


def _has_tensor_memory(device: DeviceDescription) -> bool:
    """sm_100 to sm_11x: four warps and a large tile go through tensor memory."""
    return 100 <= device.capability < 120


def _decode_crossover(device: DeviceDescription) -> int:
    """Tokens above which decode-then-matmul is taken: fewer where the matmul unit is faster."""
    if device.kind == "hip":
        return 256
    if _has_tensor_memory(device):
        return 64
    if device.capability < 80:
        return GEMV_TOKENS
    return 128 if device.capability == 90 else 256


def _tile(
    draft: Plan,
    m: int,
    n: int,
    k: int,
    codec: PlanesCodec,
    activations: ActivationFormat,
    dot: str,
    device: DeviceDescription,
) -> Plan:
    """Tile, orientation, warps and stages of a dataflow with a dot.

    The tile's left side is padded to 16 or 64, its right side only to 8: with few tokens the weight
    goes left (`swap`). On sm_90 a decoded weight on the left also stays in registers. The rules
    were read off the machine code of each choice (`bench/results/packing_machine_code.md`).
    """
    run, block = common_group(k, codec, activations), packing.block_of(codec)
    # What needs more registers: scales that change inside a step, zero points, a tail of K, entries
    # on their way, and the half runs in which 16-bit numbers are cut out of a 1-bit plane.
    is_fine = (
        run < block
        or codec.zero != "none"
        or k % block != 0
        or codec.values in LOOKED_UP
        or (dot != "int8" and 1 in codec.plane_widths)
    )
    # Rounding to E4M3 by hand needs still more: from nine tokens on, but where the codes go left.
    rounds = codec.scale_dtype == "fp8" and OPERAND_BYTES[dot] == 2
    many = 8 if rounds and device.capability != 90 else 16
    swap, warps = False, 4
    tokens = power_of_two(m, 16, 64)
    rows = 128 if n >= 128 * device.compute_units or tokens == 64 else 64
    if has_no_tensor_core(dot, device):
        tokens, rows, warps = 16, 32, 8
    elif device.kind == "cuda" and m > many and (is_fine or rounds or _has_tensor_memory(device)):
        # Larger tiles spill here, or take the longer path through tensor memory. Where x's rows are
        # no whole loads, each number has an address and a mask: with sm_80's decoded pairs beside
        # them, 32 tokens spill too.
        most = 16 if device.capability == 80 and k % 16 else 32
        swap, tokens, rows, warps = True, min(tokens, most), 64, 2
    elif device.kind == "cuda" and m <= (8 if is_fine or dot == "e4m3" else 16):
        # Two warps keep to the small dot of 8 or 16 tokens on every architecture; 16 and what needs
        # more registers spill, and only four warps have sm_90's dot of 8-bit floats.
        swap, tokens, rows, warps = True, 8 if m <= 8 else 16, 64, 2
    elif device.kind == "cuda" and device.capability == 90:
        # A 1-bit plane is read in half runs, which the left operand would pass through memory.
        swap = 1 not in codec.plane_widths or dot == "int8"
        rows = 128 if swap else rows
    elif device.kind == "cuda":
        # Many tokens on the left would make every warp decode the same weights.
        swap = tokens >= 32
    elif run % 32 and m > 16:
        tokens, rows = 16, 32  # scales change every 16 columns: a larger tile spills
    draft = replace(
        draft, dot=dot, swap=swap, block_m=tokens, block_n=rows, block_k=block, warps=warps
    )
    # Loads of 8-bit codes are twice as wide: two stages hold what three hold of 4-bit ones. Scales
    # that change every 16 columns take the registers of a third, and so do entries that are looked
    # up by codes in half runs, or put together from bytes where tensor memory is addressed, and
    # half runs under scales that change inside a block.
    wide = _has_tensor_memory(device) and (codec.bits == 8 or (codec.is_table and dot == "int8"))
    in_parts = codec.values in LOOKED_UP or (run < packing.BLOCK and dot != "int8")
    scattered = in_parts and 1 in codec.plane_widths
    slowest = device.kind == "hip" or has_no_tensor_core(dot, device)
    stages = 2 if slowest or wide or scattered or run % 32 else 3
    while stages > 1 and shared_bytes(draft, stages, codec, device) > device.shared_memory:
        stages -= 1
    return replace(draft, stages=stages)


def shared_bytes(plan: Plan, stages: int, codec: PlanesCodec, device: DeviceDescription) -> int:
    """An upper estimate of the shared memory of a tile: loads in flight and decoded weights."""
    size = OPERAND_BYTES[plan.dot]
    x_stages = stages if device.kind == "cuda" and device.capability >= 90 else stages - 1
    loads = plan.block_k * (
        (stages - 1) * plan.block_n * codec.bits // 8 + x_stages * plan.block_m * size
    )
    # Entries that are looked up are fetched a step ahead too, where a load brings two of them.
    if device.kind == "cuda" and codec.values in LOOKED_UP and codec.bits <= 4 and size == 2:
        loads += plan.block_k * plan.block_n * size
    through = device.kind == "hip" or (device.capability >= 90 and not plan.swap)
    return loads + (packing.BLOCK * plan.block_n * size if through else 0)


def _split(
    draft: Plan, m: int, n: int, k: int, device: DeviceDescription, reasons: list[str]
) -> Plan:
    """K in pieces of whole blocks: enough programs for the device, no piece empty."""
    tiles = max(1, -(-n // draft.block_n) * -(-m // draft.block_m))
    blocks = max(1, -(-k // draft.block_k))
    split = max(1, min(device.compute_units // tiles, blocks // MIN_BLOCKS_PER_PIECE))
    while split > 1 and -(-blocks // split) * (split - 1) >= blocks:
        split -= 1
    workspace = 8 * split * m * n if split > 1 else 0
    if split > 1:
        reasons = [*reasons, f"{tiles} tiles on {device.compute_units} units: K in {split} pieces"]
    return replace(
        draft, split_k=split, reason="; ".join(reasons), bytes_moved=draft.bytes_moved + workspace
    )
