"""The plan of `linear`: a pure function of the sizes, the formats and the device.

Every rule says why in the plan's `reason`. A GPU's rules follow from three facts: a small M leaves
the tensor core mostly idle, so bytes decide and K is split until every unit has work; a decoded
operand on the left can stay in registers; and a dot needs a depth of 16 (16-bit) or 32 (8-bit).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import torch

from lath.formats import packing
from lath.formats import values as value_tables
from lath.formats.activations import ActivationFormat
from lath.formats.codec import PlanesCodec
from lath.formats.device import DeviceDescription, has_e4m3, known_device
from lath.formats.plan import Backend, Dataflow, Plan
from lath.formats.sparse import SparseCodec

OPERAND_BYTES = {"int8": 1, "e4m3": 1, "fp16": 2, "bf16": 2, "fp32": 4}
# Entries that a GPU's decoder reads from memory (kernels/linear/triton_tables.py).
LOOKED_UP = ("nf4", "learned", "vectors")
SCALE_BYTES = {"fp16": 2, "fp32": 4, "int8": 1, "e8m0": 1, "e4m3": 1, "fp8": 1}
# A product of an activation code and a weight code (less its zero) is at most 127 * 255.
MOST_INT32_COLUMNS = (2**31 - 1) // (127 * 255)
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Bytes of a panel from which four at a time were faster on a Zen 4 core (33 to 59 KB measured).
LONG_STREAM = 32768
# Columns of a CPU's group. 255 * 127 * LONGEST_GROUP < 2**31: its int32 sums cannot overflow.
LONGEST_GROUP = 65536
# Columns that are whole vectors of a CPU's base-3 codes (20) and of its activations (16).
TRIT_GROUP = 80
# Ternary look-ups of a CPU without VNNI: tokens side by side in an entry, tokens from which they
# are no slower than products, and tokens behind the last whole entry that are one tile of products
# (bench/results/ternary_cpu.md).
LOOK_UP_TILE = 16
LOOK_UP_TOKENS = 8
LOOK_UP_REST = 4
# Register tiles (tokens, panels) by what is multiplied and whether the CPU has AVX512-VNNI:
# accumulators, one panel of codes each and a broadcast fill the 32 (or 16 half as wide) registers.
CPU_TILES = {
    ("int8", True): ((1, 4), (2, 4), (4, 4), (8, 3)),
    ("int8", False): ((1, 4), (4, 1)),
    ("float", True): ((1, 1), (4, 1), (8, 1)),
    ("float", False): ((1, 1), (4, 1)),
}
# Tokens of a register tile of four rows of vectors: accumulators, four rows of decoded weights.
CPU_VECTOR_TOKENS = {True: (1, 2, 4), False: (1, 2)}
# Tokens from which decoding a piece of a panel into memory beats fetching entries for each tile.
CPU_VECTOR_STAGED = 8
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


def weight_bytes(n: int, k: int, codec: PlanesCodec) -> int:
    """Bytes of a packed weight [n, k]: codes, both levels of scales, zeros, padding included.

    Not of a learned table, which is no part of what a longer weight has more of.
    """
    rows = packing.round_up(n, packing.PANEL)
    scale = SCALE_BYTES[codec.scale_dtype]
    zero = {"none": 0, "integer": 1, "float": scale}[codec.zero]
    outer = {"int8": 2 * rows, "fp8": 4 * rows, "e4m3": 4}.get(codec.scale_dtype, 0)
    sides = codec.num_groups(k) * rows * (scale + zero) + outer
    return packing.code_bytes(codec, (n, k)) + sides


def bytes_moved(
    m: int, n: int, k: int, weight: int, activations: ActivationFormat, dtype: torch.dtype
) -> int:
    """Each byte of weight, x and y once; rounded activations are also written and read as codes."""
    size = dtype.itemsize
    x = m * k * (size + (0 if activations.kind == "float" else 2))
    return weight + x + m * n * size


def holds_integers(codec: PlanesCodec | SparseCodec) -> bool:
    """Whether the numbers of a codec are whole numbers of 8 bits times the scale of their group."""
    whole = not codec.is_table or codec.values in value_tables.UNITS
    return whole and codec.scale_dtype != "fp8"


def held_in(codec: PlanesCodec | SparseCodec) -> str:
    """The type of a dot with rounded activations that holds the numbers of a codec as well."""
    return "bf16" if codec.values == "bf16" else "fp16"


def folds_scales(k: int, codec: PlanesCodec | SparseCodec, activations: ActivationFormat) -> bool:
    """Whether codes are multiplied by the 8-bit scales of their groups before the dot, so that one
    dot sums all of K: always where the products are rounded (FireQ), and for int8 dots where
    integers of 8 bits hold them (DGQ) and a token has one scale."""
    if codec.scale_dtype == "fp8":
        return True
    groups = [g for g in (codec.group, activations.group) if g is not None and g < k]
    one_scale = activations.group is None or activations.group >= k
    fits = codec.scale_dtype == "int8" and holds_integers(codec) and k <= MOST_INT32_COLUMNS
    return fits and activations.is_integer and one_scale and all(g % 32 == 0 for g in groups)


def multiplies_float8(
    k: int, codec: PlanesCodec | SparseCodec, activations: ActivationFormat
) -> bool:
    """Whether a dot of 8-bit floats takes x and the weight as they are stored or decoded."""
    if activations.values != "e4m3":
        return False
    of_weight = codec.scale_dtype == "fp8" or codec.values == "e4m3"
    return of_weight and common_group(k, codec, activations) % 32 == 0


def common_group(k: int, codec: PlanesCodec | SparseCodec, activations: ActivationFormat) -> int:
    """Longest run along K that has one weight scale and one activation scale outside the dot."""
    own = None if folds_scales(k, codec, activations) else codec.group
    groups = [g for g in (own, activations.group) if g is not None and g < k]
    return math.gcd(*groups) if groups else packing.round_up(max(k, 1), packing.block_of(codec))


def plan_cpu(
    draft: Plan,
    m: int,
    k: int,
    codec: PlanesCodec,
    activations: ActivationFormat,
    device: DeviceDescription,
) -> Plan:
    """The dataflow and the register tile of a CPU."""
    if codec.values == "vectors":
        return _plan_cpu_vectors(draft, m, activations, device)
    needed = 8 if codec.scale_dtype == "fp8" else codec.bits
    stored = next(bits for bits in (2, 4, 8) if bits >= needed)
    reasons = [f"{device.architecture}, {device.threads} thread(s)"]
    panel_bytes = 2 * stored * k
    if keeps_trits(k, codec, activations, device.wide_look_up):
        panel_bytes = packing.PANEL * k // packing.TRITS
        reasons.append("ternary codes stay five in a byte: a look-up in registers takes them apart")
    elif packing.is_base3(codec):
        why = _why_wide(activations, device)
        reasons.append(f"ternary codes are widened to 2 bits in the CPU's view, as {why}")
    if stored != codec.bits:
        reasons.append(f"{codec.bits}-bit codes are widened to {stored} bits in the CPU's view")
    if not activations.is_integer:
        dot = "fp32"
        reasons.append(f"{activations.kind} activations: codes become fp32 in registers")
    else:
        dot = "int8"
        reasons.append("int8 dot products")
        weight_group, x_group = codec.group, activations.group
        if x_group is not None and weight_group is not None and x_group % weight_group:
            shared = math.gcd(x_group, weight_group)
            reasons.append(f"groups of {x_group} and {weight_group} share runs of {shared}")
    if m >= LOOK_UP_TOKENS and looks_up(k, codec, activations, device.architecture):
        reasons.append(
            "no VNNI: four ternary codes are an index into sums of four activations, of "
            f"{LOOK_UP_TILE} tokens at a time (up to {LOOK_UP_REST} that are left: products)"
        )
        return replace(
            draft, dataflow="look_up", dot=dot, reason="; ".join(reasons), threads=device.threads,
            block_m=LOOK_UP_TILE, block_n=packing.PANEL, block_k=32,
        )  # fmt: skip
    # Codes of 16 rows; the scales beside them are a few per cent and decide nothing here.
    kind = "int8" if dot == "int8" else "float"
    tokens, panels = cpu_tile(kind, m, panel_bytes, device.architecture)
    dataflow: Dataflow = "gemv" if m <= 1 else "tiled"
    reasons.append("one token streams the weight" if m <= 1 else "tokens share a register tile")
    return replace(
        draft,
        dataflow=dataflow,
        dot=dot,
        reason="; ".join(reasons),
        threads=device.threads,
        block_m=tokens,
        block_n=panels * packing.PANEL,
    )


def _plan_cpu_vectors(
    draft: Plan, m: int, activations: ActivationFormat, device: DeviceDescription
) -> Plan:
    tokens = cpu_vector_tokens(m, device.architecture)
    what = "float" if activations.kind == "float" else "rounded"
    why = (
        f"{device.architecture}, {device.threads} thread(s); {what} activations as fp32: entries "
        f"are fetched and widened once for {tokens} token(s)"
    )
    if m >= CPU_VECTOR_STAGED:
        why = why.replace(
            f"once for {tokens} token(s)", "once, a piece of sixteen rows at a time, for all tokens"
        )
    return replace(
        draft, dataflow="gemv" if m <= 1 else "tiled", dot="fp32", reason=why,
        threads=device.threads, block_m=tokens, block_n=packing.PANEL,
    )  # fmt: skip


def cpu_vector_tokens(tokens: int, architecture: str) -> int:
    """Tokens of the register tile of a CPU kernel over vector codebooks."""
    tiles = CPU_VECTOR_TOKENS[architecture == "avx512_vnni"]
    return next((tile for tile in tiles if tile >= tokens), tiles[-1])


def keeps_trits(
    k: int, codec: PlanesCodec, activations: ActivationFormat, wide_look_up: bool
) -> bool:
    """Whether the CPU's view of a ternary weight keeps five codes in a byte."""
    groups = [g for g in (codec.group, activations.group) if g is not None and g < k]
    whole = all(group % TRIT_GROUP == 0 for group in groups)
    return packing.is_base3(codec) and activations.is_integer and wide_look_up and whole


def looks_up(
    k: int,
    codec: PlanesCodec | SparseCodec,
    activations: ActivationFormat,
    architecture: str,
) -> bool:
    """Whether a CPU multiplies several tokens by look-ups: ternary codes, one scale for a row and
    for a token, and no instruction that adds four products of bytes."""
    groups = [g for g in (codec.group, activations.group) if g is not None and g < k]
    ternary = codec.values == "ternary" and activations.is_integer
    return ternary and not groups and k <= LONGEST_GROUP and architecture != "avx512_vnni"


def _why_wide(activations: ActivationFormat, device: DeviceDescription) -> str:
    if not activations.is_integer:
        return f"{activations.kind} activations multiply 2-bit ones"
    if not device.wide_look_up:
        return "this CPU has no look-up of 128 bytes (AVX512_VBMI)"
    return f"groups are no multiples of {TRIT_GROUP}"


def cpu_tile(kind: str, tokens: int, panel_bytes: int, architecture: str) -> tuple[int, int]:
    """(tokens, panels of 16 rows) of the register tile of a CPU kernel.

    kind: "int8" or "float", what is multiplied. panel_bytes: of 16 rows of the CPU's view. One
    token reads long panels four at a time, since one stream does not fill the bandwidth, and short
    ones singly, since the prefetcher must first find a stream.
    """
    if tokens <= 1 and panel_bytes < LONG_STREAM:
        return 1, 1
    tiles = CPU_TILES[kind, architecture == "avx512_vnni"]
    return next((tile for tile in tiles if tile[0] >= tokens), tiles[-1])


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
        # Larger tiles spill here, or take the longer path through tensor memory.
        swap, tokens, rows, warps = True, min(tokens, 32), 64, 2
    elif device.kind == "cuda" and m <= (8 if is_fine else 16):
        # Two warps keep to the small dot of 8 or 16 tokens on every architecture; 16 and what needs
        # more registers spill.
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
    # up by codes in half runs, or put together from bytes where tensor memory is addressed.
    wide = _has_tensor_memory(device) and (codec.bits == 8 or (codec.is_table and dot == "int8"))
    scattered = codec.values in LOOKED_UP and 1 in codec.plane_widths
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


def power_of_two(value: int, low: int, high: int) -> int:
    return max(low, min(high, 1 << max(value - 1, 0).bit_length()))


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
