"""The definition of vector codebooks in NumPy: scales, weighted k-means, indices, decoding.

A weight [N, K] is cut along K into vectors of v weights (the last one is filled with zeros that
count for nothing). Float64 inside; what is stored is rounded first, and what follows is computed
with the stored numbers. The idea of codebooks found with the second-order importance of the inputs
is VPTQ's (2409.17066); here the vectors lie along the inputs, where a dot product runs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lath.formats.vectors import VectorCodec

# Lloyd's rounds, and the vectors that they look at: every entry of a small book has hundreds, a
# book of 65536 has no more than a few, and many rounds of it would take minutes.
ROUNDS = {16: 25, 256: 25, 65536: 3}
MOST_SAMPLES = {16: 1 << 16, 256: 1 << 16, 65536: 1 << 17}
# Unimportant inputs still count this share of the mean: an entry must mean something there too.
LEAST_IMPORTANCE = 2.0**-20

Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]


class Quantised(NamedTuple):
    """indices: [N, V] for each book. scales: fp16 [G, N]. books: fp16 [entries + residual, v]."""

    indices: list[Indices]
    scales: NDArray[np.float16]
    books: NDArray[np.float16]


def quantize(
    weight: NDArray[np.float32],
    codec: VectorCodec,
    importance: Doubles | None = None,
    seed: int = 0,
) -> Quantised:
    """Scales, books and indices of a weight [N, K] fp32.

        scale = fp16(sqrt(mean w²)) of a group; 0, and decoded 0, where the group is all zero
        book  = weighted k-means of the vectors of w / scale (`learn_book`), rounded to fp16
        index = that of the nearest entry (`nearest`); then the same of what is left, if there is
                a residual book

    importance: float64 [K], not negative, the mean square of each input (the diagonal of the
    Hessian of the squared error of the output); None: all 1. seed: of the vectors that the books
    are learned from and begin with.

    Raises ValueError if the weight has NaN or infinity, a scale overflows fp16, or importance is
    negative, not finite, all zero or of a wrong shape.
    """
    if not np.isfinite(weight).all():
        raise ValueError("weight must be finite: it has NaN or infinity")
    rows, columns = weight.shape
    share = importance_of(importance, columns)
    scales = scales_of(weight, codec)
    wide = scales.astype(np.float64).T[:, np.arange(columns) // codec.group_size(columns)]
    scaled = np.divide(weight, wide, out=np.zeros((rows, columns)), where=wide > 0)
    left = vectors_of(scaled, codec).reshape(-1, codec.vector)
    near = vectors_of(np.broadcast_to(share, (rows, columns)), codec).reshape(-1, codec.vector)
    mass = near * np.repeat(vectors_of(wide**2, codec)[..., 0].reshape(-1, 1), codec.vector, 1)
    rng = np.random.default_rng(seed)
    books, indices = [], []
    for entries in codec.books:
        book = learn_book(left, mass, entries, rng).astype(np.float16)
        index = nearest(left, near, book.astype(np.float64))
        left = left - book.astype(np.float64)[index]
        books.append(book)
        indices.append(index.reshape(rows, codec.num_vectors(columns)))
    return Quantised(indices, scales, np.concatenate(books))


def importance_of(importance: Doubles | None, columns: int) -> Doubles:
    """What each input counts, float64 [K], the mean 1 and none below `LEAST_IMPORTANCE`."""
    if importance is None:
        return np.ones(columns)
    share = np.asarray(importance, np.float64)
    if share.shape != (columns,) or not np.isfinite(share).all() or (share < 0).any():
        raise ValueError(
            f"importance must be {columns} finite numbers, none negative, got shape "
            f"{list(share.shape)}"
        )
    if columns and not share.any():
        raise ValueError("importance must hold a number that is not 0")
    return np.maximum(share / share.mean(), LEAST_IMPORTANCE) if columns else share


def scales_of(weight: NDArray[np.float32], codec: VectorCodec) -> NDArray[np.float16]:
    """fp16 [G, N]: the root mean square of each group, 0 of a group of zeros."""
    rows, columns = weight.shape
    size = codec.group_size(columns)
    scales = np.zeros((codec.num_groups(columns), rows), np.float16)
    for g in range(len(scales)):
        block = weight[:, g * size : (g + 1) * size].astype(np.float64)
        exact = np.sqrt((block**2).mean(axis=1))
        with np.errstate(over="ignore"):
            # The smallest number of fp16 at least: only a group of zeros has scale 0.
            stored = np.where(exact == 0, 0, np.maximum(exact, 2.0**-24)).astype(np.float16)
        if not np.isfinite(stored).all():
            raise ValueError(
                f"weight is too large for {codec}: a scale of {exact.max():.3g} overflows fp16"
            )
        scales[g] = stored
    return scales


def vectors_of(values: Doubles, codec: VectorCodec) -> Doubles:
    """[N, K] → [N, V, v], zeros behind K."""
    rows, columns = values.shape
    padded = np.zeros((rows, codec.num_vectors(columns) * codec.vector))
    padded[:, :columns] = values
    return padded.reshape(rows, codec.num_vectors(columns), codec.vector)


def learn_book(vectors: Doubles, mass: Doubles, entries: int, rng: np.random.Generator) -> Doubles:
    """Weighted k-means: [P, v] vectors, each number with its mass [P, v] → float64 [entries, v].

    Minimises Σ mass (vector - entry)² by Lloyd's rounds over at most MOST_SAMPLES vectors, drawn
    without replacement, beginning with the first of them; entries beyond their number are 0. An
    entry that nothing is near stays where it is.
    """
    order = rng.permutation(len(vectors))[: MOST_SAMPLES[entries]]
    sample, own = vectors[order], mass[order]
    book = np.zeros((entries, vectors.shape[1]))
    book[: len(sample)] = sample[:entries]
    for _ in range(ROUNDS[entries]):
        index = nearest(sample, own, book)
        held, sums = np.zeros_like(book), np.zeros_like(book)
        np.add.at(held, index, own)
        np.add.at(sums, index, own * sample)
        book = np.where(held > 0, sums / np.where(held > 0, held, 1), book)
    return book


def nearest(vectors: Doubles, mass: Doubles, book: Doubles) -> Indices:
    """The entry [P] of the least Σ mass (vector - entry)²; of equals the lower index."""
    index = np.zeros(len(vectors), np.int64)
    for start in range(0, len(vectors), 1024):
        part, own = vectors[start : start + 1024], mass[start : start + 1024]
        cost = own @ (book**2).T - 2 * (own * part) @ book.T
        index[start : start + 1024] = cost.argmin(axis=1)
    return index


def dequantize(
    indices: list[Indices],
    scales: NDArray[np.float16],
    books: NDArray[np.float16],
    codec: VectorCodec,
    columns: int,
) -> Doubles:
    """Indices [N, V] for each book, scales [G, N] → the weight [N, K] float64, exact."""
    first, total = 0, np.zeros((*indices[0].shape, codec.vector))
    for entries, index in zip(codec.books, indices, strict=True):
        total = total + books[first : first + entries].astype(np.float64)[index]
        first += entries
    numbers = total.reshape(len(total), codec.num_vectors(columns) * codec.vector)[:, :columns]
    group = np.arange(columns) // codec.group_size(columns)
    decoded: Doubles = numbers * scales.astype(np.float64).T[:, group]
    return decoded


def place(n: int, j: int, width: int, codec: VectorCodec, columns: int) -> tuple[int, int]:
    """Word in its plane of `width` bits per weight, and bit in the word, of the index of the j-th
    vector of row n."""
    per_block, blocks = 128 // codec.vector, -(-columns // 128)
    bit = j % per_block * codec.vector * width
    row = ((n // 16) * blocks + j // per_block) * 16 + n % 16
    return row * 4 * width + bit // 32, bit % 32
