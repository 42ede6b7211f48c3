"""The plan of `linear` on a CPU: which register tile, view and dataflow, and why."""

from __future__ import annotations

import math
from dataclasses import replace

from lath.formats import packing
from lath.formats.activations import ActivationFormat
from lath.formats.codec import PlanesCodec
from lath.formats.device import DeviceDescription
from lath.formats.plan import Dataflow, Plan
from lath.formats.sparse import SparseCodec

# Bytes of a panel, by the bits of its codes, from which four at a time were faster on a Zen 4 core
# that reads huge pages. int4 of 34 to 50 KB: singly 1.13 to 1.19 times as fast, of 68 and 118 KB
# 0.86 and 0.93; int8 of 50 to 66 KB: 1.01; int2 of 34 KB: 0.7.
LONG_STREAM = {2: 32768, 4: 65536, 8: 65536}
# Columns of a CPU's group. 255 * 127 * LONGEST_GROUP < 2**31: its int32 sums cannot overflow.
LONGEST_GROUP = 65536
# Columns that are whole vectors of a CPU's base-3 codes (20) and of its activations (16).
TRIT_GROUP = 80
# Ternary look-ups of a CPU without VNNI: tokens side by side in an entry, and by instruction set
# from how many on, alone or behind the last whole entry, they take less time than products
# (bench/results/ternary_zen4_cpu.md).
LOOK_UP_TILE = 16
LOOK_UP_TOKENS = {"avx2": 5, "portable": 2}
# Register tiles (tokens, panels) by what is multiplied and whether the CPU has AVX512-VNNI:
# accumulators, one panel of codes each and a broadcast fill the 32 (or 16 half as wide) registers.
CPU_TILES = {
    ("int8", True): ((1, 4), (2, 4), (4, 4), (8, 3)),
    ("int8", False): ((1, 4), (4, 1)),
    # Eight tokens took 1.02 times as long: tables leave little of the first-level cache then.
    ("triplets", True): ((1, 2), (2, 2), (4, 2)),
    ("float", True): ((1, 1), (4, 1), (8, 1)),
    ("float", False): ((1, 1), (4, 1)),
}
# Tokens of a register tile of four rows of vectors: accumulators, four rows of decoded weights.
CPU_VECTOR_TOKENS = {True: (1, 2, 4), False: (1, 2)}
# Tokens from which decoding a piece of a panel into memory beats fetching entries for each tile.
CPU_VECTOR_STAGED = 8


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
    triplets = keeps_triplets(k, codec, activations, device.quick_permutation)
    if triplets:
        reasons.append(
            "three ternary codes are an index into sums of activations, which a register "
            "holds: looked up and added in less time than they are multiplied"
        )
    elif keeps_trits(k, codec, activations, device.wide_look_up):
        panel_bytes = packing.PANEL * k // packing.TRITS
        reasons.append("ternary codes stay five in a byte: a look-up in registers takes them apart")
    elif packing.is_base3(codec):
        why = _why_wide(activations, device)
        reasons.append(f"ternary codes are widened to 2 bits in the CPU's view, as {why}")
    if stored != codec.bits and not triplets:
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
    if looks_up(k, codec, activations, device.architecture, m):
        reasons.append(
            "no VNNI: four ternary codes are an index into sums of four activations, of "
            f"{LOOK_UP_TILE} tokens at a time (fewer than {LOOK_UP_TOKENS[device.architecture]} "
            "that are left: products)"
        )
        return replace(
            draft, dataflow="look_up", dot=dot, reason="; ".join(reasons), threads=device.threads,
            block_m=LOOK_UP_TILE, block_n=packing.PANEL, block_k=32,
        )  # fmt: skip
    # Codes of 16 rows; the scales beside them are a few per cent and decide nothing here.
    kind = "triplets" if triplets else "int8" if dot == "int8" else "float"
    tokens, panels = cpu_tile(kind, stored, m, panel_bytes, device.architecture)
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


def keeps_triplets(
    k: int,
    codec: PlanesCodec | SparseCodec,
    activations: ActivationFormat,
    quick_permutation: bool,
) -> bool:
    """Whether a CPU looks up sums of three activations in registers (cpu_triplets.py): ternary
    codes, and one scale for a row and for a token."""
    return quick_permutation and k > 0 and _is_plain_ternary(k, codec, activations)


def _is_plain_ternary(
    k: int, codec: PlanesCodec | SparseCodec, activations: ActivationFormat
) -> bool:
    groups = [g for g in (codec.group, activations.group) if g is not None and g < k]
    ternary = codec.values == "ternary" and activations.is_integer
    return ternary and not groups and k <= LONGEST_GROUP


def looks_up(
    k: int,
    codec: PlanesCodec | SparseCodec,
    activations: ActivationFormat,
    architecture: str,
    tokens: int | None = None,
) -> bool:
    """Whether a CPU multiplies so many tokens (None: enough of them) by look-ups: ternary codes,
    one scale for a row and for a token, and no instruction that adds four products of bytes."""
    least = LOOK_UP_TOKENS.get(architecture)
    if least is None or (tokens is not None and tokens < least):
        return False
    return _is_plain_ternary(k, codec, activations)


def _why_wide(activations: ActivationFormat, device: DeviceDescription) -> str:
    if not activations.is_integer:
        return f"{activations.kind} activations multiply 2-bit ones"
    if not device.wide_look_up:
        return "this CPU has no look-up of 128 bytes (AVX512_VBMI)"
    return f"groups are no multiples of {TRIT_GROUP}"


def cpu_tile(
    kind: str, bits: int, tokens: int, panel_bytes: int, architecture: str
) -> tuple[int, int]:
    """(tokens, panels of 16 rows) of the register tile of a CPU kernel.

    kind: "int8" or "float", what is multiplied, or "triplets". bits: of a code, as the CPU's view
    keeps it. panel_bytes: of 16 rows of the view. One token reads long panels four at a time, since
    one stream does not fill the bandwidth, and shorter ones singly, since the prefetcher must first
    find a stream.
    """
    if kind != "triplets" and tokens <= 1 and panel_bytes < LONG_STREAM.get(bits, 0):
        return 1, 1
    tiles = CPU_TILES[kind, architecture == "avx512_vnni"]
    return next((tile for tile in tiles if tile[0] >= tokens), tiles[-1])
