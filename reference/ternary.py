"""The definition of what is ternary's own, in NumPy: five codes a byte, and products by look-up.

Look-ups (bitnet.cpp, 2502.11880, its kernels TL1 and TL2) replace multiplications: the dot products
of a few activations with every combination of -1, 0, 1 are written down once per token, and a
weight is an index into them. The integers are those of the product itself, so that a backend is
free to look up or to multiply.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

PANEL, TRIT_BLOCK = 16, 160
Codes = NDArray[np.uint8]


def place_trit(n: int, k: int, columns: int) -> tuple[int, int]:
    """Byte in the flat plane, and slot 0 .. 4 in the byte, of ternary code (n, k) of a "base3"
    weight: those of a plane of two bits, but that a block has five slots and 160 columns."""
    blocks, inside = -(-columns // TRIT_BLOCK), k % TRIT_BLOCK
    slot, q = inside // 32, inside % 32
    word = (((n // PANEL) * blocks + k // TRIT_BLOCK) * PANEL + n % PANEL) * 8 + q % 16 // 2
    return 4 * word + 2 * (q & 1) + (q >> 4), slot


def trit_byte(slots: tuple[int, ...]) -> int:
    """The byte of five codes 0 .. 2: floor(256 v / 243) + 1, v the number whose base-3 digits they
    are, the first the highest."""
    number = 0
    for slot in slots:
        number = 3 * number + slot
    return 256 * number // 243 + 1


def trits_of(byte: int) -> tuple[int, ...]:
    """The five codes of a byte: the digits of byte / 256 in base 3."""
    return tuple(byte * 3 ** (slot + 1) // 256 % 3 for slot in range(5))


def pack_trits(codes: Codes) -> NDArray[np.uint32]:
    """uint8 codes [N, K] of 0 .. 2 → uint32 1-D, one code at a time; padding holds code 0."""
    rows, columns = codes.shape
    count = -(-rows // PANEL) * -(-columns // TRIT_BLOCK) * PANEL * 32
    slots = np.zeros((count, 5), np.int64)
    for n in range(rows):
        for k in range(columns):
            byte, slot = place_trit(n, k, columns)
            slots[byte, slot] = codes[n, k]
    packed = np.array([trit_byte(tuple(own)) for own in slots], np.uint8)
    return packed.view(np.uint32)


def tequila_bias(weight: NDArray[np.float32], codes: Codes, strength: float) -> NDArray[np.float64]:
    """C[n] = strength * Σ_k weight[n, k] where codes[n, k] stands for 0 (Tequila, 2509.23809).

    weight [N, K], codes [N, K] of 0 .. 2 → float64 [N]: a bias of y = A(x) Tᵀ + C.
    """
    left_out = np.where(codes == 1, weight.astype(np.float64), 0).sum(axis=1)
    total: NDArray[np.float64] = strength * left_out
    return total


class Tl1:
    """Two weights in an index of 4 bits: w = (w0, w1) -> 3 (w0 + 1) + (w1 + 1), 0 .. 8."""

    weights, bits = 2, 4

    @staticmethod
    def encode(weight: NDArray[np.int8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """weight [N, K] of -1, 0, 1, K even → indices and signs [N, K/2]; all signs are 1."""
        pairs = weight.reshape(weight.shape[0], -1, 2).astype(np.int64) + 1
        return 3 * pairs[..., 0] + pairs[..., 1], np.ones(pairs.shape[:2], np.int64)

    @staticmethod
    def table(x: NDArray[np.int8]) -> NDArray[np.int64]:
        """x [M, K] → [M, K/2, 9]: x0 w0 + x1 w1 of every index."""
        pairs = x.reshape(x.shape[0], -1, 2).astype(np.int64)
        every = np.array(list(itertools.product((-1, 0, 1), repeat=2)))
        entries: NDArray[np.int64] = pairs @ every.T
        return entries


class Tl2:
    """Three weights in 5 bits: a sign and an index of 4 bits.

    Of w and -w one is written down: v = 9 w0 + 3 w1 + w2, -13 .. 13, index |v|, sign that of v.
    """

    weights, bits = 3, 5

    @staticmethod
    def encode(weight: NDArray[np.int8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """weight [N, K] of -1, 0, 1, K a multiple of 3 → indices and signs (1, -1) [N, K/3]."""
        number = weight.reshape(weight.shape[0], -1, 3).astype(np.int64) @ np.array([9, 3, 1])
        return np.abs(number), np.where(number < 0, -1, 1)

    @staticmethod
    def table(x: NDArray[np.int8]) -> NDArray[np.int64]:
        """x [M, K] → [M, K/3, 14]: x0 w0 + x1 w1 + x2 w2 of the combinations with v >= 0."""
        triples = x.reshape(x.shape[0], -1, 3).astype(np.int64)
        every = np.array(list(itertools.product((-1, 0, 1), repeat=3)))
        entries: NDArray[np.int64] = triples @ every[13:].T  # v is -13, -12, …
        return entries


def look_up_linear(
    x: NDArray[np.int8], weight: NDArray[np.int8], form: type[Tl1] | type[Tl2]
) -> NDArray[np.int32]:
    """Σ_k x[m, k] w[n, k] by look-ups: x [M, K] int8, weight [N, K] of -1, 0, 1 → int32 [M, N].

    K need not be a multiple of the form's `weights`: what is missing counts as 0. Equal to the
    product of integers, bit for bit; ValueError for another weight.
    """
    if not np.isin(weight, (-1, 0, 1)).all():
        raise ValueError("weight must hold -1, 0 and 1 alone")
    missing = ((0, 0), (0, -x.shape[1] % form.weights))
    indices, signs = form.encode(np.pad(weight, missing))
    entries = form.table(np.pad(x, missing))
    assert indices.max(initial=0) < 1 << 4
    total = np.zeros((x.shape[0], weight.shape[0]), np.int64)
    for group in range(indices.shape[1]):
        total += entries[:, group, indices[:, group]] * signs[:, group]
    return total.astype(np.int32)


def vector_look_up_linear(
    x: NDArray[np.int8], weight: NDArray[np.int8], weights: int = 4
) -> NDArray[np.int32]:
    """As `look_up_linear` in the order of Vec-LUT (2512.06443): a group of `weights` columns has
    one table whose entries are vectors over all tokens, and each index adds one such vector.

    The table grows weight by weight: with T those of the first columns, T - x, T, T + x are those
    of one more. Sums are kept in int16 for as many groups as cannot overflow it (a group adds at
    most 127 * weights), and then added to int32.
    """
    if not np.isin(weight, (-1, 0, 1)).all():
        raise ValueError("weight must hold -1, 0 and 1 alone")
    missing = ((0, 0), (0, -x.shape[1] % weights))
    columns = np.pad(x, missing).T.astype(np.int16)
    trits = np.pad(weight, missing).astype(np.int64) + 1
    indices = trits.reshape(len(trits), -1, weights) @ (3 ** np.arange(weights - 1, -1, -1))
    most = (2**15 - 1) // (127 * weights)
    total = np.zeros((len(trits), x.shape[0]), np.int32)
    for start in range(0, indices.shape[1], most):
        short = np.zeros(total.shape, np.int16)
        for group in range(start, min(start + most, indices.shape[1])):
            table = np.zeros((1, x.shape[0]), np.int16)
            for column in columns[group * weights : (group + 1) * weights]:
                table = np.stack([table - column, table, table + column], axis=1)
                table = table.reshape(-1, x.shape[0])
            short += table[indices[:, group]]
        total += short
    return np.ascontiguousarray(total.T)
