"""Moving lanes: sums of four vectors at once, a lane in all lanes, units of 16 bytes.

Four rows (or four vectors of items) are reduced together: `quarters` leaves in lane 4*g + i what
combines the lanes 4*g .. 4*g + 3 of vector i, nine instructions for four vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from lath.kernels.simd.emitter import F32, I32, LANES, Emitter

Combine = Callable[[Any, Any], Any]
_QUAD = ir.VectorType(I32, 4)
_FLOAT_QUAD = ir.VectorType(F32, 4)
_GROUPS = range(0, LANES, 4)
_LOW_SINGLE = [start + lane for start in _GROUPS for lane in (0, 16, 1, 17)]
_HIGH_SINGLE = [start + lane for start in _GROUPS for lane in (2, 18, 3, 19)]
_LOW_PAIR = [start + lane for start in _GROUPS for lane in (0, 1, 16, 17)]
_HIGH_PAIR = [start + lane for start in _GROUPS for lane in (2, 3, 18, 19)]


def quarters(e: Emitter, vectors: list[Any], combine: Combine) -> Any:
    """Four vectors → lane 4*g + i: lanes 4*g .. 4*g + 3 of vector i combined."""
    first, second = (
        combine(e.shuffle(a, b, _LOW_SINGLE), e.shuffle(a, b, _HIGH_SINGLE))
        for a, b in (vectors[:2], vectors[2:])
    )
    return combine(e.shuffle(first, second, _LOW_PAIR), e.shuffle(first, second, _HIGH_PAIR))


def items(e: Emitter, vectors: list[Any], combine: Combine) -> Any:
    """Four vectors of four items with four parts each → lane 4*i + g: item g of vector i."""
    mixed = quarters(e, vectors, combine)
    return e.shuffle(mixed, mixed, [4 * (lane % 4) + lane // 4 for lane in range(LANES)])


def rows(e: Emitter, vectors: list[Any], combine: Combine) -> Any:
    """Four vectors → every lane l: all lanes of vector l % 4 combined."""
    value = quarters(e, vectors, combine)
    for step in (4, 8):
        turned = e.shuffle(value, value, [(lane + step) % LANES for lane in range(LANES)])
        value = combine(value, turned)
    return value


def lane(e: Emitter, vector: Any, index: int) -> Any:
    """One lane of a vector in every lane."""
    return e.shuffle(vector, vector, [index] * LANES)


def broadcast_unit(e: Emitter, address: Any) -> Any:
    """The 16 bytes in memory four times, as int lanes."""
    unit = e.load(address, _QUAD)
    return e.shuffle(unit, unit, [0, 1, 2, 3] * 4)


def store_quad(e: Emitter, address: Any, vector: Any) -> None:
    """The first four float lanes."""
    e.store(address, e.shuffle(vector, vector, [0, 1, 2, 3]))


def load_quad(e: Emitter, address: Any) -> Any:
    """Four floats in memory, in the lanes l % 4."""
    quad = e.load(address, _FLOAT_QUAD)
    return e.shuffle(quad, quad, [0, 1, 2, 3] * 4)


def add_permuted(e: Emitter, table: Any, places: Sequence[Any], totals: Sequence[Any]) -> list[Any]:
    """Two totals, each with what two vectors of places name in a table: of 32 numbers of 16 bits
    those at the low five bits of 32 others (vpermw).

    Assembly keeps the order: behind one another, two permutations and two additions take two cycles
    of a Zen 4; in turn, as LLVM lays them, they take two and a half, for an addition is then sent
    to a unit that the next permutation waits for.
    """
    kind = table.type
    code = "vpermw $4, $5, $2\nvpermw $4, $6, $3\nvpaddw $2, $0, $0\nvpaddw $3, $1, $1"
    signature = ir.FunctionType(ir.LiteralStructType([kind] * 4), [kind] * 5)
    operands = [table, *places, *totals]
    made = e.builder.asm(signature, code, "=&v,=&v,=&v,=&v,v,v,v,0,1", operands, False)
    return [e.builder.extract_value(made, n) for n in range(2)]


def add_pairs(e: Emitter, sums: Any, left: Any, right: Any) -> Any:
    """Int lanes plus the products of both pairs of 16-bit numbers in each lane (vpdpwssd)."""
    function = e.function("llvm.x86.avx512.vpdpwssd.512", sums.type, [sums.type] * 3)
    return e.builder.call(function, [sums, left, right])


def positions(e: Emitter) -> Any:
    """0, 1, …, 15."""
    return ir.Constant(ir.VectorType(I32, LANES), list(range(LANES)))


def transpose(e: Emitter, vectors: list[Any]) -> list[Any]:
    """Sixteen vectors of sixteen items → vector c: item c of each, in order."""
    low = [half + lane for lane in range(8) for half in (0, LANES)]
    high = [half + lane for lane in range(8, 16) for half in (0, LANES)]
    for _ in range(4):
        halves = list(zip(vectors[:8], vectors[8:], strict=True))
        vectors = [e.shuffle(a, b, order) for a, b in halves for order in (low, high)]
    return vectors
