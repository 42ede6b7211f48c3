"""Vector codebooks in torch, on the device of the weight: the steps of `lath.reference.vectors`.

The same vectors are drawn and the same rounds run, in fp32 where the definition has float64: books
agree but for rounding and what follows from it, and an index is that of an entry as near as fp32
tells. On a CPU with numba the nearest entries are found by a compiled kernel. A book of 65536 is
learned from at most 2**17 vectors in 3 rounds.
"""

from __future__ import annotations

import functools
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from lath.formats import packing
from lath.formats.vectors import VectorCodec, VectorTensor, pack_indices

_ROUNDS = {16: 25, 256: 25, 65536: 3}
_MOST_SAMPLES = {16: 1 << 16, 256: 1 << 16, 65536: 1 << 17}
_LEAST_IMPORTANCE = 2.0**-20
# Distances held at once: they stay in a second-level cache.
_CHUNK_DISTANCES = 1 << 18
# Of so many distances the least is found by vectors; where it stands, among them alone and slowly.
_RUN = 64


def quantize(
    weight: Tensor,
    codec: VectorCodec,
    search: bool = False,
    table: Tensor | None = None,
    importance: Tensor | None = None,
    seed: int = 0,
) -> VectorTensor:
    """weight [N, K] fp16, bf16 or fp32 → VectorTensor; ValueError on NaN, infinity or overflow.

    importance: [K], not negative, the mean square of each input; None: all 1. seed: of the vectors
    that the books are learned from. search, table: none of vector codebooks, ValueError.
    """
    if search:
        raise ValueError(f"search must be False for {codec}: its books are fitted already")
    if table is not None:
        raise ValueError(f"table is for 'lut' codecs, got codec {str(codec)!r}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must be finite: it has NaN or infinity")
    weight = weight.float()
    rows, columns = weight.shape
    share = _importance(importance, columns).to(weight.device)
    scales = _scales(weight, codec)
    wide = scales.float().T.repeat_interleave(codec.group_size(columns), dim=1)[:, :columns]
    left = _vectors(torch.where(wide > 0, weight / torch.where(wide > 0, wide, 1.0), 0.0), codec)
    near = _vectors(share[None].expand(rows, columns), codec)
    mass = near * _vectors(wide**2, codec)[:, :1]
    rng = np.random.default_rng(seed)
    books, indices = [], []
    for entries in codec.books:
        book = _learn(left, mass, entries, rng).half()
        index = nearest(left, near, book.float())
        left = left - book.float()[index]
        books.append(book)
        indices.append(index.reshape(rows, codec.num_vectors(columns)))
    padded = torch.nn.functional.pad(scales, (0, -rows % packing.PANEL))
    return VectorTensor(
        codec, (rows, columns), pack_indices(indices, codec), padded, torch.cat(books)
    )


def _importance(importance: Tensor | None, columns: int) -> Tensor:
    if importance is None:
        return torch.ones(columns)
    share = importance.detach().double()
    if tuple(share.shape) != (columns,) or not bool((torch.isfinite(share) & (share >= 0)).all()):
        raise ValueError(
            f"importance must be {columns} finite numbers, none negative, got shape "
            f"{list(share.shape)}"
        )
    if columns and not bool(share.any()):
        raise ValueError("importance must hold a number that is not 0")
    return (share / share.mean()).clamp(min=_LEAST_IMPORTANCE).float()


def _scales(weight: Tensor, codec: VectorCodec) -> Tensor:
    """fp16 [G, N]: the root mean square of each group, 0 of a group of zeros."""
    rows, columns = weight.shape
    if not columns:
        return weight.new_zeros((0, rows), dtype=torch.float16)
    blocks = weight.double().split(codec.group_size(columns), dim=1)
    exact = torch.stack([(block**2).mean(dim=1).sqrt() for block in blocks])
    stored = torch.where(exact == 0, 0.0, exact.clamp(min=2.0**-24)).half()
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(
            f"weight is too large for {codec}: a scale of {float(exact.max()):.3g} overflows fp16"
        )
    return stored


def _vectors(values: Tensor, codec: VectorCodec) -> Tensor:
    """[N, K] → [N * V, v], zeros behind K."""
    pad = (0, -values.shape[1] % codec.vector)
    return torch.nn.functional.pad(values, pad).reshape(-1, codec.vector)


def _learn(vectors: Tensor, mass: Tensor, entries: int, rng: np.random.Generator) -> Tensor:
    """Weighted k-means, fp32 [entries, v]; sums in float64."""
    order = torch.from_numpy(rng.permutation(len(vectors))[: _MOST_SAMPLES[entries]])
    order = order.to(vectors.device)
    sample, own = vectors[order], mass[order]
    book = vectors.new_zeros((entries, vectors.shape[1]))
    book[: len(sample)] = sample[:entries]
    counted, weighted = own.double(), (own * sample).double()
    for _ in range(_ROUNDS[entries]):
        index = nearest(sample, own, book)
        held = torch.zeros_like(book, dtype=torch.float64).index_add_(0, index, counted)
        sums = torch.zeros_like(held).index_add_(0, index, weighted)
        moved = sums / torch.where(held > 0, held, 1.0)
        book = torch.where(held > 0, moved, book.double()).float()
    return book


def nearest(vectors: Tensor, mass: Tensor, book: Tensor) -> Tensor:
    """The entry [P] of the least Σ mass (vector - entry)², as far as fp32 tells; of equals the
    lower index."""
    count, entries = len(vectors), len(book)
    if bool((mass == mass[:, :1]).all()):  # what all numbers of a vector share decides nothing
        terms = torch.cat([vectors, torch.ones_like(vectors[:, :1])], dim=1)
        doubled = torch.cat([-2 * book, (book**2).sum(dim=1, keepdim=True)], dim=1)
    else:
        terms = torch.cat([mass * vectors, mass], dim=1)
        doubled = torch.cat([-2 * book, book**2], dim=1)
    compiled = _compiled() if book.device.type == "cpu" else None
    if compiled is not None:
        return compiled.least_products(terms, doubled)
    doubled = doubled.T.contiguous()
    run = min(_RUN, entries)
    chunk, runs = max(16, _CHUNK_DISTANCES // entries), entries // run
    index = torch.empty(count, dtype=torch.int64, device=book.device)
    # One piece of memory for all distances: of a piece for each chunk an allocator may keep all.
    distances = vectors.new_empty((chunk, entries))
    begins = torch.arange(0, chunk * runs, runs, device=book.device)
    for start in range(0, count, chunk):
        part, found = terms[start : start + chunk], index[start : start + chunk]
        pieces = torch.mm(part, doubled, out=distances[: len(part)]).view(-1, run)
        if runs == 1:
            torch.argmin(pieces, dim=1, out=found)
            continue
        first = pieces.amin(dim=1).view(-1, runs).argmin(dim=1)
        inside = pieces.index_select(0, begins[: len(part)] + first).argmin(dim=1)
        torch.add(inside, first, alpha=run, out=found)
    return index


@functools.cache
def _compiled() -> ModuleType | None:
    """The CPU kernel of the same, where numba is installed: several times as fast."""
    try:
        return import_module("lath.kernels.quantizers.cpu_nearest")
    except ModuleNotFoundError:
        return None
