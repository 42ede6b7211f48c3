"""Memory of the CPU attention kernels: a thread's scratch, and the state of a tile of rows.

of a tile   q           [rows, staged keys] floats that are multiplied (fp32 or bf16)
            rounded     the same with q rounded to E4M3 (where it is)
            codes       int8 [rows, stored keys]
            factors     fp32 [rows / 4, 4]  scale of the codes times the scale of scores
            sums        int32 [rows]  of codes
shared      wide        fp32 [staged keys]  one row of q
            scores      fp32 [4, 64]
            weights     [4, 64] floats that are multiplied, or one or two planes of bytes [4, 64]
            result      fp32 [4, values]
            key_rows    [64, staged keys] floats that are multiplied
            value_rows  [64, values], [32, values, 2] or [values, 64] floats that are multiplied
state       per 4 rows: m fp32 [4], l fp32 [4], 32 bytes unused, o fp32 [4, values]; m in units of
            log2
"""

from __future__ import annotations

from typing import NamedTuple

from lath.formats.pages import PAGE
from lath.kernels.attention.cpu_arguments import ROW_PIECES, ROWS, SHARED_PIECES

ALIGNMENT = 64
STATE_HEADER = 64


class Scratch(NamedTuple):
    """offsets: of every piece, in its part. shared, rows: bytes of the two parts."""

    offsets: dict[str, int]
    shared: int
    rows: int


def scratch_of(tile_rows: int, staged_keys: int, stored_values: int) -> Scratch:
    """staged_keys: no fewer than the stored ones."""
    sizes = {
        "q": 4 * tile_rows * staged_keys,
        "rounded": 4 * tile_rows * staged_keys,
        "codes": tile_rows * staged_keys,
        "factors": 4 * tile_rows,
        "sums": 4 * tile_rows,
        "wide": 4 * staged_keys,
        "scores": 4 * ROWS * PAGE,
        "weights": 4 * ROWS * PAGE,
        "result": 4 * ROWS * stored_values,
        "key_rows": 4 * PAGE * staged_keys,
        "value_rows": 4 * PAGE * stored_values,
    }
    offsets, ends = {}, []
    for names in (SHARED_PIECES, ROW_PIECES):
        at = 0
        for name in names:
            offsets[name] = at
            at += -(-sizes[name] // ALIGNMENT) * ALIGNMENT
        ends.append(at)
    return Scratch(offsets, *ends)


def state_bytes(tile_rows: int, stored_values: int) -> int:
    return tile_rows // ROWS * (STATE_HEADER + 4 * ROWS * stored_values)
